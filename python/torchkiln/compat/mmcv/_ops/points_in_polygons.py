"""`mmcv.ops.points_in_polygons`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln import ops

__all__ = ["points_in_polygons"]


def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    """`torchkiln.ops.points_in_polygons` as numbers.

    Args:
        points: (P, 2), floating.
        polygons: (M, 8), floating.

    Returns:
        (P, M), float32; 1 inside and 0 outside.

    Raises:
        AssertionError: for another shape.
    """
    assert points.shape[1] == 2, "points dimension should be 2"
    assert polygons.shape[1] == 8, "polygons dimension should be 8"
    return ops.points_in_polygons(points, polygons.to(points)).float()
