"""`mmcv.ops.roi_pool`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors, pair

__all__ = ["RoIPool", "RoIPoolFunction", "roi_pool"]


@listed_errors
def roi_pool(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """`torchkiln.ops.roi_pool` with mmcv's rule: corners are not rounded.

    Raises:
        AssertionError: for rois that are not (K, 5).
    """
    assert rois.size(1) == 5, "RoI must be (idx, x1, y1, x2, y2)!"
    return ops.roi_pool(input, rois, pair(output_size), spatial_scale, rounding=False)


RoIPoolFunction = function_class("RoIPoolFunction", roi_pool)


class RoIPool(nn.Module):
    """`roi_pool` as a module."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> None:
        super().__init__()
        self.output_size = pair(output_size)
        self.spatial_scale = float(spatial_scale)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C, height, width) for regions `rois` of `input`."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        """The settings."""
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
