"""`mmcv.ops.points_in_polygons`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln.compat.mmcv._common import listed_errors
from torchkiln.ops.detection.points_in_polygons import _points_in_polygons

__all__ = ["points_in_polygons"]


@listed_errors
def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    """`torchkiln.ops.points_in_polygons` as numbers, on the outline as mmcv has them.

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
    return _points_in_polygons(points.detach(), polygons.detach(), True)
