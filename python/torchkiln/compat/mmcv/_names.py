"""Every name of `mmcv.ops` that users import, with its signature, and what stands behind it here.

The only source of names: the module tree, the stand-ins, the registry entries, `torchkiln compat
mmcv --check` and the table in the documentation are made from it. One row a name, under the module
`mmcv.ops.<module>` that holds it:

    +|*|- KIND NAME [< BASE] [@ REGISTRY] | SIGNATURE | SIGNATURE OF FORWARD | WHAT

`+` is exported by `mmcv.ops` itself, `*` by that of its fork onedl-mmcv 2.3 only. KIND: def, apply
(of an autograd Function), function (such a Function, with the signature of its apply), class.
REGISTRY: the name in mmengine's MODELS. WHAT: the operator of torchkiln behind it, `torch` for
plain tensor operations, nothing while it is not there. An implementation stands in
`_ops/<module>.py` under the same name.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

__all__ = ["MODULES", "Name", "of_fork", "public", "registered"]


@dataclass(frozen=True)
class Name:
    """One row."""

    module: str
    public: bool
    of_fork: bool
    kind: str
    name: str
    base: str
    registry: str
    parameters: str
    forward: str
    operator: str

    @property
    def path(self) -> str:
        """Where users find it."""
        exported = self.public or self.of_fork
        return f"mmcv.ops.{self.name}" if exported else f"mmcv.ops.{self.module}.{self.name}"

    @property
    def signature(self) -> inspect.Signature:
        """The peer's signature; of the constructor for a class, without self."""
        return _signature(self.parameters)

    @property
    def forward_signature(self) -> inspect.Signature | None:
        """The signature of a module's forward, without self."""
        return _signature(self.forward) if self.forward else None


@functools.cache
def _signature(parameters: str) -> inspect.Signature:
    # Our own text below; Python reads its defaults better than we would.
    return inspect.signature(eval(f"lambda {parameters}: None"))


def _parse(line: str, module: str) -> Name:
    title, parameters, forward, operator = (*map(str.strip, line.split("|")), "", "", "")[:4]
    mark, kind, name, *others = title.split()
    marks = dict(zip(others[::2], others[1::2], strict=True))
    base, registry = marks.get("<", ""), marks.get("@", "")
    of_fork = mark == "*"
    return Name(
        module, mark == "+", of_fork, kind, name, base, registry, parameters, forward, operator
    )


def _read(text: str) -> dict[str, dict[str, Name]]:
    modules: dict[str, dict[str, Name]] = {}
    for line in text.split("\n"):
        if line.startswith("["):
            module = line.strip("[]")
            modules[module] = {}
        elif line:
            row = _parse(line, module)
            modules[module][row.name] = row
    return modules


