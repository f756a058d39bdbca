"""Overlaps of rotated rectangles, quadrilaterals and upright boxes in space."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import ops, reference
from torchkiln.reference.detection.box_iou_rotated import corners, parity, rectangles, uprights
from torchkiln.testing import Inputs

NAMES = ("boxes1", "boxes2")
FORMS = {
    "box_iou_rotated": 5,
    "box_iou_quadri": 8,
    "boxes_iou_bev": 5,
    "boxes_overlap_bev": 7,
    "boxes_iou3d": 7,
}


class TestBoxIouRotated(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"boxes1": 0, "boxes2": 0}
    failures = (
        *(
            Failure(
                f"columns_of_{name}",
                {"boxes1": lambda boxes: boxes[:, 1:]},
                ValueError,
                rf"^{name}: boxes1 must have shape \(N, {columns}\); got \(40, {columns - 1}\)$",
                function=name,
            )
            for name, columns in FORMS.items()
        ),
        Failure(
            "one_dimension",
            {"boxes2": lambda boxes: boxes[0]},
            ValueError,
            r"^box_iou_rotated: boxes2 must have shape \(N, 5\); got \(5,\)$",
        ),
        Failure(
            "integers",
            {"boxes1": lambda boxes: boxes.int()},
            TypeError,
            r"^box_iou_rotated: boxes1 must be a floating-point tensor; got int32\. Convert it ",
        ),
        Failure(
            "two_dtypes",
            {"boxes2": lambda boxes: boxes.half()},
            TypeError,
            r"^box_iou_rotated: boxes2 must have the dtype of boxes1 \(float32\); got float16$",
        ),
        Failure(
            "mode",
            {"mode": "giou"},
            ValueError,
            '^box_iou_rotated: mode must be "iou" or "iof"; got \'giou\'',
        ),
        Failure(
            "mode_of_quads",
            {"mode": "giou"},
            ValueError,
            '^box_iou_quadri: mode must be "iou" or "iof"; got \'giou\'',
            function="box_iou_quadri",
        ),
        Failure(
            "aligned",
            {"aligned": True},
            ValueError,
            r"^box_iou_rotated: boxes2 must have as many rows as boxes1 \(40\); got 33\. Or leave",
        ),
        Failure("none", {"boxes1": None}, TypeError, "boxes1 must be a tensor; got None"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Tensor]:
        return {"boxes1": rectangles(new, n), "boxes2": rectangles(new, n + 3)}

    @given(seeds, st.sampled_from([1e-3, 1.0, 1e3]))
    def test_is_symmetric_and_in_its_range(self, seed: int, scale: float) -> None:
        new = Inputs(seed)
        a, b = rectangles(new, 9).float() * scale, rectangles(new, 8).float() * scale
        iou = ops.box_iou_rotated(a, b)
        assert bool(((iou >= 0) & (iou <= 1)).all())
        torch.testing.assert_close(iou, ops.box_iou_rotated(b, a).T, atol=1e-5, rtol=1e-5)

    @given(seeds)
    def test_turns_and_moves_with_the_boxes(self, seed: int) -> None:
        new = Inputs(seed)
        a, b = rectangles(new, 9), rectangles(new, 8)
        angle, shift = 1.1, torch.tensor([300.0, -20.0], dtype=torch.float64)
        sine, cosine = math.sin(angle), math.cos(angle)
        turn = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)

        def moved(boxes: Tensor) -> Tensor:
            center = boxes[:, :2] @ turn + shift
            return torch.cat([center, boxes[:, 2:4], boxes[:, 4:] + angle], 1)

        expected = ops.box_iou_rotated(a, b)
        torch.testing.assert_close(
            ops.box_iou_rotated(moved(a), moved(b)), expected, atol=1e-9, rtol=1e-7
        )

    @given(seeds)
    def test_upright_boxes_are_those_of_box_iou(self, seed: int) -> None:
        new = Inputs(seed)
        a, b = new.boxes(9), new.boxes(8)

        def upright(boxes: Tensor) -> Tensor:
            return torch.cat([boxes, torch.zeros_like(boxes[:, :1])], 1)

        expected = ops.box_iou(a, b)
        torch.testing.assert_close(ops.boxes_iou_bev(upright(a), upright(b)), expected)

    @given(seeds)
    def test_space_is_ground_times_height(self, seed: int) -> None:
        new = Inputs(seed)
        a, b = uprights(new, 9), uprights(new, 8)
        a[:, 2] = b[0, 2]
        b[:, 2] = b[0, 2]
        height = torch.minimum(a[:, None, 5], b[None, :, 5])
        common = ops.boxes_overlap_bev(a, b) * height
        volume = a[:, 3:6].prod(1)[:, None] + b[:, 3:6].prod(1)
        torch.testing.assert_close(ops.boxes_iou3d(a, b), common / (volume - common))

    @pytest.mark.parametrize("clockwise", [True, False])
    def test_clockwise_is_the_sign_of_the_angle(self, clockwise: bool) -> None:
        a, b = rectangles(Inputs(1), 9), rectangles(Inputs(2), 8)
        sign = torch.tensor([1, 1, 1, 1, 1 if clockwise else -1])
        torch.testing.assert_close(
            ops.box_iou_rotated(a, b, clockwise=clockwise),
            ops.box_iou_rotated(a * sign, b * sign),
        )

    def test_identical_boxes_far_from_the_origin(self) -> None:
        boxes = rectangles(Inputs(3), 200).float()
        boxes[:, :2] += torch.tensor([1e6, -3e6])
        iou = ops.box_iou_rotated(boxes, boxes, aligned=True)
        assert float(iou.min()) > 1 - 2e-6
        assert float(iou.max()) <= 1

    def test_refuses_a_gradient(self) -> None:
        boxes = rectangles(Inputs(4), 3).requires_grad_()
        with pytest.raises(Exception, match="box_iou_rotated"):
            ops.box_iou_rotated(boxes, boxes).sum().backward()


# Exact: a triangle of a grid's points, clipped in rational numbers.
_Point = tuple[Fraction, Fraction]


def _exact_area(a: list[_Point], b: list[_Point]) -> Fraction:
    """Area that counter-clockwise polygons share."""

    def side(p: _Point, q: _Point, r: _Point) -> Fraction:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    for p, q in zip(b, b[1:] + b[:1], strict=True):
        kept: list[_Point] = []
        for r, s in zip(a, a[1:] + a[:1], strict=True):
            first, last = side(p, q, r), side(p, q, s)
            if first >= 0:
                kept.append(r)
            if first * last < 0:
                t = first / (first - last)
                kept.append((r[0] + t * (s[0] - r[0]), r[1] + t * (s[1] - r[1])))
        a = kept
    return sum((side(a[0], a[i - 1], a[i]) for i in range(2, len(a))), Fraction(0)) / 2


def _grid_quad(new: Inputs) -> list[int]:
    """A convex quadrilateral on a grid: one point on each side of a rectangle, or a corner."""
    x, y = new.integers(2, high=4).tolist()
    w, h = new.integers(2, low=2, high=6).tolist()
    s, t, u, v = (int(new.integers(1, high=size + 1)) for size in (w, h, w, h))
    return [x + s, y, x + w, y + t, x + u, y + h, x, y + v]


@given(seeds)
def test_quads_on_a_grid_exactly(seed: int) -> None:
    new = Inputs(seed)
    a, b = _grid_quad(new), _grid_quad(new)
    points = [[(Fraction(q[2 * i]), Fraction(q[2 * i + 1])) for i in range(4)] for q in (a, b)]
    common = _exact_area(points[0], points[1])
    area = _exact_area(points[0], points[0])
    if area == 0:
        return
    rows = torch.tensor([a, b], dtype=torch.float64)
    iof = ops.box_iou_quadri(rows[:1], rows[1:], mode="iof")
    torch.testing.assert_close(iof.item(), float(common / area), rtol=0, atol=1e-12)


def test_by_hand() -> None:
    # Two squares of side 2 with one centre, 45 degrees apart, share a regular octagon.
    octagon = 8 * (math.sqrt(2) - 1)
    square = torch.tensor([[5.0, 7.0, 2.0, 2.0, 0.3]], dtype=torch.float64)
    turned = square + torch.tensor([0, 0, 0, 0, math.pi / 4])
    iou = ops.box_iou_rotated(square, turned)
    torch.testing.assert_close(iou.item(), octagon / (8 - octagon))


def test_a_concave_quad() -> None:
    dart = torch.tensor([[0.0, 0, 4, 0, 1, 1, 0, 4]])  # of area 4; the corner at (1, 1) points in
    square = torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2]])
    # Below and left of the lines from (1, 1) to (4, 0) and to (0, 4).
    common = torch.tensor([[8 / 3]])
    torch.testing.assert_close(ops.box_iou_quadri(dart, square, mode="iof"), common / 4)
    torch.testing.assert_close(ops.box_iou_quadri(square, dart, mode="iof"), common / 4)


def test_slender_quads_keep_their_digits(device: str) -> None:
    """The mean over those that touch: half of what a slope from a far vertex makes of it."""
    (scene,) = (each for each in parity().workloads if each.name == "text")
    tensors = scene.arguments(
        {"n": 400, "m": 400}, torch.float32, "contiguous", torch.device(device)
    )
    exact = reference.box_iou_rotated(*(tensors[name].double() for name in NAMES), form=1)
    iou = ops.box_iou_quadri(*(tensors[name] for name in NAMES))
    assert (iou - exact).abs()[exact > 0].mean() < 4e-9


@pytest.mark.parametrize("size", [2.0**-200, 2.0**-100, 2.0**200])
def test_quads_of_any_size_in_float64(size: float, device: str) -> None:
    """A power of two changes no ratio of areas."""
    quads = corners(rectangles(Inputs(), 12)).flatten(1).to(device)
    for mode in ("iou", "iof"):
        expected = ops.box_iou_quadri(quads, quads, mode=mode)
        torch.testing.assert_close(
            ops.box_iou_quadri(size * quads, size * quads, mode=mode), expected
        )


@pytest.mark.parametrize("angle", [0.0, -5.510936260])
def test_a_box_as_thin_as_a_number_can_be_overlaps_itself(angle: float) -> None:
    thin = torch.tensor([[7e-40, 1015.0, 1.4e-39, 698.0, angle]])
    assert ops.box_iou_rotated(thin, thin).item() == pytest.approx(1)
    assert reference.box_iou_rotated(thin.double(), thin.double()).item() == pytest.approx(1)
