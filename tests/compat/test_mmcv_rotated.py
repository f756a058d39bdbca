"""Overlaps of rotated boxes in mmcv.ops: against plain references, mmcv's rules and its counts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from torchkiln import ops as native
from torchkiln import reference
from torchkiln.compat.mmcv import ops
from torchkiln.reference.detection.box_iou_rotated import corners, rectangles, uprights
from torchkiln.testing import Inputs

Point = tuple[float, float]


def turn(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def hull_area(points: list[Point]) -> float:
    """Of the points that are not left of a line through two others."""
    edges = [
        (a, b)
        for a, b in itertools.permutations(set(points), 2)
        if all(turn(a, b, c) >= -1e-12 for c in points)
    ]
    # Collinear vertices give edges on edges; the longest one from each vertex is the whole side.
    longest = {}
    for a, b in edges:
        if a not in longest or math.dist(a, b) > math.dist(a, longest[a]):
            longest[a] = b
    start = at = min(longest)
    area = 0.0
    while True:
        area += (at[0] * longest[at][1] - at[1] * longest[at][0]) / 2
        at = longest[at]
        if at == start:
            return area


def sides(polygon: list[Point]) -> list[tuple[Point, Point]]:
    return list(zip(polygon, polygon[1:] + polygon[:1], strict=True))


def crossing(p: tuple[Point, Point], q: tuple[Point, Point], strict: bool) -> list[Point]:
    (p0, p1), (q0, q1) = p, q
    first, last = turn(p0, p1, q0), turn(p0, p1, q1)
    begin, end = turn(q0, q1, p0), turn(q0, q1, p1)
    if first == last or first * last > 0 or begin * end > 0:
        return []
    if strict and first * last * begin * end == 0:
        return []
    t = first / (first - last)
    return [(q0[0] + t * (q1[0] - q0[0]), q0[1] + t * (q1[1] - q0[1]))]


def seems_inside(p: Point, quad: list[Point]) -> bool:
    """By projections on the sides from the first vertex, as in a rectangle."""
    a, b, d = quad[0], quad[1], quad[3]
    for end in (b, d):
        side = (end[0] - a[0], end[1] - a[1])
        along = (p[0] - a[0]) * side[0] + (p[1] - a[1]) * side[1]
        if not 0 <= along <= side[0] ** 2 + side[1] ** 2:
            return False
    return True


def by_rectangle_test(a: list[Point], b: list[Point]) -> float:
    points = [p for s, t in itertools.product(sides(a), sides(b)) for p in crossing(s, t, False)]
    points += [p for p in a if seems_inside(p, b)] + [p for p in b if seems_inside(p, a)]
    points = [(round(x, 9), round(y, 9)) for x, y in points]
    return hull_area(points) if len(set(points)) > 2 else 0.0


def with_margin(a: list[float], b: list[float]) -> float:
    """Area that two boxes x, y, z, dx, dy, dz, heading share, by mmcv's candidates."""

    def vertices(r: list[float]) -> list[Point]:
        box = torch.tensor([[r[0], r[1], r[3], r[4], r[6]]], dtype=torch.float64)
        return [(x, y) for x, y in corners(box)[0].tolist()]

    def inside(p: Point, r: list[float]) -> bool:
        x, y, c, s = p[0] - r[0], p[1] - r[1], math.cos(r[6]), math.sin(r[6])
        u, v = x * c + y * s, y * c - x * s
        return abs(u) < r[3] / 2 + 0.01 and abs(v) < r[4] / 2 + 0.01

    p, q = vertices(a), vertices(b)
    points = [c for s, t in itertools.product(sides(p), sides(q)) for c in crossing(s, t, True)]
    points += [c for c in q if inside(c, a)] + [c for c in p if inside(c, b)]
    if len(points) < 3:
        return 0.0
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    points.sort(key=lambda c: math.atan2(c[1] - y, c[0] - x))
    return abs(sum(turn(points[0], c, d) for c, d in itertools.pairwise(points[1:]))) / 2


def quads(new: Inputs, count: int) -> Tensor:
    """Convex, far from rectangles."""
    angle = (torch.arange(4) + new.uniform(count, 4, low=0.1, high=0.9)) * (math.pi / 2)
    vertices = torch.stack([angle.cos(), angle.sin()], -1) * 5
    return (vertices + new.uniform(count, 1, 2, high=6)).flatten(1)


