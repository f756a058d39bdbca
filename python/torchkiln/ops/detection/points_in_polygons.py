"""Which points lie in which quadrilaterals."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator

__all__ = ["points_in_polygons"]


def _fake(points: Tensor, polygons: Tensor, as_mmcv: bool = False) -> Tensor:
    dtype = torch.float32 if as_mmcv else torch.bool
    return points.new_empty((points.shape[0], polygons.shape[0]), dtype=dtype)


# float32: a coordinate of 2000 has no fraction left in float16.
_points_in_polygons = operator("points_in_polygons", fake=_fake, autocast=torch.float32)


def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    """Tells for every point and quadrilateral whether one lies in the other.

    A point is inside where a ray from it crosses the outline an odd number of times (even-odd
    rule), so that concave and crossed outlines are allowed.

    Args:
        points: (P, 2), float16, bfloat16, float32 or float64; x, y in any unit.
        polygons: (M, 8), dtype and device of `points`; x, y of four corners, either way around.

    Returns:
        (P, M), bool.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 for the half types. A point on an edge that two quadrilaterals share is
        in exactly one of them. What has a coordinate that is not finite is in nothing, and
        contains nothing.

    Source:
        Shimrat, "Algorithm 112: Position of point relative to polygon", 1962.

    Example:
        >>> import torch
        >>> from torchkiln.ops import points_in_polygons
        >>> square = torch.tensor([[0.0, 0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 2.0]])
        >>> points_in_polygons(torch.tensor([[1.0, 1.0], [3.0, 1.0]]), square)
        tensor([[ True],
                [False]])
    """
    return _points_in_polygons(points, polygons, False)
