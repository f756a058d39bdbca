"""Rectangles of least area around points."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator

__all__ = ["min_area_polygons"]


def _fake(pointsets: Tensor) -> Tensor:
    return pointsets.new_empty((pointsets.shape[0], 8))


# float32: a coordinate of 2000 has no fraction left in float16.
_min_area_polygons = operator("min_area_polygons", fake=_fake, autocast=torch.float32)


def min_area_polygons(pointsets: Tensor) -> Tensor:
    """The rectangle of least area around nine points, for each row.

    Args:
        pointsets: (N, 18), float16, bfloat16, float32 or float64; x, y of nine points in any unit.

    Returns:
        (N, 8), dtype of `pointsets`; x, y of four corners. In the frame of the rectangle, whose
        first axis is turned by 0 to below 90 degrees from x towards y: (high, low), (low, low),
        (low, high), (high, high).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float64. Of several rectangles of the least area it is the one on the first side
        of the convex hull, counter-clockwise (where y points up) from the lowest point. Points on a
        line, or all equal, give a rectangle of area 0. A coordinate that is not finite gives NaN.

    Source:
        Freeman and Shapira, "Determining the minimum-area encasing rectangle for an arbitrary
        closed curve", 1975.

    Example:
        >>> import torch
        >>> from torchkiln.ops import min_area_polygons
        >>> corners = torch.tensor([0.0, 0, 4, 0, 4, 2, 0, 2])
        >>> min_area_polygons(torch.cat([corners, torch.ones(10)])[None])
        tensor([[4., 0., 0., 0., 0., 2., 4., 2.]])
    """
    return _min_area_polygons(pointsets)
