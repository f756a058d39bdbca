"""points_in_polygons in plain Python: crossings of a ray, in exact fractions."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["points_in_polygons"]


def _is_inside(point: Sequence[float], polygon: Sequence[float]) -> bool:
    if not all(map(math.isfinite, [*point, *polygon])):
        return False
    px, py, *corners = map(Fraction, [*point, *polygon])
    crossings = 0
    for i in range(0, 8, 2):
        (x1, y1), (x2, y2) = corners[i - 2 : i or None], corners[i : i + 2]
        if (y1 <= py) != (y2 <= py):
            crossings += x1 + (py - y1) * (x2 - x1) / (y2 - y1) > px
    return crossings % 2 == 1


def _is_inside_as_mmcv(point: Sequence[float], polygon: Sequence[float]) -> bool:
    if not all(map(math.isfinite, [*point, *polygon])):
        return False
    px, py, *corners = map(Fraction, [*point, *polygon])
    is_inside = False
    for i in range(0, 8, 2):
        (x1, y1), (x2, y2) = corners[i - 2 : i or None], corners[i : i + 2]
        if (px, py) in ((x1, y1), (x2, y2)):
            break
        if (y1 < py) != (y2 < py):
            x = x1 + (py - y1) * (x2 - x1) / (y2 - y1)
            if x == px:
                break
            is_inside ^= x > px
    return is_inside


def points_in_polygons(points: Tensor, polygons: Tensor, as_mmcv: bool = False) -> Tensor:
    """Tells for every point and quadrilateral whether one lies in the other.

    Args:
        points: (P, 2).
        polygons: (M, 8).
        as_mmcv: a point on the outline is where the sides before that one put it.

    Returns:
        (P, M) bool, or numbers with `as_mmcv`.
    """
    rule, dtype = (_is_inside_as_mmcv, torch.float32) if as_mmcv else (_is_inside, torch.bool)
    outlines = polygons.tolist()
    rows = [[rule(point, outline) for outline in outlines] for point in points.tolist()]
    result = torch.tensor(rows, dtype=dtype, device=points.device)
    return result.reshape(points.shape[0], polygons.shape[0])


def parity() -> Parity:
    """What points_in_polygons is tried on."""
    return Parity(
        op="points_in_polygons",
        tier="X",
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_problem, 33, 9)),
            Case("grid", _grid),
            Case("single", functools.partial(_problem, 1, 1)),
            Case("no_points", functools.partial(_problem, 0, 3)),
            Case("no_polygons", functools.partial(_problem, 3, 0)),
            Case("not_finite", _not_finite),
            # A whole number of vectors of polygons, and more points than threads of a block.
            Case("vectors", functools.partial(_problem, 300, 12)),
        ),
        workloads=(
            # Points of a dense detector on an image of 1024 x 1024, and its objects.
            Workload("dense", {"points": 21_824, "polygons": 100}, _scene),
        ),
    )


def _problem(points: int, polygons: int, new: Inputs) -> dict[str, Tensor]:
    """Corners in any order: convex, concave and crossed outlines."""
    return {"points": new.uniform(points, 2, high=9), "polygons": new.uniform(polygons, 8, high=9)}


def _grid(new: Inputs) -> dict[str, Tensor]:
    """Small integers: points on edges and corners, outlines without an area."""
    points, polygons = new.integers(40, 2, high=5), new.integers(20, 8, high=5)
    return {"points": points.double(), "polygons": polygons.double()}


def _not_finite(new: Inputs) -> dict[str, Tensor]:
    problem = _problem(9, 5, new)
    problem["points"][0, 0], problem["points"][1, 1] = math.nan, math.inf
    problem["polygons"][0, 3], problem["polygons"][1, 6] = -math.inf, math.nan
    return problem


def _scene(sizes: Sizes) -> dict[str, Tensor]:
    extent = torch.tensor([1024.0, 1024.0])
    points = torch.rand(sizes["points"], 2, generator=scenes.generator(scenes.SEED)) * extent
    boxes = scenes.uniform_boxes(sizes["polygons"], scenes.SEED, 16, 256, (1024.0, 1024.0))
    return {"points": points, "polygons": boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]}


def _fuzz(draw: Draw) -> dict[str, Tensor]:
    return {"points": draw.values(draw.size(), 2), "polygons": draw.values(draw.size(8), 8)}
