"""convex_iou and convex_giou in plain PyTorch: one polygon clipped by the other, side by side.

Sources: Sutherland and Hodgman, "Reentrant polygon clipping", 1974; Andrew, "Another efficient
algorithm for convex hulls in two dimensions", 1979; Rezatofighi et al. 2019, algorithm 1.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.box_iou_rotated import corners
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["convex_giou", "convex_iou"]

# A number, or a tensor of one where gradients are wanted.
Point = Sequence[Any]


def _value(number: Any) -> float:
    return float(number.detach()) if isinstance(number, Tensor) else float(number)


def _turn(a: Point, b: Point, c: Point) -> Any:
    """Twice the area of a triangle; positive where it turns counter-clockwise."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def hull_of(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the corners of the convex hull, counter-clockwise; in exact arithmetic."""
    exact = [tuple(map(Fraction, point)) for point in points]
    order = sorted({point: i for i, point in reversed(list(enumerate(exact)))}.values())
    order.sort(key=lambda i: exact[i])
    if len(order) < 3:
        return order
    chains = []
    for direction in (order, order[::-1]):
        chain: list[int] = []
        for i in direction:
            while len(chain) > 1 and _turn(*(exact[k] for k in (*chain[-2:], i))) <= 0:
                chain.pop()
            chain.append(i)
        chains += chain[:-1]
    return chains


def _doubled_area(points: Sequence[Point]) -> Any:
    """Twice the area, negative where it turns clockwise; 0 for less than three points."""
    if len(points) < 3:
        return 0.0
    return sum(_turn(points[0], a, b) for a, b in itertools.pairwise(points[1:]))


def _clipped(subject: list[Point], clip: Sequence[Point]) -> list[Point]:
    """What of a polygon lies in a convex one."""
    for i in range(len(clip)):
        a, b = clip[i - 1], clip[i]
        heights = [_turn(a, b, point) for point in subject]
        inside = [_value(height) >= 0 for height in heights]
        result: list[Point] = []
        for k in range(len(subject)):
            (p, q), (h, g) = (subject[k - 1], subject[k]), (heights[k - 1], heights[k])
            if inside[k - 1] != inside[k]:
                share = h / (h - g)
                result.append((p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])))
            if inside[k]:
                result.append(q)
        subject = result
    return subject


def _areas(hull: Sequence[Point], polygon: Sequence[Point]) -> tuple[Any, Any]:
    """The area that both share, and that of what lies in either."""
    own, other = _doubled_area(hull) / 2, _doubled_area(polygon) / 2
    shared = 0.0 * own
    if len(hull) > 2:
        shared = _doubled_area(_clipped(list(polygon), hull)) / 2
        shared = shared if _value(other) >= 0 else -shared
    if _value(shared) < 0:
        shared = 0.0 * own
    return shared, own + abs(other) - shared


def _pairs(row: Any) -> list[Point]:
    return [(row[i], row[i + 1]) for i in range(0, len(row), 2)]


def _iou(points: Sequence[float], polygon: Sequence[float]) -> float:
    if not all(map(math.isfinite, [*points, *polygon])):
        return math.nan
    pairs = _pairs(points)
    shared, united = _areas([pairs[i] for i in hull_of(pairs)], _pairs(polygon))
    return float(shared / united) if united else 0.0


def convex_iou(pointsets: Tensor, polygons: Tensor) -> Tensor:
    """Intersection over union of the convex hulls of pointsets and quadrilaterals.

    Args:
        pointsets: (N, 18).
        polygons: (M, 8).

    Returns:
        (N, M).
    """
    outlines = polygons.tolist()
    rows = [[_iou(points, outline) for outline in outlines] for points in pointsets.tolist()]
    result = torch.tensor(rows, dtype=pointsets.dtype, device=pointsets.device)
    return result.reshape(pointsets.shape[0], polygons.shape[0])


def _giou(row: Tensor, polygon: Tensor) -> Tensor:
    """Of one row, differentiable."""
    if not bool(row.isfinite().all() & polygon.isfinite().all()):
        return row.sum() * math.nan
    points, outline = _pairs(row.unbind()), _pairs(polygon.unbind())
    fixed, corners = _pairs(row.tolist()), _pairs(polygon.tolist())
    both = points + outline
    hull = [points[i] for i in hull_of(fixed)]
    around = [both[i] for i in hull_of(fixed + corners)]
    shared, united = _areas(hull, outline)
    enclosing = _doubled_area(around) / 2 + 0.0 * row.sum()
    iou = shared / united if _value(united) else 0.0 * row.sum()
    return iou - ((enclosing - united) / enclosing if _value(enclosing) else 0.0 * row.sum())


