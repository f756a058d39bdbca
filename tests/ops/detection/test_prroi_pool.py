"""prroi_pool and its module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import nn, ops, reference
from torchkiln.reference.detection.prroi_pool import parity
from torchkiln.testing import Inputs


class TestPrRoiPool(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"input": 0, "boxes": 0}
    failures = (
        Failure(
            "three_dimensions",
            {"input": lambda input: input[0]},
            ValueError,
            r"^prroi_pool: input must have shape \(N, C, H, W\); got \(5, 13, 17\)$",
        ),
        Failure(
            "integers",
            {"input": lambda input: input.int()},
            TypeError,
            r"^prroi_pool: input must be a floating-point tensor; got int32\. ",
        ),
        Failure(
            "four_columns",
            {"boxes": lambda boxes: boxes[:, 1:]},
            ValueError,
            r"^prroi_pool: boxes must have shape \(N, 5\); got \(9, 4\)$",
        ),
        Failure(
            "no_bins",
            {"output_size": (3, 0)},
            ValueError,
            "^prroi_pool: pooled_width must be at least 1; got 0$",
        ),
        Failure(
            "scale_is_nan",
            {"spatial_scale": math.nan},
            ValueError,
            "^prroi_pool: spatial_scale must be a finite number above 0; got nan",
        ),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        corner = new.uniform(n + 2, 2, high=3)
        far = corner + 1 + new.uniform(n + 2, 2, high=3)
        return {
            "input": new.normal(n, 3, 6, 7),
            "boxes": torch.cat([torch.zeros(n + 2, 1), corner, far], 1).double(),
            "output_size": 2,
        }


def test_batch_index_out_of_range() -> None:
    boxes = torch.tensor([[1.0, 0, 0, 3, 3]])
    with pytest.raises(IndexError, match="prroi_pool: boxes must have batch indices from 0 to 0"):
        ops.prroi_pool(torch.ones(1, 1, 4, 4), boxes, 2)


@given(seeds)
def test_ramp_is_exact(seed: int) -> None:
    """Inside, the average of a linear map is its value at the bin's centre; so are gradients."""
    new = Inputs(seed)
    corner = new.uniform(6, 2, high=4)
    far = corner + 0.5 + new.uniform(6, 2, high=3.5)
    boxes = torch.cat([torch.zeros(6, 1), corner, far], 1).double().requires_grad_()
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    input = (2 * y + 3 * x + 1).double()[None, None]
    output = ops.prroi_pool(input, boxes, 1)
    _, x1, y1, x2, y2 = boxes.unbind(1)
    expected = (y1 + y2) + 1.5 * (x1 + x2) + 1
    torch.testing.assert_close(output.flatten(), expected)
    (grad,) = torch.autograd.grad(output.sum(), boxes)
    slope = torch.tensor([0, 1.5, 1, 1.5, 1], dtype=torch.float64)
    torch.testing.assert_close(grad, slope.expand(6, 5))


@given(seeds)
def test_bins_are_averages_of_smaller_ones(seed: int) -> None:
    new = Inputs(seed)
    corner = new.uniform(5, 2, low=-2, high=6)
    boxes = torch.cat([torch.zeros(5, 1), corner, corner + new.uniform(5, 2, low=0.1, high=8)], 1)
    input = new.normal(1, 2, 7, 8)
    small = ops.prroi_pool(input, boxes.double(), (4, 6))
    large = ops.prroi_pool(input, boxes.double(), (2, 3))
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(small, 2), large)


@pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_of_another_dtype(box_dtype: torch.dtype) -> None:
    """The gradient of boxes has their dtype."""
    input = Inputs().normal(1, 3, 8, 9).float()
    boxes = torch.tensor([[0.0, 1.25, 1.5, 5.75, 6.5], [0, 0.5, 2.25, 7.5, 4.75]])
    results = []
    for dtype in (torch.float32, box_dtype):
        leaf = boxes.to(dtype).requires_grad_()
        output = ops.prroi_pool(input, leaf, 3)
        (grad,) = torch.autograd.grad(output.square().sum(), leaf)
        assert grad.dtype == dtype
        results.append((output, grad.float()))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.02, atol=0.02)


def test_no_gradient_without_area() -> None:
    boxes = torch.tensor([[0.0, 1, 1, 1, 3], [0, 3, 3, 1, 1], [0, math.nan, 0, 2, 2]])
    boxes.requires_grad_()
    input = torch.ones(1, 2, 5, 5, requires_grad=True)
    output = ops.prroi_pool(input, boxes, 2)
    assert not output.any()
    for grad in torch.autograd.grad(output.sum(), [input, boxes]):
        assert not grad.any()


def test_module_and_list_of_boxes() -> None:
    new = Inputs()
    input, rows = new.normal(2, 4, 8, 9), [new.boxes(3, 8.0), new.boxes(2, 8.0)]
    images = torch.tensor([0.0, 0, 0, 1, 1])[:, None]
    expected = ops.prroi_pool(input, torch.cat([images, torch.cat(rows)], 1), (2, 3), 0.5)
    module = nn.PrRoIPool((2, 3), 0.5)
    assert torch.equal(module(input, rows), expected)
    assert repr(module) == "PrRoIPool(output_size=(2, 3), spatial_scale=0.5)"


def test_reference_by_hand() -> None:
    """A pyramid of height 1 over one pixel: its volume is 1, a quarter of it in each quadrant."""
    input = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    boxes = torch.tensor([[0, -1, -1, 1, 1], [0, -1, -1, 0, 0], [0, 0, 0, 0.5, 1]]).double()
    output = reference.prroi_pool(input, boxes, 1, 1)
    assert output.flatten().tolist() == [1 / 4, 1 / 4, 3 / 8]
