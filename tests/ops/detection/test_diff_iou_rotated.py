"""The differentiable overlap of rotated rectangles and of upright boxes in space."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import ops, reference
from torchkiln.reference.detection.box_iou_rotated import rectangles, uprights
from torchkiln.reference.detection.diff_iou_rotated import parity
from torchkiln.testing import Inputs


class TestDiffIouRotated(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"boxes1": 0, "boxes2": 0}
    failures = (
        Failure(
            "columns",
            {"boxes1": lambda boxes: boxes[:, 1:]},
            ValueError,
            r"^diff_iou_rotated_2d: boxes1 must have shape \(\.\.\., 5\); got \(37, 4\)$",
        ),
        Failure(
            "columns_in_space",
            {"boxes1": lambda boxes: boxes[:, 1:]},
            ValueError,
            r"^diff_iou_rotated_3d: boxes1 must have shape \(\.\.\., 7\); got \(37, 6\)$",
            function="diff_iou_rotated_3d",
        ),
        Failure(
            "another_count",
            {"boxes2": lambda boxes: boxes[1:]},
            ValueError,
            r"^diff_iou_rotated_2d: boxes2 must have the shape of boxes1 \(37, 5\); got \(36, 5\)$",
        ),
        Failure(
            "integers",
            {"boxes1": lambda boxes: boxes.int()},
            TypeError,
            r"^diff_iou_rotated_2d: boxes1 must be a floating-point tensor; got int32\. Convert it",
        ),
        Failure(
            "two_dtypes",
            {"boxes2": lambda boxes: boxes.half()},
            TypeError,
            r"^diff_iou_rotated_2d: boxes2 must have the dtype of boxes1 \(float32\); got float16$",
        ),
        Failure("none", {"boxes2": None}, TypeError, "boxes2 must be a tensor; got None"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Tensor]:
        return {"boxes1": rectangles(new, n), "boxes2": rectangles(new, n)}

    @given(seeds, st.booleans())
    def test_is_box_iou_rotated(self, seed: int, space: bool) -> None:
        new = Inputs(seed)
        if space:
            a, b = uprights(new, 9).float(), uprights(new, 9).float()
            expected = ops.boxes_iou3d(a, b).diagonal()
            torch.testing.assert_close(ops.diff_iou_rotated_3d(a, b), expected)
        else:
            a, b = rectangles(new, 9).float(), rectangles(new, 9).float()
            expected = ops.box_iou_rotated(a, b, aligned=True)
            torch.testing.assert_close(ops.diff_iou_rotated_2d(a, b), expected)

    @given(seeds, st.booleans())
    def test_equal_boxes_are_at_rest(self, seed: int, wide: bool) -> None:
        new, kind = Inputs(seed), torch.float64 if wide else torch.float32
        for function, rows in (
            (ops.diff_iou_rotated_3d, uprights(new, 20).to(kind)),
            (ops.diff_iou_rotated_2d, rectangles(new, 20).to(kind)),
        ):
            a, b = rows.clone().requires_grad_(), rows.clone().requires_grad_()
            iou = function(a, b)
            torch.testing.assert_close(iou, torch.ones_like(iou))
            for grad in torch.autograd.grad(iou.sum(), (a, b)):
                torch.testing.assert_close(grad, torch.zeros_like(grad), atol=2e-5, rtol=0)

    @given(seeds)
    def test_gradients_move_both_boxes_against_each_other(self, seed: int) -> None:
        new = Inputs(seed)
        a = rectangles(new, 20).requires_grad_()
        b = rectangles(new, 20).requires_grad_()
        of_a, of_b = torch.autograd.grad(ops.diff_iou_rotated_2d(a, b).sum(), (a, b))
        torch.testing.assert_close(of_a[:, :2], -of_b[:, :2], atol=1e-9, rtol=1e-7)

    def test_boxes_apart_have_no_gradient(self) -> None:
        a = torch.tensor([[0.0, 0, 2, 2, 0.5]]).requires_grad_()
        b = torch.tensor([[9.0, 0, 2, 2, 0.1]]).requires_grad_()
        for grad in torch.autograd.grad(ops.diff_iou_rotated_2d(a, b).sum(), (a, b)):
            assert not grad.any()

    def test_what_is_not_finite_gives_nan_everywhere(self) -> None:
        a = torch.tensor([[0.0, math.nan, 2, 2, 0.5], [0, 0, 2, 2, 0]]).requires_grad_()
        b = torch.tensor([[1.0, 0, 2, 2, 0.1], [1, 0, 2, 2, 0]]).requires_grad_()
        iou = ops.diff_iou_rotated_2d(a, b)
        assert iou.isnan().tolist() == [True, False]
        for grad in torch.autograd.grad(iou.sum(), (a, b)):
            assert grad.isnan().all(1).tolist() == [True, False]

    @pytest.mark.parametrize(
        ("moved", "expected"),
        [
            ([0.0, 0, 2, 2, 0], 1.0),
            ([0.0, 0, 2, 2, math.pi / 2], 1.0),
            ([0.0, 0, 2, 2, math.pi / 4], math.sqrt(0.5)),
            ([1.0, 1, 2, 2, 0], 1 / 7),
            ([2.0, 2, 2, 2, 0], 0.0),
            ([5.0, 0, 2, 2, 0], 0.0),
        ],
    )
    def test_by_hand(self, moved: list[float], expected: float) -> None:
        square = torch.tensor([[0.0, 0, 2, 2, 0]], dtype=torch.float64)
        iou = ops.diff_iou_rotated_2d(square, torch.tensor([moved], dtype=torch.float64))
        torch.testing.assert_close(iou.item(), expected, atol=1e-12, rtol=1e-12)

    def test_a_loss_that_leads_one_box_to_another(self) -> None:
        target = torch.tensor([[3.0, 2.0, 5.0, 2.0, 0.7]])
        box = torch.tensor([[2.0, 2.5, 3.0, 3.0, 0.2]], requires_grad=True)
        optimizer = torch.optim.Adam([box], lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            (1 - ops.diff_iou_rotated_2d(box, target)).sum().backward()
            optimizer.step()
        assert float(ops.diff_iou_rotated_2d(box.detach(), target)) > 0.97


def test_a_box_as_thin_as_a_number_can_be_overlaps_itself() -> None:
    thin = torch.tensor([[7e-40, 1015.0, 1.4e-39, 698.0, -5.510936260]])
    assert ops.diff_iou_rotated_2d(thin, thin).item() == pytest.approx(1)
    assert reference.diff_iou_rotated(thin.double(), thin.double()).item() == pytest.approx(1)
