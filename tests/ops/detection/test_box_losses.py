"""generalized_box_iou_loss, distance_box_iou_loss and complete_box_iou_loss."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from support.strategies import boxes
from torchkiln import ops, reference
from torchkiln.reference.detection.box_losses import parities

GIOU, DIOU, CIOU = parities()
NAMES = [parity.op for parity in (GIOU, DIOU, CIOU)]
PAIRWISE = dict(
    zip(NAMES, ("generalized_box_iou", "distance_box_iou", "complete_box_iou"), strict=True)
)


class TestGeneralizedBoxIouLoss(CompositionSuite):
    parity = GIOU
    autocast = torch.float32
    dynamic: ClassVar = {"boxes1": 0, "boxes2": 0}
    failures = (
        Failure(
            "columns",
            {"boxes1": lambda boxes: boxes[:, :3]},
            ValueError,
            r"_loss: boxes1 must have shape \(\.\.\., 4\); got \(33, 3\)$",
        ),
        Failure(
            "counts",
            {"boxes2": lambda boxes: boxes[:3]},
            ValueError,
            r"_loss: boxes2 must have the shape of boxes1 \(33, 4\); got \(3, 4\)$",
        ),
        Failure(
            "integers",
            {"boxes1": lambda boxes: boxes.int()},
            TypeError,
            r"boxes1 must be a floating-point tensor; got int32\. Convert it with boxes1\.float",
        ),
        Failure(
            "two_devices",
            {"boxes2": lambda boxes: boxes.to("meta")},
            ValueError,
            r"boxes2 must be on the device of boxes1 \(\w+(:0)?\); got meta$",
        ),
        Failure(
            "reduction",
            {"reduction": "average"},
            ValueError,
            '_loss: reduction must be "none", "mean" or "sum"; got \'average\'$',
        ),
        Failure("eps", {"eps": -1.0}, ValueError, r"eps must be at least 0; got -1\.0$"),
        Failure("no_eps", {"eps": None}, TypeError, "eps must be a number; got None$"),
    )


class TestDistanceBoxIouLoss(TestGeneralizedBoxIouLoss):
    parity = DIOU


class TestCompleteBoxIouLoss(TestGeneralizedBoxIouLoss):
    parity = CIOU


# By hand: union 7, intersection 1; the box around both has area 9, squared diagonal 18, and the
# centres are sqrt(2) apart. Both are squares: no aspect term.
BY_HAND = [
    (GIOU.op, 1 - 1 / 7 + 2 / 9),
    (DIOU.op, 1 - 1 / 7 + 2 / 18),
    (CIOU.op, 1 - 1 / 7 + 2 / 18),
]


@pytest.mark.parametrize("space", [ops, reference])
@pytest.mark.parametrize(("name", "expected"), BY_HAND)
def test_by_hand(space: object, name: str, expected: float) -> None:
    a = torch.tensor([0, 0, 2, 2], dtype=torch.float64)
    loss = getattr(space, name)(a, a + 1, "none", 1e-12)
    torch.testing.assert_close(loss.item(), expected)


@pytest.mark.parametrize("eps", [1e-7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_boxes_have_finite_gradients(
    name: str, dtype: torch.dtype, eps: float, device: str
) -> None:
    rows = [[2, 2, 2, 2], [0, 0, 4, 0], [0, 0, 0, 4], [3, 3, 1, 1], [1, 1, 3, 4]]
    some = torch.tensor(rows, dtype=dtype, device=device)
    a = some.repeat_interleave(len(rows), 0).requires_grad_()
    b = some.repeat(len(rows), 1).requires_grad_()
    loss = getattr(ops, name)(a, b, "sum", eps)
    for value in (loss, *torch.autograd.grad(loss, (a, b))):
        assert value.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_types_do_not_overflow(name: str, device: str) -> None:
    a = torch.tensor([[0, 0, 1024, 1024]], device=device)
    loss = getattr(ops, name)
    exact = loss(a.double(), a.double() * 2)
    torch.testing.assert_close(loss(a.half(), a.half() * 2), exact.float())


@pytest.mark.parametrize("name", NAMES)
def test_a_box_that_misses_is_pulled_to_its_partner(name: str, device: str) -> None:
    a = torch.tensor([[0.0, 0, 1, 1]], device=device, requires_grad=True)
    b = torch.tensor([[3.0, 0, 4, 1]], device=device)
    (grad,) = torch.autograd.grad(getattr(ops, name)(a, b, "sum"), a)
    assert grad[0, [0, 2]].sum() < 0


@given(boxes())
def test_is_one_less_the_overlap_of_each_pair(rows: Tensor) -> None:
    solid = rows[((rows[:, 2:] - rows[:, :2]) > 0).all(1)]
    other = solid.flip(0)
    for name, pairwise in PAIRWISE.items():
        expected = 1 - getattr(ops, pairwise)(solid, other).diagonal()
        loss = getattr(ops, name)(solid, other, eps=1e-7)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_boxes_have_a_loss_in_float32(name: str, device: str) -> None:
    """A sum is beyond float16; two dtypes may meet."""
    loss = getattr(ops, name)
    boxes1 = torch.rand(70000, 4, device=device).half()
    boxes2 = (boxes1 + 5).half()
    total = loss(boxes1, boxes2, "sum")
    assert total.dtype == torch.float32
    assert 65504 < total.item() < math.inf
    mixed = loss(boxes1, boxes2.float(), "sum")
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, total)
    assert loss(boxes1, boxes2.double(), "sum").dtype == torch.float64
