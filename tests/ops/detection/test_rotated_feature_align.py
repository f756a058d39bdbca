"""rotated_feature_align."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import ops, reference
from torchkiln.reference.detection.rotated_feature_align import parity
from torchkiln.testing import Inputs


def at_pixels(height: int, width: int) -> torch.Tensor:
    """(1, height, width, 5) boxes of no size at their own pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zero = torch.zeros_like(y)
    return torch.stack([y, x, zero, zero, zero], 2)[None].double()


class TestRotatedFeatureAlign(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"input": 0, "boxes": 0}
    failures = (
        Failure(
            "points",
            {"points": 4},
            ValueError,
            "^rotated_feature_align: points must be 1 or 5; got 4$",
        ),
        Failure(
            "four_columns",
            {"boxes": lambda boxes: boxes[..., :4]},
            ValueError,
            r"^rotated_feature_align: boxes must have shape \(2, 13, 11, 5\); got \(2, 13, 11, 4",
        ),
        Failure(
            "scale_of_zero",
            {"spatial_scale": 0.0},
            ValueError,
            "^rotated_feature_align: spatial_scale must be a finite number above 0; got 0",
        ),
        Failure("none", {"boxes": None}, TypeError, "boxes must be a tensor"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        boxes = new.uniform(n, 6, 7, 5, high=40)
        return {"input": new.normal(n, 3, 6, 7), "boxes": boxes, "points": 5}

    @given(st.sampled_from([1, 5]), seeds)
    def test_own_pixel_is_added(self, points: int, seed: int) -> None:
        input = Inputs(seed).normal(1, 3, 6, 7)
        output = ops.rotated_feature_align(input, at_pixels(6, 7), 1.0, points)
        torch.testing.assert_close(output, (1 + points) * input)

    @given(seeds)
    def test_gradient_is_identity_and_weights(self, seed: int) -> None:
        new = Inputs(seed)
        input = new.normal(1, 2, 6, 7).requires_grad_()
        boxes = at_pixels(6, 7)
        boxes[..., :2] = new.uniform(1, 6, 7, 2) * torch.tensor([5, 6])
        output = ops.rotated_feature_align(input, boxes, 1.0)
        direction = new.normal(*output.shape)
        (grad,) = torch.autograd.grad(output, input, direction)
        torch.testing.assert_close(grad.sum((2, 3)), 2 * direction.sum((2, 3)))


def test_reference_by_hand() -> None:
    input = torch.arange(25, dtype=torch.float64).reshape(1, 1, 5, 5)
    boxes = torch.zeros(1, 5, 5, 5, dtype=torch.float64)
    # y is 1 and x is 3: pixel 8. The box is 2 wide and 4 high; its angle turns x towards y.
    boxes[0, 0, 0] = torch.tensor([1, 3, 2, 4, 0])
    output = reference.rotated_feature_align(input, boxes, 1.0, 1)
    assert output[0, 0, 0, 0].item() == 8
    boxes[0, 0, 0] = torch.tensor([2, 2, 2, 4, math.pi / 2])
    # The corners are pixels (1, 0), (3, 0), (3, 4) and (1, 4), whose mean is the centre's 12.
    output = reference.rotated_feature_align(input, boxes, 1.0, 5)
    torch.testing.assert_close(output[0, 0, 0, 0], torch.tensor(60.0).double())
