"""roi_align_rotated and its module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import nn, ops, reference
from torchkiln.reference.detection._points import rotated_boxes
from torchkiln.reference.detection.roi_align_rotated import parity
from torchkiln.testing import Inputs

ratios = st.sampled_from([0, 1, 2, 3])


def inside(new: Inputs, count: int, height: int, width: int) -> Tensor:
    """(count, 6) regions at any angle whose samples all lie between pixel centres."""
    center = torch.tensor([width, height]) / 2 + new.uniform(count, 2, low=-0.5, high=0.5)
    side = new.uniform(count, 2, low=1, high=(min(height, width) - 3) / math.sqrt(2))
    angle = new.uniform(count, 1, low=-7, high=7)
    return torch.cat([torch.zeros(count, 1), center, side, angle], 1)


class TestRoiAlignRotated(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"input": 0, "boxes": 0}
    failures = (
        Failure(
            "three_dimensions",
            {"input": lambda input: input[0]},
            ValueError,
            r"^roi_align_rotated: input must have shape \(N, C, H, W\); got \(5, 13, 17\)$",
        ),
        Failure(
            "integers",
            {"input": lambda input: input.int()},
            TypeError,
            r"^roi_align_rotated: input must be a floating-point tensor; got int32\. ",
        ),
        Failure(
            "five_columns",
            {"boxes": lambda boxes: boxes[:, 1:]},
            ValueError,
            r"^roi_align_rotated: boxes must have shape \(N, 6\); got \(12, 5\)$",
        ),
        Failure(
            "no_bins",
            {"output_size": (7, 0)},
            ValueError,
            "^roi_align_rotated: pooled_width must be at least 1; got 0$",
        ),
        Failure(
            "too_many_bins",
            {"output_size": 5000},
            ValueError,
            "^roi_align_rotated: pooled_height must be at most 4096; got 5000$",
        ),
        Failure(
            "scale_is_nan",
            {"spatial_scale": math.nan},
            ValueError,
            "^roi_align_rotated: spatial_scale must be a finite number above 0; got nan",
        ),
        Failure(
            "too_many_samples",
            {"sampling_ratio": 2000},
            ValueError,
            "^roi_align_rotated: sampling_ratio must be at most 1024; got 2000$",
        ),
        Failure("none", {"boxes": None}, TypeError, "boxes must be a tensor"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        boxes = inside(new, n + 2, 6, 7)
        return {"input": new.normal(n, 3, 6, 7), "boxes": boxes, "output_size": 3}

    def test_batch_index_out_of_range(self, device: str) -> None:
        input = torch.ones(2, 1, 4, 4, device=device, requires_grad=True)
        for index in (-1.0, 2.0, math.nan):
            boxes = torch.tensor([[index, 1, 1, 3, 3, 0], [1, 1, 1, 3, 3, 0]], device=device)
            if device == "cpu":
                with pytest.raises(IndexError, match="boxes must have batch indices from 0 to 1"):
                    ops.roi_align_rotated(input, boxes, 2)
                continue
            output = ops.roi_align_rotated(input, boxes, 2)
            assert not output[0].any()
            assert output[1].all()
            (grad,) = torch.autograd.grad(output[0].sum(), input)
            assert not grad.any()

    @pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_boxes_of_another_dtype(self, box_dtype: torch.dtype, device: str) -> None:
        new = Inputs()
        input = new.normal(1, 3, 8, 9).float().to(device)
        boxes = inside(new, 5, 8, 9).bfloat16().half().to(device)
        expected = ops.roi_align_rotated(input, boxes.float(), 3)
        result = ops.roi_align_rotated(input, boxes.to(box_dtype), 3)
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_layout_is_kept(self, channels_last: bool, device: str) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        input = torch.rand(2, 3, 6, 7, device=device).contiguous(memory_format=layout)
        input.requires_grad_()
        boxes = torch.tensor([[0.0, 3, 3, 2, 2, 0.3], [1, 1, 1, 4, 6, 0.1]], device=device)
        output = ops.roi_align_rotated(input, boxes, 2)
        (grad,) = torch.autograd.grad(output.sum(), input)
        for tensor in (output, grad):
            assert tensor.is_contiguous(memory_format=layout)

    def test_module(self) -> None:
        new = Inputs()
        input, boxes = new.normal(1, 3, 8, 9), inside(new, 5, 8, 9)
        module = nn.RoIAlignRotated(3, 0.5, 2, True, True)
        expected = ops.roi_align_rotated(input, boxes, 3, 0.5, 2, True, True)
        assert torch.equal(module(input, boxes), expected)
        assert repr(module).startswith("RoIAlignRotated(output_size=3, spatial_scale=0.5")

    def test_huge_regions_take_no_time(self, device: str) -> None:
        """A network that diverges makes them: a million samples on an axis of a bin."""
        boxes = torch.tensor([[0, 5.0, 5, 3e6, 2e6, 0.7], [0, 5, 5, 1e30, 1e30, 0]], device=device)
        output = ops.roi_align_rotated(torch.ones(1, 1, 12, 12, device=device), boxes, 3)
        assert output.isfinite().all()
        assert output.abs().max() < 1e-3

    def test_nan_reaches_its_bins_only(self, device: str) -> None:
        input = torch.zeros(1, 1, 8, 8, device=device)
        input[0, 0, 0, 0] = math.nan
        boxes = torch.tensor([[0.0, 4, 4, 8, 8, 0]], device=device)
        output = ops.roi_align_rotated(input, boxes, 2)
        assert output.isnan().flatten().tolist() == [True, False, False, False]

    @given(ratios, seeds)
    def test_upright_equals_roi_align(self, ratio: int, seed: int) -> None:
        new = Inputs(seed)
        # No sample may lie just where maps end: both round, but not alike.
        boxes = rotated_boxes(new, 6, (1, 2, 9, 11)) + new.uniform(6, 6, high=0.01)
        boxes[:, 5] = 0
        image, x, y, width, height, _ = boxes.unbind(1)
        half_w, half_h = width / 2, height / 2
        upright = torch.stack([image, x - half_w, y - half_h, x + half_w, y + half_h], 1)
        input = new.normal(1, 2, 9, 11)
        output = ops.roi_align_rotated(input, boxes, (2, 3), 0.25, ratio)
        expected = ops.roi_align(input, upright, (2, 3), 0.25, ratio, aligned=True)
        torch.testing.assert_close(output, expected)

    @given(ratios, seeds)
    def test_quarter_turn(self, ratio: int, seed: int) -> None:
        """A region turned by a quarter sees what the turned map shows to the upright one."""
        new = Inputs(seed)
        boxes = inside(new, 4, 9, 9)
        boxes[:, 1:3] = 4.5
        input = new.normal(1, 2, 9, 9)
        turned = boxes + torch.tensor([0, 0, 0, 0, 0, math.pi / 2], dtype=torch.float64)
        output = ops.roi_align_rotated(input, turned, 3, 1.0, ratio)
        expected = ops.roi_align_rotated(input.rot90(-1, (2, 3)), boxes, 3, 1.0, ratio)
        torch.testing.assert_close(output, expected)
        clockwise = boxes.clone()
        clockwise[:, 5] *= -1
        same = ops.roi_align_rotated(input, clockwise, 3, 1.0, ratio, clockwise=True)
        assert torch.equal(same, ops.roi_align_rotated(input, boxes, 3, 1.0, ratio))

    @given(ratios, seeds)
    def test_gradient_keeps_the_sum(self, ratio: int, seed: int) -> None:
        new = Inputs(seed)
        boxes = inside(new, 6, 9, 11)
        input = new.normal(1, 2, 9, 11).requires_grad_()
        output = ops.roi_align_rotated(input, boxes, (2, 3), 1.0, ratio)
        direction = new.normal(*output.shape)
        (grad,) = torch.autograd.grad(output, input, direction)
        torch.testing.assert_close(grad.sum((2, 3))[0], direction.sum((0, 2, 3)))

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", [torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_both_gradients_agree(self, channels_last: bool, precision: torch.dtype) -> None:
        """That of atomics and the one of a fixed order, on maps of many tiles."""
        new, dtype = Inputs(3), precision
        layout = torch.channels_last if channels_last else torch.contiguous_format
        input = new.normal(2, 68, 61, 83).to("cuda", dtype).contiguous(memory_format=layout)
        input.requires_grad_()
        boxes = rotated_boxes(new, 200, input.shape).cuda()
        grads = []
        for deterministic in (False, True):
            output = ops.roi_align_rotated(input, boxes, 7, 0.25, deterministic=deterministic)
            # In a half type there is no step between so many numbers.
            direction = torch.linspace(-1, 1, output.numel(), device="cuda").to(dtype)
            grads += torch.autograd.grad(output, input, direction.view_as(output))
        limit = 1e-2 if dtype == torch.float16 else 1e-4
        torch.testing.assert_close(*grads, rtol=limit, atol=limit)


def test_reference_by_hand() -> None:
    input = torch.arange(16, dtype=torch.float64).reshape(1, 1, 4, 4)
    boxes = torch.tensor([[0, 2, 2, 4, 4, 0]], dtype=torch.float64)
    # Aligned, 2 by 2 bins of the whole map: each bin is the mean of its four pixels.
    output = reference.roi_align_rotated(input, boxes, 2, 2)
    assert output.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    # A quarter turn against the clock brings the left end up: bins run from the lower left up.
    boxes[0, 5] = math.pi / 2
    output = reference.roi_align_rotated(input, boxes, 2, 2)
    torch.testing.assert_close(output.flatten(), torch.tensor([10.5, 2.5, 12.5, 4.5]).double())