@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_box_iou_rotated(mode, aligned, clockwise):
    a, b = rectangles(Inputs(1), 12), rectangles(Inputs(2), 12)
    expected = reference.box_iou_rotated(a, b, 0, int(mode == "iof"), aligned, clockwise)
    assert_close(
        ops.box_iou_rotated(a.float(), b.float(), mode, aligned, clockwise),
        expected.float(),
        atol=1e-5,
        rtol=1e-5,
    )
    with pytest.raises(AssertionError, match="mode must be"):
        ops.box_iou_rotated(a, b, "giou")


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_box_iou_quadri_of_rectangles(mode, aligned):
    a, b = (corners(rectangles(Inputs(seed), 12)).flatten(1) for seed in (1, 2))
    # mmcv's rule is right for rectangles.
    expected = native.box_iou_quadri(a, b, mode, aligned).float()
    actual = ops.box_iou_quadri(a.float(), b.float(), mode, aligned)
    assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert ops.box_iou_quadri(a.half(), b.half(), mode, aligned).dtype == torch.float16
    with pytest.raises(AssertionError, match="mode must be"):
        ops.box_iou_quadri(a, b, "giou")


def test_quirk_box_iou_quadri_takes_corners_for_those_of_rectangles():
    a, b = quads(Inputs(3), 12).float(), quads(Inputs(4), 11).float()
    shapes = [[list(map(tuple, row.reshape(4, 2).tolist())) for row in rows] for rows in (a, b)]
    common = torch.tensor([[by_rectangle_test(p, q) for q in shapes[1]] for p in shapes[0]])
    area_a, area_b = (
        torch.tensor([by_rectangle_test(p, p) for p in side])  # all of its own corners
        for side in shapes
    )
    true_a = native.box_iou_quadri(a, a, aligned=True)
    assert_close(true_a, torch.ones_like(true_a))
    expected = common / (area_a[:, None] + area_b - common)
    assert_close(ops.box_iou_quadri(a, b), expected, atol=1e-4, rtol=1e-4)
    assert float((native.box_iou_quadri(a, b) - expected).abs().max()) > 0.01


@pytest.mark.parametrize("spread", [1.0, 0.03])
def test_quirk_boxes_overlap_bev_margin(spread):
    a, b = uprights(Inputs(5), 12) * spread, uprights(Inputs(6), 11) * spread
    expected = torch.tensor([[with_margin(p, q) for q in b.tolist()] for p in a.tolist()])
    assert_close(ops.boxes_overlap_bev(a.float(), b.float()), expected, atol=1e-4, rtol=1e-4)
    height = torch.minimum(a[:, None, 2] + a[:, None, 5] / 2, b[:, 2] + b[:, 5] / 2)
    height -= torch.maximum(a[:, None, 2] - a[:, None, 5] / 2, b[:, 2] - b[:, 5] / 2)
    common = expected * height.clamp(min=0)
    volume = a[:, 3:6].prod(1)[:, None] + b[:, 3:6].prod(1) - common
    actual = ops.boxes_iou3d(a.float(), b.float())
    assert_close(actual, (common / volume.clamp(min=1e-6)).float(), atol=1e-4, rtol=1e-4)

    near = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0], [2.005, 0, 0, 2, 2, 2, 0]])
    assert native.boxes_overlap_bev(near, near)[0, 1] == 0
    assert_close(ops.boxes_overlap_bev(near, near)[0, 1].item(), 0.01, atol=1e-4, rtol=0)


def test_counts_of_mmcv_depend_on_the_margin():
    # mmcv's own test keeps 176 of these boxes at 0.3.
    numpy.random.seed(42)
    boxes = torch.from_numpy(numpy.random.rand(555, 7).astype(numpy.float32))
    scores = torch.from_numpy(numpy.random.rand(555).astype(numpy.float32))
    common = ops.boxes_overlap_bev(boxes, boxes)
    area = boxes[:, 3] * boxes[:, 4]
    suppresses = common / (area[:, None] + area - common).clamp(min=1e-8) > 0.3
    kept: list[int] = []
    for row in scores.argsort(descending=True).tolist():
        if not suppresses[kept, row].any():
            kept.append(row)
    assert len(kept) == 176


def test_boxes_iou3d_refuses_other_columns():
    with pytest.raises(AssertionError, match=r"\(N, 7\)"):
        ops.boxes_iou3d(torch.zeros(2, 5), torch.zeros(2, 7))


def test_boxes_iou_bev_warns():
    rows = torch.tensor([[0.0, 0, 4, 2, 0.3], [1, 0, 5, 2, 0.3]])
    with pytest.warns(DeprecationWarning, match=r"^mmcv\.ops\.boxes_iou_bev: is deprecated"):
        iou = ops.boxes_iou_bev(rows, rows)
    center = torch.tensor([[2.0, 1, 4, 2, 0.3], [3, 1, 4, 2, 0.3]])
    assert_close(iou, ops.box_iou_rotated(center, center))


