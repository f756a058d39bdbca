"""`mmcv.ops.points_in_polygons`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln import ops

__all__ = ["points_in_polygons"]


def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    """`torchkiln.ops.points_in_polygons` as numbers.

    Args:
        points: (P, 2).
        polygons: (M, 8).

    Returns:
        (P, M) float32 of 0 and 1.

    Raises:
        AssertionError: for other last dimensions.
    """
    assert points.size(1) == 2, f"points dimension should be 2, got {points.size(1)}"
    assert polygons.size(1) == 8, f"polygons dimension should be 8, got {polygons.size(1)}"
    return ops.points_in_polygons(points, polygons).to(torch.float32)