def convex_giou(pointsets: Tensor, polygons: Tensor) -> tuple[Tensor, Tensor]:
    """Generalized IoU of convex hulls and quadrilaterals, row by row, and its gradient.

    Args:
        pointsets: (N, 18).
        polygons: (N, 8).

    Returns:
        (N,), and (N, 18): the gradient of each value with respect to its points.
    """
    if pointsets.shape[0] == 0:
        return pointsets.sum(1), pointsets.detach().clone()

    def values(points: Tensor) -> Tensor:
        pairs = zip(points.unbind(), polygons.detach().unbind(), strict=True)
        return torch.stack([_giou(row, polygon) for row, polygon in pairs])

    with torch.enable_grad():
        leaf = pointsets.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(values(leaf).sum(), leaf)
    return values(pointsets), gradient


def parities() -> tuple[Parity, ...]:
    """What the two are tried on."""
    return (
        Parity(
            op="convex_iou",
            tier="A",
            fuzz=_fuzz,
            cases=(
                Case("typical", functools.partial(_matrix, 17, 13)),
                # More than one block of the GPU either way.
                Case("many_rows", functools.partial(_matrix, 70, 3)),
                Case("many_columns", functools.partial(_matrix, 3, 140)),
                Case("grid", _grid),
                Case("concave", _concave),
                Case("far_from_origin", functools.partial(_matrix, 5, 7, offset=2000.0)),
                Case("single", functools.partial(_matrix, 1, 1)),
                Case("no_pointsets", functools.partial(_matrix, 0, 3)),
                Case("no_polygons", functools.partial(_matrix, 3, 0)),
                Case("not_finite", _not_finite),
            ),
            workloads=(
                # Points of a dense detector on an image of 1024 x 1024, against its objects.
                Workload("dense", {"n": 21_824, "m": 100}, _scene, gradient=False),
            ),
        ),
        Parity(
            op="convex_giou",
            tier="A",
            fuzz=_fuzz_rows,
            differentiable=("pointsets",),
            cases=(
                Case("typical", functools.partial(_rows, 9)),
                Case("clockwise", _clockwise),
                Case("concave", functools.partial(_concave, aligned=True)),
                Case("apart", _apart),
                Case("inside", functools.partial(_rows, 4, size=2.0)),
                # Beside the polygons these points look like one: rounding chooses which of them
                # gets the gradient.
                Case("tiny", _tiny, gradient=False),
                Case("grid", functools.partial(_grid, aligned=True), gradient=False),
                Case("degenerate", _degenerate, gradient=False),
                Case("single", functools.partial(_rows, 1)),
                Case("empty", functools.partial(_rows, 0)),
                Case("not_finite", functools.partial(_not_finite, aligned=True), gradient=False),
            ),
            workloads=(
                # The positive points of a batch.
                Workload("positives", {"n": 4096}, _positives),
            ),
        ),
    )


def _quadrilaterals(new: Inputs, count: int, size: float = 9.0) -> Tensor:
    """(count, 8) convex, counter-clockwise: corners on ellipses."""
    quarter = torch.arange(4.0) * (math.pi / 2)
    angle = quarter + new.uniform(count, 4, high=1.2) + new.uniform(count, 1, high=6.0)
    centre, radius = new.uniform(count, 1, 2, high=30), new.uniform(count, 1, 2, low=1, high=size)
    return (centre + radius * torch.stack([angle.cos(), angle.sin()], 2)).flatten(1)


def _pointsets(new: Inputs, count: int, size: float = 9.0) -> Tensor:
    """(count, 18) points around centres."""
    centre = new.uniform(count, 1, 2, high=30)
    return (centre + new.uniform(count, 9, 2, low=-size, high=size)).flatten(1)


def _matrix(n: int, m: int, new: Inputs, offset: float = 0.0) -> dict[str, Tensor]:
    return {
        "pointsets": _pointsets(new, n) + offset,
        "polygons": _quadrilaterals(new, m) + offset,
    }


def _rows(count: int, new: Inputs, size: float = 9.0) -> dict[str, Tensor]:
    """Pairs that overlap; points inside where `size` is small."""
    polygons = _quadrilaterals(new, count, 20.0)
    centre = polygons.unflatten(1, (4, 2)).mean(1, keepdim=True)
    around = new.uniform(count, 9, 2, low=-size, high=size)
    return {"pointsets": (centre + around).flatten(1), "polygons": polygons}


def _tiny(new: Inputs) -> dict[str, Tensor]:
    """Points around the origin."""
    rows = _rows(9, new)
    return rows | {"pointsets": new.uniform(9, 18, low=-1e-20, high=1e-20)}


