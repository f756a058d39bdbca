"""`mmcv.ops.point_sample`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchkiln import nn, ops
from torchkiln.compat.mmcv._common import pair
from torchkiln.ops._arguments import widened

__all__ = [
    "SimpleRoIAlign",
    "abs_img_point_to_rel_img_point",
    "bilinear_grid_sample",
    "denormalize",
    "generate_grid",
    "get_shape_from_feature_map",
    "normalize",
    "point_sample",
    "rel_roi_point_to_abs_img_point",
    "rel_roi_point_to_rel_img_point",
]


def bilinear_grid_sample(im: Tensor, grid: Tensor, align_corners: bool = False) -> Tensor:
    """`torch.nn.functional.grid_sample`, bilinear and with zeros around the image.

    Args:
        im: (N, C, H, W), floating.
        grid: (N, H', W', 2), dtype of `im`; x, y from -1 to 1.
        align_corners: whether -1 and 1 are the centres of the outer cells, else their edges.

    Returns:
        (N, C, H', W').
    """
    return functional.grid_sample(
        im, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners
    )


def normalize(grid: Tensor) -> Tensor:
    """From -1 to 1 becomes from 0 to 1."""
    return (grid + 1.0) / 2.0


def denormalize(grid: Tensor) -> Tensor:
    """From 0 to 1 becomes from -1 to 1."""
    return grid * 2.0 - 1.0


def generate_grid(num_grid: int, size: tuple[int, int], device: Any) -> Tensor:
    """`torchkiln.ops.generate_grid`."""
    return ops.generate_grid(num_grid, size, device)


@torch.no_grad()
def rel_roi_point_to_abs_img_point(rois: Tensor, rel_roi_points: Tensor) -> Tensor:
    """`torchkiln.ops.rel_roi_point_to_abs_img_point` without a gradient, as in mmcv."""
    assert rel_roi_points.dim() == 3, "rel_roi_points must be (N, P, 2)"
    assert rois.size(1) in (4, 5), "rois must be (N, 4) or (N, 5)"
    return ops.rel_roi_point_to_abs_img_point(rois, rel_roi_points.to(rois))


def get_shape_from_feature_map(x: Tensor) -> Tensor:
    """Width and height of maps (N, C, H, W): (1, 1, 2), float32."""
    height, width = x.shape[2:]
    return torch.tensor([[[width, height]]], dtype=torch.float32, device=x.device)


def abs_img_point_to_rel_img_point(
    abs_img_points: Tensor, img: tuple[int, int] | Tensor, spatial_scale: float = 1.0
) -> Tensor:
    """`torchkiln.ops.abs_img_point_to_rel_img_point`."""
    is_size = isinstance(img, tuple) and len(img) == 2
    assert is_size or (isinstance(img, Tensor) and img.dim() == 4), "img must be a size or maps"
    return ops.abs_img_point_to_rel_img_point(abs_img_points, img, spatial_scale)


def rel_roi_point_to_rel_img_point(
    rois: Tensor,
    rel_roi_points: Tensor,
    img: tuple[int, int] | Tensor,
    spatial_scale: float = 1.0,
) -> Tensor:
    """`torchkiln.ops.rel_roi_point_to_rel_img_point` without a gradient, as in mmcv."""
    points = rel_roi_point_to_abs_img_point(rois, rel_roi_points)
    return abs_img_point_to_rel_img_point(points, img, spatial_scale)


def point_sample(
    input: Tensor, points: Tensor, align_corners: bool = False, **kwargs: Any
) -> Tensor:
    """`torch.nn.functional.grid_sample` at points from 0 to 1, whatever it makes of others.

    Args:
        input: (N, C, H, W), floating; the half types are computed in float32.
        points: (N, P, 2) or (N, H', W', 2), floating; x, y.
        align_corners: whether 0 and 1 are the centres of the outer cells, else their edges.
        kwargs: `mode` and `padding_mode`.

    Returns:
        (N, C, P) or (N, C, H', W'), dtype of `input`.
    """
    features = widened(input)
    grid = denormalize(points.to(features.dtype))
    is_list = points.dim() == 3
    result = functional.grid_sample(
        features, grid[:, :, None] if is_list else grid, align_corners=align_corners, **kwargs
    ).to(input.dtype)
    return result.squeeze(3) if is_list else result


class SimpleRoIAlign(nn.SimpleRoIAlign):
    """`torchkiln.nn.SimpleRoIAlign`, its rows ordered by image."""

    use_torchvision = False

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, aligned: bool = True
    ) -> None:
        super().__init__(pair(output_size), float(spatial_scale), aligned)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C, height, width): the regions of image 0 first, as mmcv has them."""
        return super().forward(features, rois[rois[:, 0].argsort(stable=True)])
