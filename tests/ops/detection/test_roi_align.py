"""roi_align and its module."""

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
from torchkiln.reference.detection.roi_align import parity
from torchkiln.testing import Inputs

ratios = st.sampled_from([-1, 0, 1, 2, 3])
modes = st.sampled_from(["avg", "max"])


def inside(new: Inputs, count: int, height: int, width: int) -> Tensor:
    """(count, 5) regions whose samples all lie between pixel centres."""
    corner = new.uniform(count, 2) * torch.tensor([width - 3.0, height - 3.0])
    far = (
        corner
        + 1
        + new.uniform(count, 2) * (torch.tensor([width - 1.0, height - 1.0]) - corner - 1)
    )
    return torch.cat([torch.zeros(count, 1), corner, far], dim=1).double()


class TestRoiAlign(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"input": 0, "boxes": 0}
    failures = (
        Failure(
            "three_dimensions",
            {"input": lambda input: input[0]},
            ValueError,
            r"^roi_align: input must have shape \(N, C, H, W\); got \(5, 13, 17\)$",
        ),
        Failure(
            "integers",
            {"input": lambda input: input.int()},
            TypeError,
            r"^roi_align: input must be a floating-point tensor; got int32\. ",
        ),
        Failure(
            "four_columns",
            {"boxes": lambda boxes: boxes[:, 1:]},
            ValueError,
            r"^roi_align: boxes must have shape \(N, 5\); got \(12, 4\)$",
        ),
        Failure(
            "list_of_five_columns",
            {"boxes": lambda boxes: [boxes]},
            ValueError,
            r"^roi_align: boxes\[0\] must have shape \(L, 4\); got \(12, 5\)$",
        ),
        Failure(
            "no_bins",
            {"output_size": (7, 0)},
            ValueError,
            "^roi_align: pooled_width must be at least 1; got 0$",
        ),
        Failure(
            "negative_bins",
            {"output_size": -2},
            ValueError,
            "^roi_align: pooled_height must be at least 1; got -2$",
        ),
        Failure(
            "too_many_bins",
            {"output_size": 5000},
            ValueError,
            "^roi_align: pooled_height must be at most 4096; got 5000$",
        ),
        Failure(
            "scale_of_zero",
            {"spatial_scale": 0.0},
            ValueError,
            "^roi_align: spatial_scale must be a finite number above 0; got 0",
        ),
        Failure(
            "scale_is_nan",
            {"spatial_scale": math.nan},
            ValueError,
            "^roi_align: spatial_scale must be a finite number above 0; got nan",
        ),
        Failure(
            "too_many_samples",
            {"sampling_ratio": 1 << 20},
            ValueError,
            "^roi_align: sampling_ratio must be at most 32768; got 1048576$",
        ),
        Failure(
            "mode",
            {"pool_mode": "sum"},
            ValueError,
            '^roi_align: pool_mode must be "avg" or "max"; got \'sum\'$',
        ),
        Failure("none", {"boxes": None}, TypeError, "boxes must be a tensor"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        return {
            "input": new.normal(n, 3, 6, 7),
            "boxes": inside(new, n + 2, 6, 7),
            "output_size": 3,
        }

    def test_a_huge_region_costs_no_more_than_its_map(self, device: str) -> None:
        """Its samples are beyond count, and nearly all of them are 0 outside of the map."""
        input = torch.rand(1, 2, 9, 7, dtype=torch.float64, device=device) - 2
        for size in (1e3, 1e12, 1e30):
            boxes = torch.tensor([[0, -size, -size, size, size], [0, 1, 1, size, size]])
            for sign, other in ((1, 0.0), (-1, None)):
                output = ops.roi_align(sign * input, boxes.to(input), 2, pool_mode="max")
                assert output.shape == (2, 2, 2, 2)
                assert (output >= 0).all()
                assert other is None or (output == other).all()

    @pytest.mark.parametrize("size", [(), (1, 2, 3), None])
    @pytest.mark.parametrize("op", ["roi_align", "roi_pool", "ps_roi_align", "roi_align_rotated"])
    def test_an_output_size_of_other_than_two_numbers(self, op: str, size: Any) -> None:
        columns = 6 if op == "roi_align_rotated" else 5
        with pytest.raises(ValueError, match=f"^{op}: output_size must be one integer or two; got"):
            getattr(ops, op)(torch.ones(1, 4, 4, 4), torch.zeros(1, columns), size)

    @pytest.mark.parametrize("op", ["roi_align", "ps_roi_pool", "roi_align_rotated"])
    @pytest.mark.parametrize("shape", [(2, 0, 4, 4), (0, 4, 4, 4), (2, 4, 0, 4)])
    def test_an_index_out_of_range_in_an_empty_map(self, op: str, shape: tuple[int, ...]) -> None:
        boxes = torch.zeros(1, 6 if op == "roi_align_rotated" else 5)
        boxes[0, 0] = 2
        with pytest.raises(IndexError, match=f"^{op}: boxes must have batch indices from 0 to"):
            getattr(ops, op)(torch.ones(shape), boxes, 2)

    def test_batch_index_out_of_range(self, device: str) -> None:
        input = torch.ones(2, 1, 4, 4, device=device, requires_grad=True)
        for index in (-1.0, 2.0, math.nan):
            boxes = torch.tensor([[index, 0, 0, 3, 3], [1, 0, 0, 3, 3]], device=device)
            if device == "cpu":
                with pytest.raises(IndexError, match="boxes must have batch indices from 0 to 1"):
                    ops.roi_align(input, boxes, 2)
                continue
            for mode in ("avg", "max"):
                output = ops.roi_align(input, boxes, 2, pool_mode=mode)
                assert not output[0].any()
                assert output[1].all()
                (grad,) = torch.autograd.grad(output[0].sum(), input)
                assert not grad.any()

    @pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_boxes_of_another_dtype(self, box_dtype: torch.dtype, device: str) -> None:
        new = Inputs()
        input = new.normal(1, 3, 8, 9).float().to(device)
        boxes = (inside(new, 5, 8, 9) * 4).round().div(4).to(device)
        expected = ops.roi_align(input, boxes.float(), 3)
        torch.testing.assert_close(ops.roi_align(input, boxes.to(box_dtype), 3), expected)

    def test_list_of_boxes(self, device: str) -> None:
        new = Inputs()
        input = new.normal(2, 3, 8, 9).to(device)
        rows = [inside(new, n, 8, 9)[:, 1:].to(device) for n in (3, 2)]
        joined = torch.cat(
            [torch.tensor([0, 0, 0, 1, 1])[:, None].to(device), *[torch.cat(rows)]], 1
        )
        expected = ops.roi_align(input, joined, 2)
        assert torch.equal(ops.roi_align(input, rows, 2), expected)
        module = nn.RoIAlign(2, spatial_scale=1.0, sampling_ratio=-1)
        assert torch.equal(module(input, rows), expected)
        assert repr(module).startswith("RoIAlign(output_size=2, spatial_scale=1.0")

    def test_list_of_more_boxes_than_bfloat16_has_numbers(self, device: str) -> None:
        images = torch.arange(300.0, device=device)[:, None, None, None].expand(-1, 1, 2, 2)
        rows = [torch.tensor([[0.0, 0, 2, 2]], dtype=torch.bfloat16, device=device)] * 300
        assert torch.equal(ops.roi_align(images, rows, 1).flatten(), torch.arange(300.0).to(device))

    @pytest.mark.parametrize("pool_mode", ["avg", "max"])
    def test_nan_reaches_its_bins_only(self, pool_mode: str, device: str) -> None:
        input = torch.zeros(1, 1, 8, 8, device=device)
        input[0, 0, 1, 1] = math.nan
        boxes = torch.tensor([[0.0, 0, 0, 8, 8]], device=device)
        output = ops.roi_align(input, boxes, 2, aligned=True, pool_mode=pool_mode)
        assert output.isnan().flatten().tolist() == [True, False, False, False]

    def test_maximum_below_every_start(self, device: str) -> None:
        """Values no start value of a peer would survive."""
        input = torch.full((1, 1, 5, 5), -1e30, device=device)
        boxes = torch.tensor([[0.0, 1, 1, 3, 3], [0, 3, 3, 1, 1]], device=device)
        output = ops.roi_align(input, boxes, 1, aligned=True, pool_mode="max")
        assert output.flatten().tolist() == [input[0, 0, 0, 0].item(), 0]

    @pytest.mark.parametrize("pool_mode", ["avg", "max"])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_layout_is_kept(self, pool_mode: str, channels_last: bool, device: str) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        input = torch.rand(2, 3, 6, 7, device=device).contiguous(memory_format=layout)
        input.requires_grad_()
        boxes = torch.tensor([[0.0, 0, 0, 5, 5], [1, 1, 1, 4, 6]], device=device)
        output = ops.roi_align(input, boxes, 2, pool_mode=pool_mode)
        (grad,) = torch.autograd.grad(output.sum(), input)
        for tensor in (output, grad):
            assert tensor.is_contiguous(memory_format=layout)

    @given(ratios, st.booleans(), modes, seeds)
    def test_constant_stays(self, ratio: int, aligned: bool, mode: str, seed: int) -> None:
        boxes = inside(Inputs(seed), 6, 9, 11)
        input = torch.full((1, 2, 9, 11), 1.25, dtype=torch.float64)
        output = ops.roi_align(input, boxes, (2, 3), 1.0, ratio, aligned, pool_mode=mode)
        torch.testing.assert_close(output, torch.full_like(output, 1.25))

    @given(ratios, seeds)
    def test_ramp_is_exact(self, ratio: int, seed: int) -> None:
        """The average of a linear map is its value at the bin's centre."""
        boxes = inside(Inputs(seed), 6, 9, 11)
        y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
        input = (2 * y + 3 * x + 1).double()[None, None]
        output = ops.roi_align(input, boxes, 2, 1.0, ratio)
        _, x1, y1, x2, y2 = boxes.unbind(1)
        parts = torch.tensor([0.25, 0.75], dtype=torch.float64)
        centre_y = y1[:, None] + parts * (y2 - y1)[:, None]
        centre_x = x1[:, None] + parts * (x2 - x1)[:, None]
        expected = 2 * centre_y[:, :, None] + 3 * centre_x[:, None] + 1
        torch.testing.assert_close(output[:, 0], expected)

    @given(ratios, modes, seeds)
    def test_gradient_keeps_the_sum(self, ratio: int, mode: str, seed: int) -> None:
        new = Inputs(seed)
        boxes = inside(new, 6, 9, 11)
        input = new.normal(1, 2, 9, 11).requires_grad_()
        output = ops.roi_align(input, boxes, (2, 3), 1.0, ratio, pool_mode=mode)
        direction = new.normal(*output.shape)
        (grad,) = torch.autograd.grad(output, input, direction)
        torch.testing.assert_close(grad.sum((2, 3))[0], direction.sum((0, 2, 3)))

    @pytest.mark.gpu
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_nothing_is_copied(self, channels_last: bool) -> None:
        """Peak memory of the forward: its output and the taps, a small part of the input."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        input = torch.rand(2, 64, 200, 336, device="cuda").contiguous(memory_format=layout)
        boxes = torch.tensor([[0.0, 10, 10, 300, 300]], device="cuda").repeat(64, 1)
        ops.roi_align(input, boxes, 7, 0.25, 2)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = ops.roi_align(input, boxes, 7, 0.25, 2)
        extra = torch.cuda.max_memory_allocated() - before
        assert extra < output.nbytes + input.nbytes // 10


def test_reference_by_hand() -> None:
    input = torch.arange(16, dtype=torch.float64).reshape(1, 1, 4, 4)
    boxes = torch.tensor([[0, 0, 0, 4, 4]], dtype=torch.float64)
    # Aligned, 2 by 2 bins of the whole map: each bin is the mean of its four pixels.
    output = reference.roi_align(input, boxes, 2, 2, aligned=True)
    assert output.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    # The greatest of the same samples is the lower right pixel.
    output = reference.roi_align(input, boxes, 2, 2, aligned=True, pooling=1)
    assert output.flatten().tolist() == [5.0, 7.0, 13.0, 15.0]
    # One sample in the middle, (1.5, 1.5): the mean of four pixels.
    output = reference.roi_align(input, boxes - torch.tensor([0, 0, 0, 1, 1]), 1, 1, 1.0, 1)
    assert output.flatten().tolist() == [7.5]


# Channels, height, width, regions, bins: large enough for bands of maps in shared memory.
STAGED = {
    "one_band": (3, 60, 52, 400, (7, 7)),
    "bands": (2, 200, 333, 700, (7, 7)),
    "tall_bins": (2, 300, 120, 6000, (2, 3)),
    "wide": (4, 7, 5000, 90, (3, 70)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("name", STAGED)
def test_large_maps_equal_cpu(name: str, ratio: int, dtype: torch.dtype) -> None:
    """Regions of all sizes, over borders, outside, of no image; forward and gradient."""
    channels, height, width, count, bins = STAGED[name]
    new = Inputs(3)
    center = new.uniform(count, 2) * torch.tensor([width, height])
    half = torch.exp(new.uniform(count, 2) * 4 - 0.7)
    image = new.integers(count, 1, high=2).double()
    boxes = torch.cat([image, center - half, center + half], 1)
    boxes[::50, 1:] = torch.tensor([0.0, 0.0, width, height], dtype=boxes.dtype)
    boxes[3::50, 1:] += 10000
    boxes = boxes.to(torch.float32 if dtype == torch.float16 else dtype)
    input = new.normal(2, channels, height, width).to(dtype)

    def both(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = input.to(device).requires_grad_()
        output = ops.roi_align(leaf, boxes.to(device), bins, 1.0, ratio, aligned=True)
        return output.cpu(), torch.autograd.grad(output.sum(), leaf)[0].cpu()

    # Positions are rounded differently; a pixel's worth of noise changes by that much.
    limit = 1e-12 if dtype == torch.float64 else (2e-6 if dtype == torch.float32 else 1e-5)
    for result, expected in zip(both("cuda"), both("cpu"), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-3, atol=limit * max(height, width))


@pytest.mark.gpu
def test_region_of_no_image_is_zero_on_large_maps() -> None:
    boxes = torch.tensor([[5.0, 1, 1, 30, 30], [-1.0, 1, 1, 30, 30]]).repeat(400, 1).cuda()
    output = ops.roi_align(torch.ones(1, 4, 40, 40, device="cuda"), boxes, 7, 1.0, 2)
    assert torch.equal(output, torch.zeros_like(output))


def test_half_lists_under_autocast_to_the_other_half_type() -> None:
    new = Inputs(12)
    maps, boxes = new.normal(2, 3, 8, 8).half(), [torch.tensor([[1.0, 1, 6, 5]]).half()] * 2
    with torch.autocast("cpu", torch.bfloat16):
        pooled = ops.roi_align(maps, boxes, 2)
    assert torch.equal(pooled, ops.roi_align(maps, boxes, 2))


def test_refuses_lists_of_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"^roi_align: boxes\[0\] must be a tensor; got list"):
        ops.roi_align(torch.ones(1, 1, 4, 4), [[0, 0, 1, 1]], 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^roi_align: pool_mode must be .* got \[\]$"):
        ops.roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 2, pool_mode=[])  # type: ignore[arg-type]
