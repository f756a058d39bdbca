"""Operators for boxes: overlap, suppression, pooling of regions, losses."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.ops.detection.batched_nms import *  # noqa: F403
from torchkiln.ops.detection.bezier_align import *  # noqa: F403
from torchkiln.ops.detection.border_align import *  # noqa: F403
from torchkiln.ops.detection.box_area import *  # noqa: F403
from torchkiln.ops.detection.box_convert import *  # noqa: F403
from torchkiln.ops.detection.box_iou import *  # noqa: F403
from torchkiln.ops.detection.box_iou_rotated import *  # noqa: F403
from torchkiln.ops.detection.box_losses import *  # noqa: F403
from torchkiln.ops.detection.clip_boxes_to_image import *  # noqa: F403
from torchkiln.ops.detection.contour_expand import *  # noqa: F403
from torchkiln.ops.detection.convex_iou import *  # noqa: F403
from torchkiln.ops.detection.corner_pool import *  # noqa: F403
from torchkiln.ops.detection.diff_iou_rotated import *  # noqa: F403
from torchkiln.ops.detection.line_nms import *  # noqa: F403
from torchkiln.ops.detection.masks_to_boxes import *  # noqa: F403
from torchkiln.ops.detection.min_area_polygons import *  # noqa: F403
from torchkiln.ops.detection.multi_scale_roi_align import *  # noqa: F403
from torchkiln.ops.detection.nms import *  # noqa: F403
from torchkiln.ops.detection.nms3d import *  # noqa: F403
from torchkiln.ops.detection.nms_bev import *  # noqa: F403
from torchkiln.ops.detection.nms_match import *  # noqa: F403
from torchkiln.ops.detection.nms_rotated import *  # noqa: F403
from torchkiln.ops.detection.pixel_group import *  # noqa: F403
from torchkiln.ops.detection.point_sample import *  # noqa: F403
from torchkiln.ops.detection.points_in_polygons import *  # noqa: F403
from torchkiln.ops.detection.prroi_pool import *  # noqa: F403
from torchkiln.ops.detection.ps_roi_pool import *  # noqa: F403
from torchkiln.ops.detection.remove_small_boxes import *  # noqa: F403
from torchkiln.ops.detection.riroi_align_rotated import *  # noqa: F403
from torchkiln.ops.detection.roi_align import *  # noqa: F403
from torchkiln.ops.detection.roi_align_rotated import *  # noqa: F403
from torchkiln.ops.detection.roi_pool import *  # noqa: F403
from torchkiln.ops.detection.rotated_feature_align import *  # noqa: F403
from torchkiln.ops.detection.sigmoid_focal_loss import *  # noqa: F403
from torchkiln.ops.detection.soft_nms import *  # noqa: F403
from torchkiln.ops.detection.softmax_focal_loss import *  # noqa: F403
