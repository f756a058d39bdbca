"""min_area_polygons in plain PyTorch: every direction of a side of the hull is tried.

Source: Freeman and Shapira, "Determining the minimum-area encasing rectangle for an arbitrary
closed curve", 1975.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from torchkiln.reference.detection.convex_iou import _pointsets, hull_of
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["min_area_polygons"]


def _angles(points: list[list[float]]) -> list[float]:
    """Of the sides of the hull, from 0 to below a right angle, from the lowest corner on."""
    hull = hull_of(points)
    lowest = min(range(len(hull)), key=lambda i: (points[hull[i]][1], points[hull[i]][0]))
    hull = hull[lowest:] + hull[:lowest]
    pairs = zip(hull, hull[1:] + hull[:1], strict=True)
    sides = [[q - p for p, q in zip(points[i], points[j], strict=True)] for i, j in pairs]
    # atan2 of both coordinates' sizes; a side that rises to the left is turned by a right angle.
    return [
        math.atan2(abs(y), abs(x)) if x * y > 0 or y == 0 else math.atan2(abs(x), abs(y))
        for x, y in sides
    ]


def _rectangle(row: Tensor) -> Tensor:
    if not bool(row.isfinite().all()):
        return row.new_full((8,), math.nan)
    points = row.double().reshape(9, 2)
    best, least = points[0].tile(4), math.inf
    for angle in _angles(points.tolist()):
        c, s = math.cos(angle), math.sin(angle)
        turn = points.new_tensor([[c, -s], [s, c]])
        turned = points @ turn
        low, high = turned.amin(0), turned.amax(0)
        area = float((high - low).prod())
        if area < least * (1 - 1e-12):
            x, y = (low[0], high[0]), (low[1], high[1])
            corners = [(x[1], y[0]), (x[0], y[0]), (x[0], y[1]), (x[1], y[1])]
            best, least = torch.tensor(corners, dtype=torch.float64) @ turn.cpu().T, area
    return best.flatten().to(row)


def min_area_polygons(pointsets: Tensor) -> Tensor:
    """The rectangles of least area around nine points each.

    Args:
        pointsets: (N, 18).

    Returns:
        (N, 8): in the frame of the rectangle, whose first axis has an angle from 0 to below a right
        angle, the corners (high, low), (low, low), (low, high), (high, high).
    """
    rows = [_rectangle(row) for row in pointsets.unbind()]
    return torch.stack(rows) if rows else pointsets.new_zeros((0, 8))


def parity() -> Parity:
    """What min_area_polygons is tried on."""
    return Parity(
        op="min_area_polygons",
        tier="A",
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_rows, 65)),
            Case("far_from_origin", functools.partial(_rows, 9, offset=2000.0)),
            Case("turned_squares", _squares),
            # All three sides give the same area.
            Case("triangle", _triangle),
            Case("degenerate", _degenerate),
            Case("single", functools.partial(_rows, 1)),
            Case("empty", functools.partial(_rows, 0)),
            Case("not_finite", _not_finite),
        ),
        workloads=(
            # Points of a dense detector on an image of 1024 x 1024.
            Workload("dense", {"n": 21_824}, _scene),
        ),
    )


def _rows(count: int, new: Inputs, offset: float = 0.0) -> dict[str, Tensor]:
    return {"pointsets": _pointsets(new, count) + offset}


def _squares(new: Inputs) -> dict[str, Tensor]:
    """The corners of rectangles along the axes, some twice, and points on their sides."""
    corners = torch.tensor(
        [[0.0, 0], [6, 0], [6, 3], [0, 3], [6, 3], [0, 0], [3, 0], [6, 1], [2, 2]]
    )
    variants = [corners, corners.roll(4, 0), corners.flip(1), corners - 7]
    return {"pointsets": torch.stack(variants).double().flatten(1)}


def _triangle(new: Inputs) -> dict[str, Tensor]:
    corners = torch.tensor([[0.0, 0], [7, 1], [3, 6]], dtype=torch.float64)
    return {"pointsets": torch.stack([corners.roll(i, 0).tile(3, 1).flatten() for i in range(3)])}


def _degenerate(new: Inputs) -> dict[str, Tensor]:
    """A point, a line that rises, one that falls, lines along the axes."""
    step = torch.arange(9.0)
    rows = [(0, 0), (1, 2), (2, -1), (1, 0), (0, 1)]
    lines = [torch.stack([3 + a * step, 5 + b * step], 1).flatten() for a, b in rows]
    return {"pointsets": torch.stack(lines).double()}


def _not_finite(new: Inputs) -> dict[str, Tensor]:
    points = _pointsets(new, 4)
    points[0, 0], points[1, 3], points[2, 17] = math.nan, math.inf, math.nan
    return {"pointsets": points}


def _scene(sizes: Sizes) -> dict[str, Tensor]:
    boxes = scenes.uniform_boxes(sizes["n"], scenes.SEED, 16, 256, (1024.0, 1024.0))
    share = torch.rand(sizes["n"], 9, 2, generator=scenes.generator(scenes.SEED))
    points = boxes[:, None, :2] + share * (boxes[:, 2:] - boxes[:, :2])[:, None]
    return {"pointsets": points.flatten(1)}


def _fuzz(draw: Draw) -> dict[str, Tensor]:
    return {"pointsets": draw.values(draw.size(20), 18) * 20}
