"""Overlaps of rotated rectangles, quadrilaterals and upright boxes in space, in plain PyTorch.

Polygons are clipped: by one side of the other polygon after the other, where what lies outside is
laid flat onto the line, so that it has no area left and every pair keeps equally many vertices.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["box_iou_rotated"]

_RECTANGLE, _QUAD, _CORNERS, _GROUND, _PRISM = range(5)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def signed_area(polygon: Tensor) -> Tensor:
    """Of polygons (..., K, 2); positive where they turn from x to y."""
    fan = polygon - polygon[..., :1, :]
    return _cross(fan, fan.roll(-1, -2)).sum(-1) / 2


def _flattened(polygon: Tensor, start: Tensor, side: Tensor, sign: Tensor) -> Tensor:
    """Polygons (..., 2 K, 2): what lies to the right of a line is moved onto it."""
    to_line = sign * _cross(side[..., None, :], polygon - start[..., None, :])
    outside = to_line < 0
    normal = sign[..., None] * torch.stack([-side[..., 1], side[..., 0]], -1)[..., None, :]
    length = side.square().sum(-1)[..., None]
    shift = torch.where(outside, to_line / torch.where(length > 0, length, 1.0), 0.0)
    moved = polygon - shift[..., None] * normal
    following = to_line.roll(-1, -1)
    crosses = outside != (following < 0)
    share = to_line / torch.where(crosses, to_line - following, 1.0)
    crossing = polygon + share[..., None] * (polygon.roll(-1, -2) - polygon)
    between = torch.where(crosses[..., None], crossing, moved)
    return torch.stack([moved, between], -2).flatten(-3, -2)


def _radius(polygon: Tensor) -> Tensor:
    """The largest distance from the mean of the vertices."""
    around = polygon.detach() - polygon.detach().mean(-2, keepdim=True)
    radius: Tensor = torch.linalg.vector_norm(around, dim=-1).amax(-1)
    return radius


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Whether the circles around two polygons are: of what lies far away only rounding is left."""
    distance: Tensor = torch.linalg.vector_norm(a.detach().mean(-2) - b.detach().mean(-2), dim=-1)
    return distance > (_radius(a) + _radius(b)) * (1 + 1e-6)


def common_area(a: Tensor, b: Tensor) -> Tensor:
    """Area that convex polygons a (..., 4, 2) and b (..., 4, 2) share; the shapes broadcast."""
    size = torch.broadcast_shapes(a.shape, b.shape)
    # Rounding is that of the smaller one's numbers.
    is_smaller = _radius(a) < _radius(b)
    origin = torch.where(is_smaller[..., None, None], a[..., :1, :], b[..., :1, :])
    polygon, window = (a - origin).expand(size), (b - origin).expand(size)
    area_a, area_b = signed_area(polygon), signed_area(window)
    is_apart = _apart(polygon, window)
    sign = torch.where(area_b < 0, -1.0, 1.0).to(window.dtype)[..., None]
    for start in range(4):
        side = window[..., (start + 1) % 4, :] - window[..., start, :]
        polygon = _flattened(polygon, window[..., start, :], side, sign)
    area = signed_area(polygon).abs()
    is_none = is_apart | (area_a == 0) | (area_b == 0)
    return torch.where(is_none, torch.zeros_like(area), area)


def corners(boxes: Tensor, turn: int = 1) -> Tensor:
    """Vertices (..., 4, 2) of x, y, w, h, angle (..., 5); a negative side counts as 0."""
    center, size, angle = boxes[..., None, :2], boxes[..., 2:4].clamp(min=0), turn * boxes[..., 4]
    unit = boxes.new_tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    local = unit * size[..., None, :]
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    x, y = local.unbind(-1)
    return center + torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


def facing(a: Tensor, b: Tensor, turn: int = 1) -> tuple[Tensor, Tensor]:
    """Vertices of rectangles a and b, turned so that b lies along the axes.

    A side that is far shorter than the other one would be lost in the vertices of a turned b, and
    those of a box that is far smaller in its distance from the other one: its centre is the origin.
    """
    angle = turn * b[..., 4]
    cos, sin = angle.cos(), angle.sin()
    x, y = (a[..., :2] - b[..., :2]).unbind(-1)
    center = torch.stack([x * cos + y * sin, y * cos - x * sin], -1)
    size_a, size_b = (boxes[..., 2:4].clamp(min=0).expand_as(center) for boxes in (a, b))
    diagonal_a, diagonal_b = (torch.linalg.vector_norm(x, dim=-1) for x in (size_a, size_b))
    is_smaller = (diagonal_a < diagonal_b)[..., None]
    of_a, of_b = torch.where(is_smaller, 0.0, center), torch.where(is_smaller, -center, 0.0)
    between = a[..., 4:] - b[..., 4:]
    return (
        corners(torch.cat([of_a, size_a, between], -1), turn),
        corners(torch.cat([of_b, size_b, torch.zeros_like(between)], -1)),
    )


