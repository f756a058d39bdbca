"""`mmcv.ops.prroi_pool`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors, pair

__all__ = ["PrRoIPool", "PrRoIPoolFunction", "prroi_pool"]


@listed_errors
def prroi_pool(
    features: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """`torchkiln.ops.prroi_pool`, which is mmcv's for every dtype and on the CPU too."""
    return ops.prroi_pool(features, rois, pair(output_size), spatial_scale)


PrRoIPoolFunction = function_class("PrRoIPoolFunction", prroi_pool)


class PrRoIPool(nn.Module):
    """`prroi_pool` as a module."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> None:
        super().__init__()
        self.output_size = pair(output_size)
        self.spatial_scale = float(spatial_scale)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C, height, width) for regions `rois` of `features`."""
        return prroi_pool(features, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        """The settings."""
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
