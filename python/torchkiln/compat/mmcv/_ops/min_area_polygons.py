"""`mmcv.ops.min_area_polygons`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import listed_errors

__all__ = ["min_area_polygons"]


@listed_errors
def min_area_polygons(pointsets: Tensor) -> Tensor:
    """`torchkiln.ops.min_area_polygons`: (N, 8) of pointsets (N, 18); unknown to autograd."""
    return ops.min_area_polygons(pointsets.detach())
