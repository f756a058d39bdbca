"""Which points lie in which quadrilaterals."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.ops._arguments import require_floating, require_pair, shape, widened

__all__ = ["points_in_polygons"]


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

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Note:
        Computed in float32 for the half types. A point on an edge that two quadrilaterals share is
        in exactly one of them. What has a coordinate that is not finite is in nothing, and
        contains nothing. mmcv gives numbers: `.float()` does, too.

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
    require_floating("points_in_polygons", points=points, polygons=polygons)
    for name, value, columns in (("points", points, 2), ("polygons", polygons, 8)):
        if value.dim() != 2 or value.shape[1] != columns:
            raise ValueError(
                f"points_in_polygons: {name} must have shape (N, {columns}); got {shape(value)}"
            )
    require_pair("points_in_polygons", points=points, polygons=polygons)
    corners = widened(polygons).unflatten(1, (4, 2))
    px, py = widened(points)[:, None].unbind(-1)
    is_finite: Tensor = px.isfinite() & py.isfinite() & corners.isfinite().all(-1).all(-1)
    inside = torch.zeros_like(is_finite)
    for i in range(4):
        start, end = corners[:, i - 1], corners[:, i]
        # From the lower end to the upper one: both polygons of a shared edge compute the same.
        swap = (start[:, 1] > end[:, 1])[:, None]
        (x1, y1), (x2, y2) = (
            torch.where(swap, a, b).unbind(1) for a, b in ((end, start), (start, end))
        )
        is_left = (x2 - x1) * (py - y1) > (px - x1) * (y2 - y1)
        inside = inside ^ ((y1 <= py) & (py < y2) & is_left)
    result: Tensor = inside & is_finite
    return result
