"""convex_iou and convex_giou: hulls of points against quadrilaterals."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import ops, reference
from torchkiln.reference.detection.convex_iou import _rows, parities
from torchkiln.testing import Inputs

_IOU, _GIOU = parities()


def _failures(op: str) -> tuple[Failure, ...]:
    return (
        Failure(
            "columns",
            {"pointsets": lambda rows: rows[:, :16]},
            ValueError,
            rf"^{op}: pointsets must have shape \(N, 18\); got ",
        ),
        Failure(
            "integers",
            {"polygons": lambda rows: rows.int()},
            TypeError,
            rf"^{op}: polygons must be a floating-point tensor; got int32",
        ),
        Failure(
            "two_dtypes",
            {"polygons": lambda rows: rows.half()},
            TypeError,
            rf"^{op}: polygons must have the dtype of pointsets \(float32\); got float16",
        ),
    )


class TestConvexIou(OpSuite):
    parity = _IOU
    autocast = torch.float32
    dynamic: ClassVar = {"pointsets": 0, "polygons": 0}
    failures = _failures("convex_iou")


class TestConvexGiou(OpSuite):
    parity = _GIOU
    autocast = torch.float32
    dynamic: ClassVar = {"pointsets": 0, "polygons": 0}
    failures = (
        *_failures("convex_giou"),
        Failure(
            "rows",
            {"polygons": lambda rows: rows[1:]},
            ValueError,
            r"^convex_giou: polygons must have shape \(9, 8\); got \(8, 8\)",
        ),
    )


def _points(*corners: float) -> torch.Tensor:
    """The corners, the last one as often as it takes to nine."""
    rows = torch.tensor(corners, dtype=torch.float64).reshape(-1, 2)
    return torch.cat([rows, rows[-1:].expand(9 - len(rows), 2)]).reshape(1, 18)


SQUARE = torch.tensor([[0, 0, 2, 0, 2, 2, 0, 2]], dtype=torch.float64)


def test_reference_by_hand() -> None:
    # A triangle of area 4 that has half of the square, of area 4.
    triangle = _points(0, 0, 4, 0, 0, 2)
    # What lies in the square: without the corner above the line from (4, 0) to (0, 2), 1 of 4.
    assert reference.convex_iou(triangle, SQUARE).item() == pytest.approx(3 / 5)
    # Around both: the triangle and the corner (2, 2), 2 more.
    giou = reference.convex_giou(triangle, SQUARE)[0]
    assert giou.item() == pytest.approx(3 / 5 - 1 / 6)


def test_gradient_by_hand() -> None:
    """A square at a distance: only the outer hull and the area grow with it."""
    points = _points(5, 0, 7, 0, 7, 2, 5, 2).requires_grad_()
    giou = ops.convex_giou(points, SQUARE)
    assert giou.item() == pytest.approx(-(14 - 8) / 14)
    (grad,) = torch.autograd.grad(giou.sum(), points)
    # The right side moves by one: area and hull grow by 2, so 8 / 14 becomes 10 / 16.
    right = grad.reshape(9, 2)[1:3, 0].sum().item()
    assert right == pytest.approx(2 / 14 - 8 * 2 / 14**2)
    # The left side moves by one: the area falls by 2 and the hull stays.
    assert grad.reshape(9, 2)[[0, 3], 0].sum().item() == pytest.approx(-2 / 14)
    assert not grad.reshape(9, 2)[4:].any()


def test_gradient_at_a_kink_lies_between_both_sides() -> None:
    points = SQUARE.repeat(1, 3)[:, :18].clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.convex_giou(points, SQUARE).sum(), points)
    # The right side outwards by h: 4 / (4 + 2h), and nothing is wasted. Inwards: (4 - 2h) / 4.
    assert -0.5 <= grad.reshape(9, 2)[1:3, 0].sum().item() <= 0.5


def test_equal_points_give_the_gradient_to_the_first() -> None:
    points = torch.cat([SQUARE, SQUARE, SQUARE[:, :2]], 1) * 0.7 + 0.9
    (grad,) = torch.autograd.grad(ops.convex_giou(points.requires_grad_(), SQUARE).sum(), points)
    assert bool(grad.reshape(9, 2)[:4].any(1).all())
    assert not grad.reshape(9, 2)[4:].any()


def test_second_derivative_is_refused() -> None:
    points = _points(5, 0, 7, 0, 7, 2, 5, 2).requires_grad_()
    (grad,) = torch.autograd.grad(ops.convex_giou(points, SQUARE).sum(), points, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(NotImplementedError, match=r"^convex_giou: second derivatives are not"):
        torch.autograd.grad(grad.sum(), points)


def test_transforms_give_the_gradient() -> None:
    points = torch.cat([_points(5, 0, 7, 0, 7, 2, 5, 2), _points(1, 1, 7, 0, 7, 2, 5, 2)])
    points.requires_grad_()
    polygons = SQUARE.repeat(2, 1)
    (expected,) = torch.autograd.grad(ops.convex_giou(points, polygons).sum(), points)
    found = torch.func.grad(lambda rows: ops.convex_giou(rows, polygons).sum())(points.detach())
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(ops.convex_giou, backend="aot_eager")
    (traced,) = torch.autograd.grad(compiled(points, polygons).sum(), points)
    torch.testing.assert_close(traced, expected)


@settings(max_examples=25)
@given(seeds)
def test_overlap_moves_and_turns_with_both(seed: int) -> None:
    new = Inputs(seed)
    points, polygons = new.normal(6, 18), new.normal(6, 8)
    polygons = ops.min_area_polygons(torch.cat([polygons, polygons, polygons[:, :2]], 1))
    iou, giou = ops.convex_iou(points, polygons), ops.convex_giou(points, polygons)
    assert bool(((iou >= 0) & (iou <= 1)).all())
    torch.testing.assert_close(ops.convex_iou(points + 5, polygons + 5), iou)
    turned = [rows.unflatten(1, (-1, 2)).flip(2).flatten(1) for rows in (points, polygons)]
    torch.testing.assert_close(ops.convex_iou(*turned), iou)
    torch.testing.assert_close(ops.convex_giou(*turned), giou)
    assert bool((giou <= iou.diagonal() + 1e-12).all())


# Corners of polygons, and where the points lie around the origin.
@pytest.mark.parametrize(("far", "near"), [(1e9, 1e-9), (1e-9, 1e9), (1e3, 1e-16), (1.0, 1e-17)])
@pytest.mark.parametrize("seed", range(8))
def test_giou_of_points_far_smaller_or_larger_than_the_polygon(
    far: float, near: float, seed: int, device: str
) -> None:
    """The hull around both keeps a few corners of what looks like one point."""
    rows = {name: value.to(device) for name, value in _rows(4, Inputs(seed)).items()}
    points, polygons = near * rows["pointsets"], far * rows["polygons"]
    expected = reference.convex_giou(points.cpu(), polygons.cpu())[0]
    torch.testing.assert_close(ops.convex_giou(points, polygons).cpu(), expected)


def test_giou_of_a_tiny_hull_and_a_point_far_away(device: str) -> None:
    """What lies between them is nearly nothing beside the distance, and all there is."""
    point = torch.tensor([5.9e11, 4.06e11], dtype=torch.float64).repeat(64, 4)
    points = 1e-7 * Inputs().normal(64, 18)
    giou = ops.convex_giou(points.to(device), point.to(device))
    torch.testing.assert_close(giou.cpu(), -torch.ones(64).double())