def _clockwise(new: Inputs) -> dict[str, Tensor]:
    rows = _rows(5, new)
    return rows | {"polygons": rows["polygons"].unflatten(1, (4, 2)).flip(1).flatten(1)}


def _apart(new: Inputs) -> dict[str, Tensor]:
    rows = _rows(5, new)
    return rows | {"polygons": rows["polygons"] + 50}


def _concave(new: Inputs, aligned: bool = False) -> dict[str, Tensor]:
    """An arrow head either way around, its notch at each of its vertices."""
    arrow = torch.tensor([[0, 0], [10, 4], [2, 3], [4, 11]], dtype=torch.float64)
    turned = [arrow.roll(i, 0).flatten() for i in range(4)]
    polygons = torch.stack([*turned, *(row.reshape(4, 2).flip(0).flatten() for row in turned)])
    points = new.uniform(8 if aligned else 5, 9, 2, low=-1, high=9).flatten(1)
    return {"pointsets": points, "polygons": polygons}


def _grid(new: Inputs, aligned: bool = False) -> dict[str, Tensor]:
    """Small integers: equal points, collinear ones, sides that lie on each other."""
    corners = torch.tensor([[0, 0, 4, 0, 4, 4, 0, 4], [0, 0, 2, 0, 2, 3, 0, 3]])
    count = 24
    polygons = corners[new.integers(count, high=2)] + new.integers(count, 4, 2, high=3)[:, :1].tile(
        1, 1, 4
    ).flatten(1)
    points = new.integers(count if aligned else 20, 18, high=5)
    return {"pointsets": points.double(), "polygons": polygons.double()}


def _degenerate(new: Inputs) -> dict[str, Tensor]:
    """A point and a line, against a square and a point."""
    point, line = torch.full((18,), 1.0), torch.arange(18.0)
    square, other = torch.tensor([0.0, 0, 4, 0, 4, 4, 0, 4]), torch.full((8,), 1.0)
    rows = [(point, square), (line, square), (point, other), (line, other)]
    return {
        "pointsets": torch.stack([row for row, _ in rows]).double(),
        "polygons": torch.stack([row for _, row in rows]).double(),
    }


def _not_finite(new: Inputs, aligned: bool = False) -> dict[str, Tensor]:
    problem = _rows(6, new) if aligned else _matrix(6, 5, new)
    problem["pointsets"][0, 0], problem["pointsets"][1, 7] = math.nan, math.inf
    problem["polygons"][2, 3], problem["polygons"][3, 6] = -math.inf, math.nan
    return problem


def _boxes_and_points(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Points spread over boxes, and boxes turned by any angle."""
    image, g = (1024.0, 1024.0), scenes.generator(scenes.SEED)
    boxes = scenes.uniform_boxes(n, scenes.SEED, 16, 256, image)
    share = torch.rand(n, 9, 2, generator=g)
    points = boxes[:, None, :2] + share * (boxes[:, 2:] - boxes[:, :2])[:, None]
    others = scenes.uniform_boxes(m, scenes.SEED + 1, 16, 256, image)
    centre, half = (others[:, :2] + others[:, 2:]) / 2, (others[:, 2:] - others[:, :2]) / 2
    corners = half[:, None] * torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]])
    angle = 3.0 * torch.rand(m, 1, generator=g)
    x, y = corners.unbind(2)
    turned = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], 2)
    return points.flatten(1), (centre[:, None] + turned).flatten(1)


def _scene(sizes: Sizes) -> dict[str, Tensor]:
    pointsets, polygons = _boxes_and_points(sizes["n"], sizes["m"])
    return {"pointsets": pointsets, "polygons": polygons}


def _positives(sizes: Sizes) -> dict[str, Tensor]:
    """Each object moved onto its points."""
    pointsets, polygons = _boxes_and_points(sizes["n"], sizes["n"])
    off = [rows.unflatten(1, (-1, 2)).mean(1) for rows in (pointsets, polygons)]
    return {"pointsets": pointsets, "polygons": polygons + (off[0] - off[1]).tile(1, 4)}


def _fuzz(draw: Draw) -> dict[str, Tensor]:
    return {
        "pointsets": draw.values(draw.size(5), 18) * 20,
        "polygons": _drawn(draw, draw.size(5)),
    }


def _fuzz_rows(draw: Draw) -> dict[str, Tensor]:
    count = draw.size(4)
    return {"pointsets": draw.values(count, 18) * 20, "polygons": _drawn(draw, count)}


def _drawn(draw: Draw, count: int) -> Tensor:
    """(count, 8) turned rectangles, either way around."""
    turned = corners(draw.rotated(count))
    return torch.where(draw.uniform(count, 1, 1) < 0.5, turned, turned.flip(1)).flatten(1)