_TABLE = """
[active_rotated_filter]
- function ActiveRotatedFilterFunction | input, indices
+ apply active_rotated_filter | input, indices
[assign_score_withk]
- function AssignScoreWithK | scores, point_features, center_features, knn_idx, aggregate="sum"
+ apply assign_score_withk | scores, point_features, center_features, knn_idx, aggregate="sum"
[ball_query]
- function BallQuery | min_radius, max_radius, sample_num, xyz, center_xyz, xyz_batch_cnt=None, center_xyz_batch_cnt=None
+ apply ball_query | min_radius, max_radius, sample_num, xyz, center_xyz, xyz_batch_cnt=None, center_xyz_batch_cnt=None
[bbox]
+ def bbox_overlaps | bboxes1, bboxes2, mode="iou", aligned=False, offset=0 |  | box_iou
[bezier_align]
- function BezierAlignFunction | input, beziers, output_size, spatial_scale=1.0, sampling_ratio=0, aligned=True |  | bezier_align
+ apply bezier_align | input, beziers, output_size, spatial_scale=1.0, sampling_ratio=0, aligned=True |  | bezier_align
+ class BezierAlign | output_size, spatial_scale, sampling_ratio, aligned=True | input, beziers | bezier_align
[bias_act]
+ def bias_act | input, bias=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, use_custom_op=True
[border_align]
- function BorderAlignFunction | input, boxes, pool_size |  | border_align
+ apply border_align | input, boxes, pool_size |  | border_align
+ class BorderAlign | pool_size | input, boxes | border_align
[box_iou_quadri]
+ def box_iou_quadri | bboxes1, bboxes2, mode="iou", aligned=False |  | box_iou_quadri
[box_iou_rotated]
+ def box_iou_rotated | bboxes1, bboxes2, mode="iou", aligned=False, clockwise=True |  | box_iou_rotated
[carafe]
- function CARAFENaiveFunction | features, masks, kernel_size, group_size, scale_factor
+ apply carafe_naive | features, masks, kernel_size, group_size, scale_factor
+ class CARAFENaive | kernel_size, group_size, scale_factor | features, masks
- function CARAFEFunction | features, masks, kernel_size, group_size, scale_factor
+ apply carafe | features, masks, kernel_size, group_size, scale_factor
+ class CARAFE | kernel_size, group_size, scale_factor | features, masks
+ class CARAFEPack @ carafe | channels, scale_factor, up_kernel=5, up_group=1, encoder_kernel=3, encoder_dilation=1, compressed_channels=64 | x
[cc_attention]
- def NEG_INF_DIAG | n, device
+ class CrissCrossAttention @ CrissCrossAttention | in_channels | x
[chamfer_distance]
- function ChamferDistanceFunction | xyz1, xyz2
+ apply chamfer_distance | xyz1, xyz2
[contour_expand]
+ def contour_expand | kernel_mask, internal_kernel_label, min_kernel_area, kernel_num |  | contour_expand
[conv2d_gradfix]
+ def conv2d | input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1 |  | torch
+ def conv_transpose2d | input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1 |  | torch
[convex_iou]
+ def convex_giou | pointsets, polygons |  | convex_giou
+ def convex_iou | pointsets, polygons |  | convex_iou
[corner_pool]
+ class CornerPool | mode | x | corner_pool
[correlation]
- function CorrelationFunction | input1, input2, kernel_size=1, max_displacement=1, stride=1, padding=1, dilation=1, dilation_patch=1
+ class Correlation | kernel_size=1, max_displacement=1, stride=1, padding=0, dilation=1, dilation_patch=1 | input1, input2
[deform_conv]
- function DeformConv2dFunction | input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False, im2col_step=32
+ apply deform_conv2d | input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False, im2col_step=32
+ class DeformConv2d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False, im2col_step=32 | x, offset
+ class DeformConv2dPack < DeformConv2d @ DCN | *args, **kwargs | x
[deform_roi_pool]
- function DeformRoIPoolFunction | input, rois, offset, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1
+ apply deform_roi_pool | input, rois, offset, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1
+ class DeformRoIPool | output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1 | input, rois, offset=None
+ class DeformRoIPoolPack < DeformRoIPool | output_size, output_channels, deform_fc_channels=1024, spatial_scale=1.0, sampling_ratio=0, gamma=0.1 | input, rois
+ class ModulatedDeformRoIPoolPack < DeformRoIPool | output_size, output_channels, deform_fc_channels=1024, spatial_scale=1.0, sampling_ratio=0, gamma=0.1 | input, rois
[deprecated_wrappers]
- class Conv2d_deprecated < Conv2d | *args, **kwargs |  | torch
- class ConvTranspose2d_deprecated < ConvTranspose2d | *args, **kwargs |  | torch
- class Linear_deprecated < Linear | *args, **kwargs |  | torch
- class MaxPool2d_deprecated < MaxPool2d | *args, **kwargs |  | torch
+ class Conv2d < Conv2d | *args, **kwargs |  | torch
+ class ConvTranspose2d < ConvTranspose2d | *args, **kwargs |  | torch
+ class Linear < Linear | *args, **kwargs |  | torch
+ class MaxPool2d < MaxPool2d | *args, **kwargs |  | torch
[diff_iou_rotated]
- function SortVertices | vertices, mask, num_valid |  | torch
- def box_intersection | corners1, corners2 |  | torch
- def box1_in_box2 | corners1, corners2 |  | torch
- def box_in_box | corners1, corners2 |  | torch
- def build_vertices | corners1, corners2, c1_in_2, c2_in_1, intersections, valid_mask |  | torch
- def sort_indices | vertices, mask |  | torch
- def calculate_area | idx_sorted, vertices |  | torch
- def oriented_box_intersection_2d | corners1, corners2 |  | torch
- def box2corners | box |  | torch
+ def diff_iou_rotated_2d | box1, box2 |  | diff_iou_rotated_2d
+ def diff_iou_rotated_3d | box3d1, box3d2 |  | diff_iou_rotated_3d
[filtered_lrelu]
+ def filtered_lrelu | input, filter_up=None, filter_down=None, bias=None, up=1, down=1, padding=0, gain=2**0.5, slope=0.2, clamp=None, flip_filter=False, use_custom_op=True
[focal_loss]
- function SigmoidFocalLossFunction | input, target, gamma=2.0, alpha=0.25, weight=None, reduction="mean" |  | sigmoid_focal_loss
+ apply sigmoid_focal_loss | input, target, gamma=2.0, alpha=0.25, weight=None, reduction="mean" |  | sigmoid_focal_loss
+ class SigmoidFocalLoss | gamma, alpha, weight=None, reduction="mean" | input, target | sigmoid_focal_loss
- function SoftmaxFocalLossFunction | input, target, gamma=2.0, alpha=0.25, weight=None, reduction="mean" |  | softmax_focal_loss
+ apply softmax_focal_loss | input, target, gamma=2.0, alpha=0.25, weight=None, reduction="mean" |  | softmax_focal_loss
+ class SoftmaxFocalLoss | gamma, alpha, weight=None, reduction="mean" | input, target | softmax_focal_loss
[furthest_point_sample]
- function FurthestPointSampling | points_xyz, num_points
- function FurthestPointSamplingWithDist | points_dist, num_points
+ apply furthest_point_sample | points_xyz, num_points
+ apply furthest_point_sample_with_dist | points_dist, num_points
[fused_bias_leakyrelu]
+ def fused_bias_leakyrelu | input, bias, negative_slope=0.2, scale=2**0.5
+ class FusedBiasLeakyReLU | num_channels, negative_slope=0.2, scale=2**0.5 | input
- function FusedBiasLeakyReLUFunction | input, bias, negative_slope, scale
[gather_points]
- function GatherPoints | features, indices
+ apply gather_points | features, indices
[group_points]
+ class QueryAndGroup | max_radius, sample_num, min_radius=0.0, use_xyz=True, return_grouped_xyz=False, normalize_xyz=False, uniform_sample=False, return_unique_cnt=False, return_grouped_idx=False | points_xyz, center_xyz, features=None
+ class GroupAll | use_xyz=True | xyz, new_xyz, features=None
- function GroupingOperation | features, indices, features_batch_cnt=None, indices_batch_cnt=None
+ apply grouping_operation | features, indices, features_batch_cnt=None, indices_batch_cnt=None
[info]
+ def get_compiler_version |  |  | torch
+ def get_compiling_cuda_version |  |  | torch
[iou3d]
+ def boxes_overlap_bev | boxes_a, boxes_b |  | boxes_overlap_bev
+ def boxes_iou3d | boxes_a, boxes_b |  | boxes_iou3d
+ def nms3d | boxes, scores, iou_threshold |  | nms3d
+ def nms3d_normal | boxes, scores, iou_threshold |  | nms3d_normal
+ def boxes_iou_bev | boxes_a, boxes_b |  | boxes_iou_bev
+ def nms_bev | boxes, scores, thresh, pre_max_size=None, post_max_size=None |  | nms_bev
+ def nms_normal_bev | boxes, scores, thresh |  | nms_normal_bev
[knn]
- function KNN | k, xyz, center_xyz=None, transposed=False
+ apply knn | k, xyz, center_xyz=None, transposed=False
[line_nms]
* def line_nms | boxes, scores, overlap, top_k |  | torch
[masked_conv]
- function MaskedConv2dFunction | features, mask, weight, bias, padding=0, stride=1
+ apply masked_conv2d | features, mask, weight, bias, padding=0, stride=1
+ class MaskedConv2d < Conv2d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True | input, mask=None
[merge_cells]
- class BaseMergeCell | fused_channels=256, out_channels=256, with_out_conv=True, out_conv_cfg=dict(groups=1, kernel_size=3, padding=1, bias=True), out_norm_cfg=None, out_conv_order=("act", "conv", "norm"), with_input1_conv=False, with_input2_conv=False, input_conv_cfg=None, input_norm_cfg=None, upsample_mode="nearest" | x1, x2, out_size=None
- class SumCell < BaseMergeCell | in_channels, out_channels, **kwargs
- class ConcatCell < BaseMergeCell | in_channels, out_channels, **kwargs
- class GlobalPoolingCell < BaseMergeCell | in_channels=None, out_channels=None, **kwargs
[min_area_polygons]
+ def min_area_polygons | pointsets |  | min_area_polygons
[modulated_deform_conv]
- function ModulatedDeformConv2dFunction | input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1
+ apply modulated_deform_conv2d | input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1
+ class ModulatedDeformConv2d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=True | x, offset, mask
+ class ModulatedDeformConv2dPack < ModulatedDeformConv2d @ DCNv2 | *args, **kwargs | x
[multi_scale_deform_attn]
- function MultiScaleDeformableAttnFunction | value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step |  | multi_scale_deformable_attention
- def multi_scale_deformable_attn_pytorch | value, value_spatial_shapes, sampling_locations, attention_weights |  | torch
+ class MultiScaleDeformableAttention @ MultiScaleDeformableAttention | embed_dims=256, num_heads=8, num_levels=4, num_points=4, im2col_step=64, dropout=0.1, batch_first=False, norm_cfg=None, init_cfg=None, value_proj_ratio=1.0 | query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None, reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs | multi_scale_deformable_attention
[nms]
- function NMSop | bboxes, scores, iou_threshold, offset, score_threshold, max_num |  | nms
- function SoftNMSop | boxes, scores, iou_threshold, sigma, min_score, method, offset |  | soft_nms
+ def nms | boxes, scores, iou_threshold, offset=0, score_threshold=0, max_num=-1 |  | nms
+ def soft_nms | boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=0.001, method="linear", offset=0 |  | soft_nms
+ def batched_nms | boxes, scores, idxs, nms_cfg, class_agnostic=False |  | nms
+ def nms_match | dets, iou_threshold |  | box_iou
+ def nms_rotated | dets, scores, iou_threshold, labels=None, clockwise=True |  | nms_rotated
+ def nms_quadri | dets, scores, iou_threshold, labels=None |  | nms_quadri
[pixel_group]
+ def pixel_group | score, mask, embedding, kernel_label, kernel_contour, kernel_region_num, distance_threshold |  | pixel_group
[point_sample]
- def bilinear_grid_sample | im, grid, align_corners=False |  | torch
- def normalize | grid |  | torch
- def denormalize | grid |  | torch
- def generate_grid | num_grid, size, device |  | generate_grid
- def rel_roi_point_to_abs_img_point | rois, rel_roi_points |  | rel_roi_point_to_abs_img_point
- def get_shape_from_feature_map | x |  | torch
- def abs_img_point_to_rel_img_point | abs_img_points, img, spatial_scale=1.0 |  | abs_img_point_to_rel_img_point
+ def rel_roi_point_to_rel_img_point | rois, rel_roi_points, img, spatial_scale=1.0 |  | rel_roi_point_to_rel_img_point
+ def point_sample | input, points, align_corners=False, **kwargs |  | torch
+ class SimpleRoIAlign | output_size, spatial_scale, aligned=True | features, rois | point_sample
[points_in_boxes]
+ def points_in_boxes_part | points, boxes
+ def points_in_boxes_cpu | points, boxes
+ def points_in_boxes_all | points, boxes
[points_in_polygons]
+ def points_in_polygons | points, polygons |  | points_in_polygons
[points_sampler]
- def calc_square_dist | point_feat_a, point_feat_b, norm=True
- def get_sampler_cls | sampler_type
+ class PointsSampler | num_point, fps_mod_list=["D-FPS"], fps_sample_range_list=[-1] | points_xyz, features
- class DFPSSampler |  | points, features, npoint
- class FFPSSampler |  | points, features, npoint
- class FSSampler |  | points, features, npoint
[prroi_pool]
- function PrRoIPoolFunction | features, rois, output_size, spatial_scale=1.0 |  | prroi_pool
+ apply prroi_pool | features, rois, output_size, spatial_scale=1.0 |  | prroi_pool
+ class PrRoIPool | output_size, spatial_scale=1.0 | features, rois | prroi_pool
[psa_mask]
- function PSAMaskFunction | input, psa_type, mask_size
- apply psa_mask | input, psa_type, mask_size
+ class PSAMask | psa_type, mask_size=None | input
[riroi_align_rotated]
- function RiRoIAlignRotatedFunction | features, rois, out_size, spatial_scale, num_samples=0, num_orientations=8, clockwise=False |  | riroi_align_rotated
+ apply riroi_align_rotated | features, rois, out_size, spatial_scale, num_samples=0, num_orientations=8, clockwise=False |  | riroi_align_rotated
+ class RiRoIAlignRotated | out_size, spatial_scale, num_samples=0, num_orientations=8, clockwise=False | features, rois | riroi_align_rotated
[roi_align]
- function RoIAlignFunction | input, rois, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True |  | roi_align
+ apply roi_align | input, rois, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True |  | roi_align
+ class RoIAlign | output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True, use_torchvision=False | input, rois | roi_align
[roi_align_rotated]
- function RoIAlignRotatedFunction | input, rois, output_size, spatial_scale, sampling_ratio=0, aligned=True, clockwise=False |  | roi_align_rotated
+ apply roi_align_rotated | input, rois, output_size, spatial_scale, sampling_ratio=0, aligned=True, clockwise=False |  | roi_align_rotated
+ class RoIAlignRotated | output_size, spatial_scale, sampling_ratio=0, aligned=True, clockwise=False | input, rois | roi_align_rotated
[roi_pool]
- function RoIPoolFunction | input, rois, output_size, spatial_scale=1.0 |  | roi_pool
+ apply roi_pool | input, rois, output_size, spatial_scale=1.0 |  | roi_pool
+ class RoIPool | output_size, spatial_scale=1.0 | input, rois | roi_pool
[roiaware_pool3d]
+ class RoIAwarePool3d | out_size, max_pts_per_voxel=128, mode="max" | rois, pts, pts_feature
- function RoIAwarePool3dFunction | rois, pts, pts_feature, out_size, max_pts_per_voxel, mode
[roipoint_pool3d]
+ class RoIPointPool3d | num_sampled_points=512 | points, point_features, boxes3d
- function RoIPointPool3dFunction | points, point_features, boxes3d, num_sampled_points=512
[rotated_feature_align]
- function RotatedFeatureAlignFunction | features, best_rbboxes, spatial_scale, points |  | rotated_feature_align
+ def rotated_feature_align | features, best_rbboxes, spatial_scale=1 / 8, points=1 |  | rotated_feature_align
[saconv]
+ class SAConv2d < Conv2d @ SAC | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, use_deform=False | x
[scatter_points]
- function _DynamicScatter | feats, coors, reduce_type="max"
+ apply dynamic_scatter | feats, coors, reduce_type="max"
+ class DynamicScatter | voxel_size, point_cloud_range, average_points | points, coors
[sparse_conv]
- class SparseConvolution < SparseModule | ndim, in_channels, out_channels, kernel_size=3, stride=1, padding=0, dilation=1, groups=1, bias=True, subm=False, output_padding=0, transposed=False, inverse=False, indice_key=None, fused_bn=False | input
+ class SparseConv2d < SparseConvolution @ SparseConv2d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
+ class SparseConv3d < SparseConvolution @ SparseConv3d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
- class SparseConv4d < SparseConvolution @ SparseConv4d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
+ class SparseConvTranspose2d < SparseConvolution @ SparseConvTranspose2d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
+ class SparseConvTranspose3d < SparseConvolution @ SparseConvTranspose3d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
+ class SparseInverseConv2d < SparseConvolution @ SparseInverseConv2d | in_channels, out_channels, kernel_size, indice_key=None, bias=True
+ class SparseInverseConv3d < SparseConvolution @ SparseInverseConv3d | in_channels, out_channels, kernel_size, indice_key=None, bias=True
+ class SubMConv2d < SparseConvolution @ SubMConv2d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
+ class SubMConv3d < SparseConvolution @ SubMConv3d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
- class SubMConv4d < SparseConvolution @ SubMConv4d | in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, indice_key=None
[sparse_functional]
- function SparseConvFunction | features, filters, indice_pairs, indice_pair_num, num_activate_out
- function SparseInverseConvFunction | features, filters, indice_pairs, indice_pair_num, num_activate_out
- function SubMConvFunction | features, filters, indice_pairs, indice_pair_num, num_activate_out
- function SparseMaxPoolFunction | features, indice_pairs, indice_pair_num, num_activate_out
- apply indice_conv | features, filters, indice_pairs, indice_pair_num, num_activate_out
- apply indice_inverse_conv | features, filters, indice_pairs, indice_pair_num, num_activate_out
- apply indice_subm_conv | features, filters, indice_pairs, indice_pair_num, num_activate_out
- apply indice_maxpool | features, indice_pairs, indice_pair_num, num_activate_out
[sparse_modules]
- def is_spconv_module | module
- def is_sparse_conv | module
+ class SparseModule
+ class SparseSequential < SparseModule | *args, **kwargs | input
- class ToDense < SparseModule |  | x
- class RemoveGrid < SparseModule |  | x
[sparse_ops]
- def get_conv_output_size | input_size, kernel_size, stride, padding, dilation
- def get_deconv_output_size | input_size, kernel_size, stride, padding, dilation, output_padding
- def get_indice_pairs | indices, batch_size, spatial_shape, ksize=3, stride=1, padding=0, dilation=1, out_padding=0, subm=False, transpose=False, grid=None
- def indice_conv | features, filters, indice_pairs, indice_pair_num, num_activate_out, inverse=False, subm=False
- def fused_indice_conv | features, filters, bias, indice_pairs, indice_pair_num, num_activate_out, inverse, subm
- def indice_conv_backward | features, filters, out_bp, indice_pairs, indice_pair_num, inverse=False, subm=False
- def indice_maxpool | features, indice_pairs, indice_pair_num, num_activate_out
- def indice_maxpool_backward | features, out_features, out_bp, indice_pairs, indice_pair_num
[sparse_pool]
- class SparseMaxPool < SparseModule | ndim, kernel_size, stride=1, padding=0, dilation=1, subm=False | input
+ class SparseMaxPool2d < SparseMaxPool | kernel_size, stride=1, padding=0, dilation=1
+ class SparseMaxPool3d < SparseMaxPool | kernel_size, stride=1, padding=0, dilation=1
[sparse_structure]
+ def scatter_nd | indices, updates, shape
+ class SparseConvTensor < object | features, indices, spatial_shape, batch_size, grid=None
[sync_bn]
- function SyncBatchNormFunction | input, running_mean, running_var, weight, bias, momentum, eps, group, group_size, stats_mode
+ class SyncBatchNorm @ MMSyncBN | num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, group=None, stats_mode="default" | input
[three_interpolate]
- function ThreeInterpolate | features, indices, weight
+ apply three_interpolate | features, indices, weight
[three_nn]
- function ThreeNN | target, source
+ apply three_nn | target, source
[tin_shift]
- function TINShiftFunction | input, shift
+ apply tin_shift | input, shift
+ class TINShift |  | input, shift
[upfirdn2d]
+ def upfirdn2d | input, filter, up=1, down=1, padding=0, flip_filter=False, gain=1, use_custom_op=True
+ def filter2d | input, filter, padding=0, flip_filter=False, gain=1, use_custom_op=True
+ def upsample2d | input, filter, up=2, padding=0, flip_filter=False, gain=1, use_custom_op=True
- def downsample2d | input, filter, down=2, padding=0, flip_filter=False, gain=1, use_custom_op=True
[voxelize]
- function _Voxelization | points, voxel_size, coors_range, max_points=35, max_voxels=20000, deterministic=True
+ apply voxelization | points, voxel_size, coors_range, max_points=35, max_voxels=20000, deterministic=True
+ class Voxelization | voxel_size, point_cloud_range, max_num_points, max_voxels=20000, deterministic=True | input
"""  # noqa: E501

# Rows by module and name.
MODULES = _read(_TABLE)


@functools.cache
def public() -> dict[str, Name]:
    """The names that `mmcv.ops` itself exports, as its `__all__` has them."""
    rows = [row for module in MODULES.values() for row in module.values() if row.public]
    return {row.name: row for row in rows}


@functools.cache
def of_fork() -> dict[str, Name]:
    """The names that only the `mmcv.ops` of onedl-mmcv exports."""
    rows = [row for module in MODULES.values() for row in module.values() if row.of_fork]
    return {row.name: row for row in rows}


def registered() -> list[Name]:
    """The classes that configurations find in mmengine's registry MODELS."""
    return [row for module in MODULES.values() for row in module.values() if row.registry]
