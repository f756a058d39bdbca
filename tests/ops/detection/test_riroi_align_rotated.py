"""riroi_align_rotated and its module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import nn, ops, reference
from torchkiln.reference.detection._points import rotated_boxes
from torchkiln.reference.detection.riroi_align_rotated import parity
from torchkiln.testing import Inputs


class TestRiroiAlignRotated(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"input": 0, "boxes": 0}
    failures = (
        Failure(
            "channels",
            {"num_orientations": 3},
            ValueError,
            "^riroi_align_rotated: input must have a number of channels that 3 divides; got 16$",
        ),
        Failure(
            "no_orientations",
            {"num_orientations": 0},
            ValueError,
            "^riroi_align_rotated: num_orientations must be at least 1; got 0$",
        ),
        Failure(
            "five_columns",
            {"boxes": lambda boxes: boxes[:, 1:]},
            ValueError,
            r"^riroi_align_rotated: boxes must have shape \(N, 6\); got \(8, 5\)$",
        ),
        Failure("none", {"boxes": None}, TypeError, "boxes must be a tensor"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        boxes = rotated_boxes(new, n + 2, (n, 8, 6, 7))
        return {"input": new.normal(n, 8, 6, 7), "boxes": boxes, "output_size": 3}

    def test_batch_index_out_of_range(self, device: str) -> None:
        boxes = torch.tensor([[2.0, 1, 1, 3, 3, 0.2]], device=device)
        input = torch.ones(2, 8, 4, 4, device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match="boxes must have batch indices from 0 to 1"):
                ops.riroi_align_rotated(input, boxes, 2)
        else:
            assert not ops.riroi_align_rotated(input, boxes, 2).any()

    def test_module(self) -> None:
        new = Inputs()
        input, boxes = new.normal(1, 8, 8, 9), rotated_boxes(new, 3, (1, 8, 8, 9))
        module = nn.RiRoIAlignRotated(3, 0.25, 2, 4)
        expected = ops.riroi_align_rotated(input, boxes, 3, 0.25, 2, 4)
        assert torch.equal(module(input, boxes), expected)
        assert repr(module).startswith("RiRoIAlignRotated(output_size=3, spatial_scale=0.25")

    @given(st.sampled_from([1, 2, 5, 8]), st.booleans(), seeds)
    def test_is_roi_align_rotated_and_a_turn(self, n: int, clockwise: bool, seed: int) -> None:
        new = Inputs(seed)
        boxes = rotated_boxes(new, 5, (1, 1, 9, 11))
        input = new.normal(1, 3 * n, 9, 11)
        output = ops.riroi_align_rotated(input, boxes, 2, 0.25, 2, n, clockwise)
        pooled = ops.roi_align_rotated(input, boxes, 2, 0.25, 2, False, clockwise)
        for row, own, plain in zip(boxes, output, pooled, strict=True):
            steps = float(row[5]) * n / (2 * math.pi)
            whole = math.floor(steps)
            channels = plain.reshape(3, n, 2, 2)
            mixed = [channels.roll(shift, 1) for shift in (whole, whole - 1)]
            expected = torch.lerp(*mixed, steps - whole)
            torch.testing.assert_close(own.reshape(expected.shape), expected)

    @given(seeds)
    def test_whole_turns_change_nothing(self, seed: int) -> None:
        new = Inputs(seed)
        boxes = rotated_boxes(new, 5, (1, 1, 9, 11))
        input = new.normal(1, 8, 9, 11)
        turned = boxes + torch.tensor([0, 0, 0, 0, 0, 6 * math.pi], dtype=torch.float64)
        expected = ops.riroi_align_rotated(input, boxes, 2, 0.25, 2)
        torch.testing.assert_close(
            ops.riroi_align_rotated(input, turned, 2, 0.25, 2), expected, rtol=1e-9, atol=1e-9
        )


def test_reference_by_hand() -> None:
    input = torch.tensor([1.0, 2, 3, 4]).double().reshape(1, 4, 1, 1).expand(1, 4, 5, 5)
    boxes = torch.tensor([[0, 2, 2, 2, 2, 0.0]], dtype=torch.float64)
    # An eighth of a turn, four orientations: halfway between its own and the one before.
    boxes[0, 5] = math.pi / 4
    output = reference.riroi_align_rotated(input, boxes, 1, 1, 1.0, 2, 4)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.5, 2.5, 3.5, 2.5]).double())