def test_quirk_box_iou_rotated_stays_in_its_range():
    rows = rectangles(Inputs(7), 60).float()
    rows[:, 2] *= 1e4
    rows[:, 3] *= 1e-4
    for boxes in (rows, rows[:, [0, 1, 3, 2, 4]]):
        iou = ops.box_iou_rotated(boxes, rows)
        assert bool(((iou >= 0) & (iou <= 1)).all())


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ([0.0, 0, 0, 2, 2, 2, 0], (1, 1)),
        ([0.0, 0, 0, 2, 2, 2, math.pi / 2], (1, 1)),
        ([0.0, 0, 0, 2, 2, 2, math.pi / 4], (0.7071, 0.7071)),
        ([1.0, 1, 1, 2, 2, 2, 0], (1 / 7, 1 / 15)),
        ([2.0, 2, 0, 2, 2, 2, 0], (0, 0)),
        ([5.0, 5, 0, 2, 2, 2, 0], (0, 0)),
        ([0.0, 0, 0, 2, 2, 4, 0], (1, 0.5)),
    ],
)
def test_diff_iou_rotated(moved, expected):
    box = torch.tensor([[[0.0, 0, 0, 2, 2, 2, 0]]], requires_grad=True)
    other = torch.tensor([[moved]])
    iou3d = ops.diff_iou_rotated_3d(box, other)
    flat = [0, 1, 3, 4, 6]
    iou2d = ops.diff_iou_rotated_2d(box[..., flat], other[..., flat])
    values = torch.stack([iou2d, iou3d]).flatten()
    assert_close(values.detach(), torch.tensor(expected).float(), atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(values.sum(), box)
    assert bool(gradient.isfinite().all())


def test_quirk_diff_iou_rotated_vertices_on_the_axis():
    # An octagon with two vertices at the height of its middle, and its two squares turned on.
    for angle in torch.linspace(0, math.pi / 4, 9).tolist():
        a = torch.tensor([[[0.0, 0, 2, 2, angle]]])
        b = torch.tensor([[[0.0, 0, 2, 2, angle + math.pi / 4]]])
        assert_close(ops.diff_iou_rotated_2d(a, b), torch.tensor([[math.sqrt(0.5)]]))


def turned_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, count, 5, generator=generator) * torch.tensor([4.0, 4, 3, 3, 6.3])
    return boxes + torch.tensor([0.0, 0, 1, 1, -3.0])


def test_steps_of_diff_iou_rotated_give_its_area():
    """Including gradients; with a box against itself, and one far away."""
    from torchkiln.compat.mmcv._ops import diff_iou_rotated as steps

    box1, box2 = turned_boxes(200, 0).double(), turned_boxes(200, 1).double()
    box2[0, 0] = box1[0, 0]
    box2[1, 1, :2] += 50
    box1.requires_grad_()
    corners = steps.box2corners(box1), steps.box2corners(box2)
    area, vertices = steps.oriented_box_intersection_2d(*corners)
    sizes = [box[..., 2] * box[..., 3] for box in (box1, box2)]
    iou = area / (sizes[0] + sizes[1] - area)
    expected = ops.diff_iou_rotated_2d(box1, box2)
    assert_close(iou, expected, rtol=1e-5, atol=1e-6)
    found, wanted = (torch.autograd.grad(value.sum(), box1)[0] for value in (iou, expected))
    both = torch.ones(2, 200, dtype=torch.bool)
    both[0, 0] = False  # vertices of equal boxes lie on each other
    assert_close(found[both], wanted[both], rtol=1e-4, atol=1e-5)
    assert vertices.shape == (2, 200, 9, 2)
    assert area[0, 0].item() == pytest.approx(sizes[0][0, 0].item())
    assert area[1, 1].item() == 0


def test_steps_of_diff_iou_rotated_by_hand():
    from torchkiln.compat.mmcv._ops import diff_iou_rotated as steps

    boxes = torch.tensor([[[0.0, 0, 2, 2, 0]]]), torch.tensor([[[1.0, 1, 2, 2, 0]]])
    corners = [steps.box2corners(box) for box in boxes]
    assert corners[0].tolist() == [[[[1, 1], [-1, 1], [-1, -1], [1, -1]]]]
    points, crosses = steps.box_intersection(*corners)
    assert crosses.nonzero()[:, 2:].tolist() == [[0, 1], [3, 2]]
    assert points[crosses].tolist() == [[0, 1], [1, 0]]
    inside = steps.box_in_box(*corners)
    assert [part.flatten().tolist() for part in inside] == [
        [True, False, False, False],
        [False, False, True, False],
    ]
    vertices, mask = steps.build_vertices(*corners, *inside, points, crosses)
    rows = steps.sort_indices(vertices, mask)
    # (1, 1), (0, 1), (0, 0), (1, 0), (1, 1), then the first crossing that is none.
    assert rows.tolist() == [[[0, 9, 6, 22, 0, 8, 8, 8, 8]]]
    area, shown = steps.calculate_area(rows, vertices)
    assert area.tolist() == [[1]]
    assert shown[0, 0, :5].tolist() == [[1, 1], [0, 1], [0, 0], [1, 0], [1, 1]]
    none = steps.SortVertices.apply(vertices, mask & False, mask.sum(2) * 0)
    assert none.dtype == torch.int32
    assert none.tolist() == [[[8] * 9]]
