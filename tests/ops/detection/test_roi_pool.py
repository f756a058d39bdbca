"""roi_pool: both corner rules, ties, layouts, codes of cells, properties."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import nn, reference
from torchkiln.ops import roi_pool
from torchkiln.reference.detection.roi_pool import parity
from torchkiln.testing import Inputs


class TestRoIPool(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"boxes": 0}
    failures = (
        Failure(
            "integer_input",
            {"input": lambda x: x.long()},
            TypeError,
            r"input must be a floating-point tensor; got int64",
        ),
        Failure(
            "input_shape",
            {"input": lambda x: x[0]},
            ValueError,
            r"input must have shape \(N, C, H, W\); got \(5, 17, 23\)",
        ),
        Failure(
            "boxes_shape",
            {"boxes": torch.zeros(9, 4)},
            ValueError,
            r"boxes must have shape \(N, 5\); got \(9, 4\)",
        ),
        Failure(
            "integer_boxes",
            {"boxes": lambda x: x.long()},
            TypeError,
            r"boxes must be a floating-point tensor; got int64",
        ),
        Failure(
            "output_size",
            {"output_size": (3, 0)},
            ValueError,
            r"output_size must be from 1 to 1024; got 0",
        ),
        Failure(
            "spatial_scale",
            {"spatial_scale": 0.0},
            ValueError,
            r"spatial_scale must be above 0; got 0",
        ),
        Failure(
            "side",
            {"input": torch.zeros(1, 1, 1, 65535)},
            ValueError,
            r"input must have sides of at most 65534; got 65535",
        ),
    )

    def sized(self, new: Inputs, n: int) -> Mapping[str, Any]:
        boxes = torch.cat([torch.zeros(n, 1).double(), new.boxes(n, 16).round()], 1)
        return {"input": new.normal(1, 3, 16, 16), "boxes": boxes, "output_size": 3}


def test_reference_by_hand() -> None:
    """A region of 3 x 3 cells in 2 x 2 bins: both share the middle row and column."""
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    output, codes = reference.roi_pool(image, torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), 2, 2)
    assert output.flatten().tolist() == [5, 6, 9, 10]
    assert codes.flatten().tolist() == [0x101, 0x102, 0x201, 0x202]


def test_corner_rules_differ_between_cells(device: str) -> None:
    image = torch.arange(5.0, device=device).reshape(1, 1, 1, 5)
    boxes = torch.tensor([[0, 0.5, 0, 2.25, 0]], device=device)
    assert roi_pool(image, boxes, 1).item() == 2  # cells 1 and 2
    assert roi_pool(image, boxes, 1, rounding=False).item() == 3  # from 0.5 to 3.25


def test_boxes_may_have_another_dtype(device: str) -> None:
    image = Inputs().normal(1, 3, 9, 9).to(device, torch.float16)
    boxes = torch.tensor([[0, 1, 1, 6, 7]], device=device, dtype=torch.float32)
    for dtype in (torch.float16, torch.float64):
        assert torch.equal(roi_pool(image, boxes.to(dtype), 3), roi_pool(image, boxes, 3))


def test_channels_last_stays(device: str) -> None:
    image = Inputs().normal(2, 8, 12, 13).to(device, torch.float32)
    boxes = torch.tensor([[0, 1, 1, 6, 7], [1, 0, 2, 12, 11]], device=device).float()
    last = image.to(memory_format=torch.channels_last).requires_grad_()
    outputs = [roi_pool(x, boxes, 3) for x in (last, image.requires_grad_())]
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(outputs[0], outputs[1])
    (grad_last,) = torch.autograd.grad(outputs[0].square().sum(), last)
    (grad,) = torch.autograd.grad(outputs[1].square().sum(), image)
    assert grad_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(grad_last, grad)


def test_boxes_get_no_gradient(device: str) -> None:
    """Also where the input asks for none, and no cells are kept."""
    boxes = torch.tensor([[0.0, 0, 0, 3, 3]], device=device, requires_grad=True)
    output = roi_pool(torch.ones(1, 1, 4, 4, device=device), boxes, 2)
    assert torch.autograd.grad(output.sum(), boxes, allow_unused=True) == (None,)


@pytest.mark.parametrize("index", [-1.0, 2.0, math.nan, math.inf])
def test_batch_index_out_of_range(index: float, device: str) -> None:
    image = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
    boxes = torch.tensor([[index, 0, 0, 3, 3]], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match="boxes must have batch indices from 0 to 1"):
            roi_pool(image, boxes, 2)
        return
    output = roi_pool(image, boxes, 2)
    (grad,) = torch.autograd.grad(output.sum(), image)
    assert not output.any()
    assert not grad.any()


def test_a_gradient_needs_the_cells(device: str) -> None:
    image = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 0, 3, 3]], device=device)
    with pytest.raises(RuntimeError, match="with_argmax must be True for a gradient"):
        torch.ops.torchkiln.roi_pool(image, boxes, 2, 2, 1.0, True, False, False)


def test_backward_checks_the_cells(device: str) -> None:
    backward = torch.ops.torchkiln._roi_pool_backward
    grad, boxes = torch.zeros(1, 1, 2, 2, device=device), torch.zeros(1, 5, device=device)
    codes = torch.zeros(1, 1, 2, 2, device=device).int()
    with pytest.raises(RuntimeError, match="argmax must be what roi_pool returned for this size"):
        backward(grad, codes, boxes, 1, 4, 4, 1.0, True, False)
    with pytest.raises(RuntimeError, match=r"argmax must have shape \(1, 1, 2, 2\); got"):
        backward(grad, codes[0], boxes, 1, 4, 4, 1.0, True, False)


@given(seeds, st.integers(1, 9), st.booleans())
def test_pooling_a_constant_gives_it(seed: int, size: int, rounding: bool) -> None:
    boxes = torch.cat([torch.zeros(5, 1).double(), Inputs(seed).boxes(5, 20)], 1)
    output = roi_pool(torch.full((1, 2, 20, 20), 3.5).double(), boxes, size, rounding=rounding)
    assert (output == 3.5).all()


@given(seeds, st.integers(1, 9))
def test_the_gradient_keeps_its_sum(seed: int, size: int) -> None:
    new = Inputs(seed)
    boxes = torch.cat([torch.zeros(5, 1).double(), new.boxes(5, 20)], 1)
    image = new.normal(1, 2, 20, 20).requires_grad_()
    (grad,) = torch.autograd.grad(roi_pool(image, boxes, size).sum(), image)
    torch.testing.assert_close(grad.sum().item(), 5 * 2.0 * size * size)


@given(seeds, st.integers(1, 9))
def test_a_growing_function_commutes(seed: int, size: int) -> None:
    new = Inputs(seed)
    boxes = torch.cat([torch.zeros(5, 1).double(), new.boxes(5, 20)], 1)
    image = new.normal(1, 2, 20, 20)
    assert torch.equal(roi_pool(image.exp(), boxes, size), roi_pool(image, boxes, size).exp())


# Channels, height, width, regions, bins: large enough for shared memory, in each of its forms.
STAGED = {
    "windows": (3, 96, 80, 500, (7, 7)),
    "bands": (2, 200, 200, 700, (7, 7)),
    "tall_bins": (2, 300, 120, 6000, (2, 3)),
    "four_maps": (8, 24, 30, 200, (7, 7)),
    "two_maps": (6, 50, 84, 100, (14, 14)),
    "odd_maps": (5, 40, 37, 300, (7, 7)),
}


def _regions(new: Inputs, size: tuple[int, int, int, int]) -> torch.Tensor:
    """Most of a few cells, some as large as the map, some outside, of no image or not finite."""
    _, height, width, count = size
    center = new.uniform(count, 2) * torch.tensor([width, height])
    half = torch.exp(new.uniform(count, 2) * 4 - 0.7)
    image = new.integers(count, 1, high=2).double()
    boxes = torch.cat([image, center - half, center + half], 1)
    boxes[::50, 1:] = torch.tensor([0.0, 0.0, width, height], dtype=boxes.dtype)
    boxes[1::50, 0] = 7
    boxes[2::50, 3] = math.inf
    boxes[3::50, 1:] += 1000
    return boxes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STAGED)
def test_large_maps_equal_cpu(name: str, dtype: torch.dtype) -> None:
    """Values and cells, with ties, zeros of both signs, NaN and infinities."""
    *size, bins = STAGED[name]
    new = Inputs(5)
    boxes = _regions(new, tuple(size)).float()
    input = new.normal(2, *size[:3]).mul(3).round().div(3).to(dtype)
    input[0, 0, 5:8, 5:9] = math.nan
    input[1, 0, ::7] = -0.0
    input[1, 1, :20] = -math.inf
    expected_boxes = boxes.clone()
    expected_boxes[boxes[:, 0] > 1, 0] = 0
    outside = boxes[:, 0] > 1
    expected, cells = torch.ops.torchkiln.roi_pool(input, expected_boxes, *bins)
    expected[outside], cells[outside] = 0, -1
    result, codes = torch.ops.torchkiln.roi_pool(input.cuda(), boxes.cuda(), *bins)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes.cpu(), cells)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STAGED)
def test_gradient_of_large_maps(name: str) -> None:
    """Both routes against the CPU; the deterministic one repeats its bits."""
    *size, bins = STAGED[name]
    new = Inputs(6)
    boxes = _regions(new, tuple(size)).float()
    boxes[:, 0].clamp_(max=1)
    input = new.normal(2, *size[:3]).float()

    weight = torch.linspace(-1, 1, len(boxes) * size[0] * bins[0] * bins[1])

    def gradient(device: str, deterministic: bool, weight: torch.Tensor) -> torch.Tensor:
        leaf = input.to(device).requires_grad_()
        output = roi_pool(leaf, boxes.to(device), bins, deterministic=deterministic)
        along = weight.view_as(output).to(device)
        return torch.autograd.grad(output, leaf, along)[0].cpu()

    expected = gradient("cpu", True, weight)
    # A pixel that wins hundreds of bins gets their sum in any order: units of rounding of the
    # largest sum that can occur on the way.
    limit = 16 * torch.finfo(torch.float32).eps * gradient("cpu", True, weight.abs())
    fixed = gradient("cuda", True, weight)
    for result in (gradient("cuda", False, weight), fixed):
        assert ((result - expected).abs() <= limit).all()
    assert torch.equal(fixed, gradient("cuda", True, weight))


@pytest.mark.gpu
def test_gradient_of_a_wide_map() -> None:
    """Rows longer than what one block sums."""
    input = Inputs(7).normal(1, 2, 3, 20000).float()
    boxes = torch.tensor([[0.0, 0.0, 0.0, 19999.0, 2.0], [0.0, 8000.0, 0.0, 8400.0, 2.0]])

    def gradient(device: str) -> torch.Tensor:
        leaf = input.to(device).requires_grad_()
        output = roi_pool(leaf, boxes.to(device), (2, 40))
        return torch.autograd.grad(output.square().sum(), leaf)[0].cpu()

    torch.testing.assert_close(gradient("cuda"), gradient("cpu"))


def test_a_list_of_boxes_is_one_for_each_image(device: str) -> None:
    image = Inputs().normal(2, 3, 9, 9).float().to(device)
    boxes = [torch.tensor([[1.0, 1, 6, 7]], device=device), torch.zeros(0, 4, device=device)]
    rows = torch.tensor([[0.0, 1, 1, 6, 7]], device=device)
    assert torch.equal(roi_pool(image, boxes, 3), roi_pool(image, rows, 3))
    assert torch.equal(nn.RoIPool(3)(image, boxes), roi_pool(image, rows, 3))


def test_sizes_may_be_any_integers() -> None:
    numpy = pytest.importorskip("numpy")
    image, rows = torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]])
    assert roi_pool(image, rows, numpy.int64(2)).shape == (1, 1, 2, 2)
    assert roi_pool(image, rows, (numpy.int32(2), 1)).shape == (1, 1, 2, 1)
    for size in ((2.0, 2.0), (1, 2, 3), None, "2"):
        with pytest.raises(ValueError, match=r"^roi_pool: output_size must be one integer or two"):
            roi_pool(image, rows, size)  # type: ignore[arg-type]
