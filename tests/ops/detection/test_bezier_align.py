"""bezier_align and its module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import nn, ops, reference
from torchkiln.reference.detection.bezier_align import parity
from torchkiln.testing import Inputs


def straight(new: Inputs, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(count, 17) boxes as two straight lines, all bins within the map; and (count, 5) boxes."""
    corner = new.uniform(count, 2, low=2, high=3)
    far = torch.tensor([width, height]) - new.uniform(count, 2, low=1, high=3)
    (x1, y1), (x2, y2) = corner.unbind(1), far.unbind(1)
    along = [x1 + (x2 - x1) * part / 3 for part in range(4)]
    upper = [value for x in along for value in (x, y1)]
    lower = [value for x in along[::-1] for value in (x, y2)]
    image = torch.zeros(count)
    boxes = torch.stack([image, x1, y1, x2, y2], 1)
    return torch.stack([image, *upper, *lower], 1).double(), boxes.double()


class TestBezierAlign(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"input": 0, "beziers": 0}
    failures = (
        Failure(
            "sixteen_columns",
            {"beziers": lambda beziers: beziers[:, 1:]},
            ValueError,
            r"^bezier_align: beziers must have shape \(N, 17\); got \(8, 16\)$",
        ),
        Failure(
            "no_bins",
            {"output_size": 0},
            ValueError,
            "^bezier_align: pooled_height must be at least 1; got 0$",
        ),
        Failure(
            "scale_of_zero",
            {"spatial_scale": 0.0},
            ValueError,
            "^bezier_align: spatial_scale must be a finite number above 0; got 0",
        ),
        Failure("none", {"beziers": None}, TypeError, "beziers must be a tensor"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        beziers, _ = straight(new, n + 2, 9, 8)
        return {"input": new.normal(n, 3, 9, 8), "beziers": beziers, "output_size": 3}

    def test_batch_index_out_of_range(self, device: str) -> None:
        beziers = torch.ones(1, 17, device=device) * 3
        input = torch.ones(2, 1, 4, 4, device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match="beziers must have batch indices from 0 to 1"):
                ops.bezier_align(input, beziers, 2)
        else:
            assert not ops.bezier_align(input, beziers, 2).any()

    def test_module(self) -> None:
        new = Inputs()
        input, (beziers, _) = new.normal(1, 3, 9, 8), straight(new, 3, 9, 8)
        module = nn.BezierAlign((2, 3), 0.5, 2, aligned=False)
        expected = ops.bezier_align(input, beziers, (2, 3), 0.5, 2, False)
        assert torch.equal(module(input, beziers), expected)
        assert repr(module).startswith("BezierAlign(output_size=(2, 3), spatial_scale=0.5")

    @given(seeds)
    def test_straight_equals_roi_align(self, seed: int) -> None:
        """Of a box half a bin up and to the left: bins lie around their upper left corners."""
        new = Inputs(seed)
        beziers, boxes = straight(new, 5, 11, 12)
        input = new.normal(1, 2, 11, 12)
        half = (boxes[:, 3:] - boxes[:, 1:3]) / torch.tensor([6, 4])
        boxes[:, 1:] -= half.repeat(1, 2)
        output = ops.bezier_align(input, beziers, (2, 3), 1.0, 1)
        expected = ops.roi_align(input, boxes, (2, 3), 1.0, 1, aligned=True)
        torch.testing.assert_close(output, expected)
        # The height of a bin comes from the ends of one curve: of a level one, no row of pixels.
        assert not ops.bezier_align(input, beziers, (2, 3)).any()

    @given(seeds)
    def test_gradient_keeps_the_sum(self, seed: int) -> None:
        new = Inputs(seed)
        beziers, _ = straight(new, 5, 11, 12)
        input = new.normal(1, 2, 11, 12).requires_grad_()
        output = ops.bezier_align(input, beziers, (2, 3), sampling_ratio=2)
        direction = new.normal(*output.shape)
        (grad,) = torch.autograd.grad(output, input, direction)
        torch.testing.assert_close(grad.sum((2, 3))[0], direction.sum((0, 2, 3)))


def test_reference_by_hand() -> None:
    """An arch of height 3/4 of its control points: at its middle, halfway down to a flat line."""
    input = torch.arange(25, dtype=torch.float64).reshape(1, 1, 5, 5)
    upper = [[0, 4], [0, 0], [4, 0], [4, 4]]
    lower = [[4, 4], [4, 4], [0, 4], [0, 4]]
    row = [0, *(value for point in upper + lower for value in point)]
    beziers = torch.tensor([row], dtype=torch.float64)
    output = reference.bezier_align(input, beziers, 2, 2, 1.0, 1, aligned=False)
    # Bins (0, 1) and (1, 1): x is 2, y is 4 - 3 = 1 on the arch, and 2.5 between it and the line.
    torch.testing.assert_close(output[0, 0, :, 1], torch.tensor([7.0, 14.5]).double())
