"""The gradient that mmcv's convex_giou gives where there is none: corners on outlines, equal ones.

Elsewhere all rules agree. Here the shared area is a sum over triangles from the origin to the sides
of both outlines, and which of several equal corners stays decides. Polygons are padded with their
first corner, which changes neither area nor gradient.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["giou_gradient", "has_tie"]

_SMALL = 1e-8  # what mmcv takes for 0
_POINTS = 9
_TRIPLES = [
    triple
    for triple in itertools.combinations(range(_POINTS + 4 + 1), 3)  # points, corners, the origin
    if triple[0] < _POINTS
]


def has_tie(pointsets: Tensor, polygons: Tensor) -> Tensor:
    """(N,): whether three of points, corners and origin are on a line, as far as can be told."""
    rows = torch.cat([pointsets, polygons], 1).double().reshape(len(pointsets), _POINTS + 4, 2)
    places = torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)
    twice = _cross(places[:, :, None], places[:, None]).flatten(1)
    sides = torch.tensor(
        [[i * 14 + j, j * 14 + k, k * 14 + i] for i, j, k in _TRIPLES], device=twice.device
    ).T
    areas = twice[:, sides[0]] + twice[:, sides[1]] + twice[:, sides[2]]
    nothing = 2 * _SMALL + 1e-9 * rows.square().amax((1, 2))
    return (areas.abs() <= nothing[:, None]).any(1)


def giou_gradient(pointsets: Tensor, polygons: Tensor) -> Tensor:
    """The gradient (N, 18) for points (N, 18) and polygons (N, 8), as mmcv's kernel has it."""
    with torch.inference_mode(False), torch.enable_grad():
        points = pointsets.detach().double().reshape(-1, _POINTS, 2).clone().requires_grad_()
        corners = _positive(polygons.detach().double().reshape(-1, 4, 2).clone())
        outline = _hull(points, torch.ones_like(points[..., 0], dtype=torch.bool))
        shared = _shared_area(outline, corners)
        union = _area(outline).abs() + _area(corners).abs() - shared
        is_new = ~_same(corners[:, :, None], outline[:, None]).any(2)
        is_there = torch.cat([torch.ones_like(outline[..., 0], dtype=torch.bool), is_new], 1)
        around = _area(_hull(torch.cat([outline, corners], 1), is_there)).abs()
        giou = shared / union - (around - union) / around
        (gradient,) = torch.autograd.grad(giou.sum(), points)
    is_one = (points == points[:, :1]).all(2).all(1)  # an outline of two equal corners in mmcv
    return gradient.where(~is_one[:, None, None], 0).flatten(1).to(pointsets.dtype)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _sign(value: Tensor) -> Tensor:
    return (value > _SMALL).long() - (value < -_SMALL).long()


def _same(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).abs() <= _SMALL).all(-1)


def _area(polygon: Tensor) -> Tensor:
    """Signed, (N,) of (N, K, 2)."""
    return _cross(polygon, polygon.roll(-1, 1)).sum(1) / 2


def _positive(polygon: Tensor) -> Tensor:
    return torch.where((_area(polygon) < 0)[:, None, None], polygon.flip(1), polygon)


def _take(polygon: Tensor, places: Tensor) -> Tensor:
    return polygon.gather(1, places[..., None].expand(-1, -1, 2))


def _hull(points: Tensor, is_there: Tensor) -> Tensor:
    """The corners (N, K, 2) of the hull of (N, K, 2), from the lowest of the leftmost on.

    Counterclockwise; of equal points the first one, of those on a side none.
    """
    at = points.detach()
    y = at[..., 1].where(is_there, torch.inf)
    x = at[..., 0].where(y == y.amin(1, keepdim=True), torch.inf)
    places = [x.argmin(1, keepdim=True)]
    is_closed = torch.zeros_like(places[0], dtype=torch.bool)
    for _ in range(points.size(1) - 1):
        ways = at - _take(at, places[-1])
        far = ways.square().sum(-1)
        turn = _cross(ways[:, :, None], ways[:, None])
        beyond = (turn < 0) | ((turn == 0) & (far[:, None] > far[:, :, None]))
        misses = (beyond & is_there[:, None]).sum(2)
        following = misses.where(is_there & (far > 0), len(at[0]) + 1).argmin(1, keepdim=True)
        is_closed = is_closed | (_take(at, following) == _take(at, places[0])).all(-1)
        places.append(torch.where(is_closed, places[0], following))
    return _take(points, torch.cat(places, 1))


def _shared_area(outline: Tensor, corners: Tensor) -> Tensor:
    shape = (*outline.shape[:2], 4, 2)
    a, b, c, d = (
        side.expand(shape).flatten(0, 2)
        for side in (
            outline[:, :, None],
            outline.roll(-1, 1)[:, :, None],
            corners[:, None],
            corners.roll(-1, 1)[:, None],
        )
    )
    first, second = _sign(_cross(a, b)), _sign(_cross(c, d))
    a, b = _ordered(a, b, first)
    c, d = _ordered(c, d, second)
    origin = torch.zeros_like(a)
    polygon = torch.stack([origin, a, b], 1)
    for start, end in ((origin, c), (c, d), (d, origin)):
        polygon = _cut(polygon, start[:, None], end[:, None])
    return (_area(polygon) * first * second).reshape(shape[0], -1).sum(1)


def _ordered(a: Tensor, b: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    is_turned = (sign < 0)[:, None]
    return torch.where(is_turned, b, a), torch.where(is_turned, a, b)


def _cut(polygon: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What of polygons (N, K, 2) is left of lines: (N, K + 1, 2)."""
    following = polygon.roll(-1, 1)
    side = _cross(end - start, polygon - start)
    next_side = side.roll(-1, 1)
    sign = _sign(side)
    is_crossing = sign != sign.roll(-1, 1)
    whole = torch.where(is_crossing, next_side - side, 1)[..., None]
    crossing = (polygon * next_side[..., None] - following * side[..., None]) / whole
    corners = torch.stack([polygon, crossing], 2).flatten(1, 2)
    is_there = torch.stack([sign > 0, is_crossing], 2).flatten(1, 2)

    at, (order, count) = corners.detach(), _packed(is_there)
    packed = _take(at, order)
    place = torch.arange(order.size(1), device=order.device)
    is_new = (place == 0) | ~_same(packed, packed.roll(1, 1))
    is_other = is_new & (place < count) & ~_same(packed, packed[:, :1])
    last = torch.where(is_other, place, 0).amax(1, keepdim=True)
    kept, count = _packed(is_new & (place < count) & (place <= last))
    places = order.gather(1, torch.where(place < count, kept, 0)[:, : polygon.size(1) + 1])
    return torch.where(count[..., None] > 0, _take(corners, places), 0)


def _packed(is_there: Tensor) -> tuple[Tensor, Tensor]:
    """The places (N, K) of those that are there, first and in their order, and their number."""
    width = is_there.size(1)
    before = is_there.cumsum(1)
    goal = torch.where(is_there, before - 1, width)
    place = torch.arange(width, device=is_there.device).expand_as(goal)
    places = goal.new_zeros(len(goal), width + 1).scatter(1, goal, place)
    return places[:, :width], before[:, -1:]
