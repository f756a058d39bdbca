"""border_align and its module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import nn, ops, reference
from torchkiln.reference.detection.border_align import parity
from torchkiln.testing import Inputs


class TestBorderAlign(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"boxes": 1}
    failures = (
        Failure(
            "channels",
            {"input": lambda input: input[:, :6]},
            ValueError,
            "^border_align: input must have a number of channels that 4 divides; got 6$",
        ),
        Failure(
            "two_dimensions",
            {"boxes": lambda boxes: boxes[0]},
            ValueError,
            r"^border_align: boxes must have shape \(N, B, 4\); got \(12, 4\)$",
        ),
        Failure(
            "images",
            {"boxes": lambda boxes: boxes[:1]},
            ValueError,
            r"^border_align: boxes must have shape \(2, 12, 4\); got \(1, 12, 4\)$",
        ),
        Failure(
            "no_parts",
            {"pool_size": 0},
            ValueError,
            "^border_align: pool_size must be at least 1; got 0$",
        ),
        Failure(
            "too_many_parts",
            {"pool_size": 2000},
            ValueError,
            "^border_align: pool_size must be at most 1024; got 2000$",
        ),
        Failure("none", {"boxes": None}, TypeError, "boxes must be a tensor"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        boxes = new.boxes(2 * (n + 2), 8).reshape(2, n + 2, 4)
        return {"input": new.normal(2, 8, 6, 7), "boxes": boxes, "pool_size": 3}

    def test_module(self) -> None:
        new = Inputs()
        input, boxes = new.normal(1, 8, 8, 9), new.boxes(5, 8)[None]
        module = nn.BorderAlign(4)
        assert torch.equal(module(input, boxes), ops.border_align(input, boxes, 4))
        assert repr(module) == "BorderAlign(pool_size=4)"

    def test_nan_wins_and_far_samples_are_zero(self, device: str) -> None:
        input = torch.full((1, 4, 6, 6), -1.0, device=device)
        input[0, 1, 2, 0] = math.nan
        boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 40, 40]]], device=device)
        output = ops.border_align(input, boxes, 2)[0, 0]
        # The left border goes through the NaN, and the far ends of the second box are outside.
        assert output[0].isnan().tolist() == [False, True, False, False]
        assert output[0, [0, 2, 3]].tolist() == [-1, -1, -1]
        assert output[1].tolist() == [0, 0, 0, 0]

    def test_far_winner_has_no_gradient(self, device: str) -> None:
        input = torch.full((1, 4, 6, 6), -1.0, device=device, requires_grad=True)
        boxes = torch.tensor([[[0.0, 0, 40, 40]]], device=device)
        (grad,) = torch.autograd.grad(ops.border_align(input, boxes, 2).sum(), input)
        assert not grad.any()

    @given(st.sampled_from([1, 2, 4]), seeds)
    def test_gradient_goes_to_the_first_winner(self, pool_size: int, seed: int) -> None:
        """Of a constant map that is the first corner: one, or its share of neighbours."""
        # Weights of quarters are exact, so that equal samples are.
        boxes = (Inputs(seed).boxes(6, 7)[None] * 4).round() / 4
        input = torch.ones(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        output = ops.border_align(input, boxes, pool_size)
        (grad,) = torch.autograd.grad(output.sum(), input)
        x1, y1, x2, y2 = boxes[0].unbind(1)
        numbers = torch.arange(8.0).double()
        for border, (x, y) in enumerate([(x1, y1), (x1, y1), (x2, y2), (x2, y2)]):
            near_x = (1 - (x[:, None] - numbers).abs()).clamp(min=0)
            near_y = (1 - (y[:, None] - numbers).abs()).clamp(min=0)
            torch.testing.assert_close(grad[0, border], near_y.T @ near_x)

    @given(st.sampled_from([1, 3, 8]), seeds)
    def test_is_at_most_the_greatest_pixel(self, pool_size: int, seed: int) -> None:
        new = Inputs(seed)
        input, boxes = new.uniform(2, 8, 6, 7), new.boxes(10, 6).reshape(2, 5, 4)
        output = ops.border_align(input, boxes, pool_size)
        finer = ops.border_align(input, boxes, 3 * pool_size)
        assert (output <= finer + 1e-12).all()  # the same places and others
        assert finer.max() <= input.max() + 1e-12


def test_boxes_get_no_gradient(device: str) -> None:
    """Also where the input asks for none, and no winners are kept."""
    boxes = torch.tensor([[[0.0, 0, 3, 3]]], device=device, requires_grad=True)
    output = ops.border_align(torch.ones(1, 4, 4, 4, device=device), boxes, 2)
    assert torch.autograd.grad(output.sum(), boxes, allow_unused=True) == (None,)


def test_reference_by_hand() -> None:
    input = torch.arange(9, dtype=torch.float64).reshape(1, 1, 3, 3).repeat(1, 4, 1, 1)
    input[0, 2] *= -1
    boxes = torch.tensor([[[0, 0, 2, 1]]], dtype=torch.float64)
    output, winners = reference.border_align(input, boxes, 2)
    assert output.flatten().tolist() == [2, 3, -3, 5]
    # The bottom and the right border begin at the lower right corner.
    assert winners.flatten().tolist() == [2, 2, 2, 0]