def _rectangles(boxes: Tensor, form: int) -> Tensor:
    """x, y, w, h, angle of what a row covers on the ground."""
    if form == _CORNERS:
        first, last = boxes[..., :2], boxes[..., 2:4]
        return torch.cat([(first + last) / 2, last - first, boxes[..., 4:]], -1)
    return boxes[..., [0, 1, 3, 4, 6]] if form in (_GROUND, _PRISM) else boxes


def _polygons(a: Tensor, b: Tensor, form: int, turn: int) -> tuple[Tensor, Tensor]:
    if form == _QUAD:
        return a.reshape(*a.shape[:-1], 4, 2), b.reshape(*b.shape[:-1], 4, 2)
    return facing(_rectangles(a, form), _rectangles(b, form), turn)


def _area(boxes: Tensor, form: int) -> Tensor:
    if form == _QUAD:
        return signed_area(boxes.reshape(*boxes.shape[:-1], 4, 2)).abs()
    return _rectangles(boxes, form)[..., 2:4].clamp(min=0).prod(-1)


def common_height(a: Tensor, b: Tensor) -> Tensor:
    """Height that upright boxes (..., 7) share."""
    half_a, half_b = a[..., 5].clamp(min=0) / 2, b[..., 5].clamp(min=0) / 2
    top = torch.minimum(a[..., 2] + half_a, b[..., 2] + half_b)
    bottom = torch.maximum(a[..., 2] - half_a, b[..., 2] - half_b)
    return (top - bottom).clamp(min=0)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0; the inner `where` keeps its gradient free of NaN."""
    is_zero = denominator == 0
    return torch.where(is_zero, 0.0, numerator / torch.where(is_zero, 1.0, denominator))


def box_iou_rotated(
    boxes1: Tensor,
    boxes2: Tensor,
    form: int = 0,
    mode: int = 0,
    aligned: bool = False,
    clockwise: bool = True,
) -> Tensor:
    """Overlap of every pair, or of each row with its partner.

    Args:
        boxes1: (N, 5), (N, 8) or (N, 7), as the form has it.
        boxes2: (M, same).
        form: 0 x, y, w, h, angle; 1 convex quadrilateral; 2 x1, y1, x2, y2, angle; 3 and 4 x, y, z,
            dx, dy, dz, angle: the ground, and the box. 5 to 7 are 1, 3 and 4, where the operator
            itself follows mmcv's rules.
        mode: 0 intersection over union, 1 over the first one, 2 the intersection.
        aligned: compares row with row.
        clockwise: angles turn x towards y.

    Returns:
        (N, M) or (N,), dtype of `boxes1`.
    """
    form = {5: _QUAD, 6: _GROUND, 7: _PRISM}.get(form, form)
    wide = torch.promote_types(boxes1.dtype, torch.float32)
    a, b, turn = boxes1.to(wide), boxes2.to(wide), 1 if clockwise else -1
    a = a if aligned else a[:, None]
    common = common_area(*_polygons(a, b, form, turn))
    size_a, size_b = _area(a, form), _area(b, form)
    if form == _PRISM:
        common = common * common_height(a, b)
        size_a, size_b = size_a * a[..., 5].clamp(min=0), size_b * b[..., 5].clamp(min=0)
    value = common
    if mode != 2:
        value = ratio(common, size_a if mode == 1 else size_a + size_b - common)
    finite = a.isfinite().all(-1) & b.isfinite().all(-1)
    return torch.where(finite, value, math.nan).to(boxes1.dtype)


# --- what it is tried on ------------------------------------------------------------------------

_ROTATED, _QUADRI = ("box_iou_rotated",), ("box_iou_quadri",)
_BEV, _SPACE = ("boxes_iou_bev",), ("boxes_overlap_bev", "boxes_iou3d")

# Rows of a form, of a number and an extent.
_Rows = Callable[[Inputs, int], Tensor]


def _pair(boxes1: Tensor, boxes2: Tensor, **more: object) -> dict[str, object]:
    return {"boxes1": boxes1, "boxes2": boxes2, **more}


def rectangles(new: Inputs, count: int) -> Tensor:
    """(count, 5), so large that most pairs touch."""
    center, size = new.uniform(count, 2, high=20), new.uniform(count, 2, low=1, high=16)
    return torch.cat([center, size, new.uniform(count, 1, low=-4, high=4)], 1)


def _quads(new: Inputs, count: int) -> Tensor:
    """(count, 8), convex, each second one in the other sense."""
    angle = (torch.arange(4) + new.uniform(count, 4, low=0.05, high=0.95)) * (math.pi / 2)
    angle = torch.where((torch.arange(count) % 2 == 0)[:, None], angle, -angle)
    vertices = torch.stack([angle.cos(), angle.sin()], -1) * new.uniform(count, 1, 1, low=3, high=9)
    return (vertices + new.uniform(count, 1, 2, high=20)).flatten(1)


def _corner_rows(new: Inputs, count: int) -> Tensor:
    return torch.cat([new.boxes(count, 30.0), new.uniform(count, 1, low=-4, high=4)], 1)


def uprights(new: Inputs, count: int) -> Tensor:
    """(count, 7)."""
    base = rectangles(new, count)
    z, height = new.uniform(count, 1, high=4), new.uniform(count, 1, low=1, high=6)
    return torch.cat([base[:, :2], z, base[:, 2:4], height, base[:, 4:]], 1)


def _degenerate() -> Tensor:
    """A square, a point, a line, negative sides, a square that touches it, and the first again."""
    rows = [[0, 0, 4, 4], [2, 2, 0, 0], [0, 0, 4, 0], [0, 0, -4, 4], [4, 0, 4, 4], [0, 0, 4, 4]]
    angles = torch.tensor([0, 0.3, 0, 0, 0, math.pi / 2], dtype=torch.float64)
    return torch.cat([torch.tensor(rows, dtype=torch.float64), angles[:, None]], 1)


def _not_finite() -> Tensor:
    nan, inf = math.nan, math.inf
    rows = [[nan, 0, 5, 5, 0], [0, 0, 5, nan, 0], [0, 0, inf, 5, 0], [0, 0, 5, 5, inf], [-inf] * 5]
    return torch.tensor(rows, dtype=torch.float64)


def _as_squares(rows: Tensor) -> Tensor:
    """Quadrilaterals of rectangles."""
    return corners(rows).flatten(1)


def _as_uprights(rows: Tensor) -> Tensor:
    """Boxes in space on rectangles."""
    z, height = torch.zeros_like(rows[:, :1]), torch.ones_like(rows[:, :1])
    return torch.cat([rows[:, :2], z, rows[:, 2:4], height, rows[:, 4:]], 1)


def _cases(name: str, functions: tuple[str, ...], rows: _Rows) -> tuple[Case, ...]:
    """What each form is tried on."""
    case = partial(Case, functions=functions, gradient=False)
    return (
        case(f"typical{name}", lambda new: _pair(rows(new, 40), rows(new, 33))),
        case(f"single{name}", lambda new: _pair(rows(new, 1), rows(new, 1))),
        case(f"empty_rows{name}", lambda new: _pair(rows(new, 0), rows(new, 5))),
        case(f"empty_columns{name}", lambda new: _pair(rows(new, 5), rows(new, 0))),
        case(f"identical{name}", lambda new: _pair(*[rows(new, 7)] * 2)),
    )


def _modes(name: str, functions: tuple[str, ...], rows: _Rows) -> tuple[Case, ...]:
    case = partial(Case, functions=functions, gradient=False)
    return (
        case(f"iof{name}", lambda new: _pair(rows(new, 9), rows(new, 8), mode="iof")),
        case(f"aligned{name}", lambda new: _pair(rows(new, 37), rows(new, 37), aligned=True)),
        case(
            f"aligned_iof{name}",
            lambda new: _pair(rows(new, 9), rows(new, 9), mode="iof", aligned=True),
        ),
        case(f"aligned_empty{name}", lambda new: _pair(rows(new, 0), rows(new, 0), aligned=True)),
    )


def parity() -> Parity:
    """What the overlaps are tried on."""
    rotated = partial(Case, functions=_ROTATED, gradient=False)
    return Parity(
        op="box_iou_rotated",
        functions=_ROTATED + _QUADRI + _BEV + _SPACE,
        tier="B",
        fuzz=_fuzz,
        cases=(
            *_cases("", _ROTATED, rectangles),
            *_modes("", _ROTATED, rectangles),
            rotated(
                "counter_clockwise",
                lambda new: _pair(rectangles(new, 9), rectangles(new, 8), clockwise=False),
            ),
            # One more than a tile of rows, and than a block of threads.
            rotated("odd_sizes", lambda new: _pair(rectangles(new, 65), rectangles(new, 129))),
            rotated("degenerate", lambda new: _pair(_degenerate(), _degenerate())),
            rotated("not_finite", lambda new: _pair(_not_finite(), rectangles(new, 3))),
            rotated("thin", lambda new: _pair(_thin(new, 9), _thin(new, 40))),
            *_cases("_quads", _QUADRI, _quads),
            *_modes("_quads", _QUADRI, _quads),
            Case(
                "degenerate_quads",
                lambda new: _pair(*[_as_squares(_degenerate())] * 2),
                functions=_QUADRI,
                gradient=False,
            ),
            *_cases("_corners", _BEV, _corner_rows),
            *_cases("_in_space", _SPACE, uprights),
            Case(
                "degenerate_in_space",
                lambda new: _pair(*[_as_uprights(_degenerate())] * 2),
                functions=_SPACE,
                gradient=False,
            ),
        ),
        workloads=(
            # Oriented R-CNN: proposals of one image against its objects, as DOTA has them.
            Workload("proposals", {"n": 2000, "m": 512}, _aerial, _ROTATED, gradient=False),
            # Anchors of five levels, of one in every cell.
            Workload("anchors", {"n": 21_824, "m": 500}, _aerial, _ROTATED, gradient=False),
            Workload("text", {"n": 2000, "m": 512}, _text, _QUADRI, gradient=False),
            Workload("tracks", {"n": 1000, "m": 1000}, _street, _BEV, gradient=False),
            Workload(
                "proposals_in_space", {"n": 1000, "m": 1000}, _street3d, _SPACE, gradient=False
            ),
        ),
    )


def _thin(new: Inputs, count: int) -> Tensor:
    """A thousand times as long as wide."""
    rows = rectangles(new, count)
    rows[:, 2] = new.uniform(count, low=5, high=50)
    rows[:, 3] = rows[:, 2] * 1e-3
    return rows


def _aerial_boxes(n: int, seed: int) -> Tensor:
    return scenes.rotated_boxes(n, seed)


def _aerial(sizes: Sizes) -> dict[str, object]:
    seed = scenes.SEED
    return _pair(_aerial_boxes(sizes["n"], seed), _aerial_boxes(sizes["m"], seed + 1))


def _text(sizes: Sizes) -> dict[str, object]:
    return {name: corners(rows).flatten(1) for name, rows in _aerial(sizes).items()}  # type: ignore[arg-type]


def _street3d(sizes: Sizes) -> dict[str, object]:
    seed = scenes.SEED
    return _pair(scenes.cars(sizes["n"], seed), scenes.cars(sizes["m"], seed + 1))


def _street(sizes: Sizes) -> dict[str, object]:
    def seen_from_above(boxes: Tensor) -> Tensor:
        center, half = boxes[:, :2], boxes[:, 3:5] / 2
        return torch.cat([center - half, center + half, boxes[:, 6:]], 1)

    return {name: seen_from_above(rows) for name, rows in _street3d(sizes).items()}  # type: ignore[arg-type]


def _fuzz(draw: Draw) -> dict[str, object]:
    form = draw.function

    def rows(count: int) -> Tensor:
        if form in _SPACE:
            return draw.upright(count)
        rotated = draw.rotated(count)
        if form in _QUADRI:
            return corners(rotated).flatten(1)
        if form in _BEV:
            return torch.cat([draw.boxes(count), rotated[:, 4:]], 1)
        return rotated

    options = {}
    if form in _ROTATED + _QUADRI:
        options = {
            "mode": draw.option("mode", "iou", "iof"),
            "aligned": draw.option("aligned", False, True),
        }
    boxes1 = rows(draw.size(20))
    boxes2 = rows(len(boxes1) if options.get("aligned") else draw.size(20))
    if form in _ROTATED:
        options["clockwise"] = draw.option("clockwise", True, False)
    return {**_pair(boxes1, draw.repeated(boxes2, boxes1)), **options}
