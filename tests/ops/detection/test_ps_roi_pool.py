"""ps_roi_align, ps_roi_pool and their modules."""

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
from torchkiln.reference.detection.ps_roi_pool import parities
from torchkiln.testing import Inputs

_ALIGN, _POOL = parities()
_FUNCTIONS = ("ps_roi_align", "ps_roi_pool")


def _failures(op: str) -> tuple[Failure, ...]:
    return (
        Failure(
            "three_dimensions",
            {"input": lambda input: input[0]},
            ValueError,
            rf"^{op}: input must have shape \(N, C, H, W\); got \(18, 13, 17\)$",
        ),
        Failure(
            "channels",
            {"input": lambda input: input[:, :17]},
            ValueError,
            f"^{op}: input must have a multiple of 9 channels, one for each bin; got 17$",
        ),
        Failure(
            "integers",
            {"input": lambda input: input.int()},
            TypeError,
            rf"^{op}: input must be a floating-point tensor; got int32\. ",
        ),
        Failure(
            "four_columns",
            {"boxes": lambda boxes: boxes[:, 1:]},
            ValueError,
            rf"^{op}: boxes must have shape \(N, 5\); got \(9, 4\)$",
        ),
        Failure(
            "list_of_five_columns",
            {"boxes": lambda boxes: [boxes]},
            ValueError,
            rf"^{op}: boxes\[0\] must have shape \(L, 4\); got \(9, 5\)$",
        ),
        Failure(
            "no_bins",
            {"output_size": (3, 0)},
            ValueError,
            f"^{op}: pooled_width must be at least 1; got 0$",
        ),
        Failure(
            "scale_is_nan",
            {"spatial_scale": math.nan},
            ValueError,
            f"^{op}: spatial_scale must be a finite number above 0; got nan",
        ),
    )


class _PsSuite(OpSuite):
    __test__ = False
    dynamic: ClassVar = {"input": 0, "boxes": 0}

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        corner = new.uniform(n + 2, 2, high=3)
        far = corner + 1 + new.uniform(n + 2, 2, high=3)
        return {
            "input": new.normal(n, 8, 6, 7),
            "boxes": torch.cat([torch.zeros(n + 2, 1), corner, far], 1).double(),
            "output_size": 2,
        }


class TestPsRoiAlign(_PsSuite):
    __test__ = True
    parity = _ALIGN
    failures = _failures("ps_roi_align")


class TestPsRoiPool(_PsSuite):
    __test__ = True
    parity = _POOL
    failures = (
        *_failures("ps_roi_pool"),
        Failure(
            "too_many_bins",
            {"output_size": 1025},
            ValueError,
            "^ps_roi_pool: output_size must be at most 1024; got 1025$",
        ),
    )


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_batch_index_out_of_range(name: str) -> None:
    boxes = torch.tensor([[1.0, 0, 0, 3, 3]])
    with pytest.raises(IndexError, match=rf"^{name}: boxes must have batch indices from 0 to 0"):
        getattr(ops, name)(torch.ones(1, 4, 4, 4), boxes, 2)


@pytest.mark.parametrize("name", _FUNCTIONS)
@given(bins=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=seeds)
def test_constants_stay_with_their_bins(name: str, bins: tuple[int, int], seed: int) -> None:
    """A channel of one value gives that value to its bin and to no other."""
    new = Inputs(seed)
    channels = 3 * bins[0] * bins[1]
    values = new.normal(channels)
    corner = new.uniform(5, 2, low=1, high=6)
    boxes = torch.cat([torch.zeros(5, 1), corner, corner + new.uniform(5, 2, low=1, high=5)], 1)
    input = values[None, :, None, None].expand(1, channels, 13, 14)
    output = getattr(ops, name)(input, boxes.double(), bins)
    torch.testing.assert_close(output, values.reshape(1, 3, *bins).expand_as(output))


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_list_of_boxes_and_modules(name: str) -> None:
    new = Inputs()
    input = new.normal(2, 4, 8, 9)
    rows = [new.boxes(n, 8.0) for n in (3, 2)]
    images = torch.tensor([0.0, 0, 0, 1, 1])[:, None]
    expected = getattr(ops, name)(input, torch.cat([images, torch.cat(rows)], 1), 2, 0.5)
    assert torch.equal(getattr(ops, name)(input, rows, 2, 0.5), expected)
    module = nn.PSRoIAlign(2, 0.5, -1) if name == "ps_roi_align" else nn.PSRoIPool(2, 0.5)
    assert torch.equal(module(input, rows), expected)
    assert "output_size=2, spatial_scale=0.5" in repr(module)


def test_samples_are_those_of_roi_align() -> None:
    new = Inputs(4)
    input, boxes = new.normal(1, 12, 9, 8), torch.tensor([[0.0, 1.25, 2, 6.5, 7], [0, 0, 0, 8, 9]])
    pooled = ops.roi_align(input, boxes, (2, 3), aligned=True)
    output = ops.ps_roi_align(input, boxes, (2, 3))
    for channel in range(12):
        c, i, j = channel // 6, channel // 3 % 2, channel % 3
        torch.testing.assert_close(output[:, c, i, j], pooled[:, channel, i, j])


@pytest.mark.parametrize("pooling", [0, 1])
def test_channels_of_bins(pooling: int) -> None:
    """The second result says which channel each bin is made of, in the layout of the first."""
    input = Inputs().normal(1, 8, 5, 6)
    boxes = torch.tensor([[0.0, 1, 1, 4, 4], [0, 0, 0, 5, 5]])
    for image in (input, input.contiguous(memory_format=torch.channels_last)):
        mapped = torch.ops.torchkiln._ps_roi_pool_mapped
        output, channels = mapped(image, boxes, 2, 2, 1.0, -1, pooling, False)
        assert channels.dtype == torch.int32
        assert torch.equal(channels.flatten(1), torch.arange(8, dtype=torch.int32).expand(2, 8))
        assert output.stride() == channels.stride()


def test_as_torchvision() -> None:
    """Its forward leaves the last cells out, and the average of no sample is not a number."""
    input = torch.ones(1, 1, 4, 4)
    input[..., 3, :] = input[..., 3] = 100.0
    boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
    assert ops.ps_roi_pool(input, boxes, 1).item() == (9 + 700) / 16
    output, _ = torch.ops.torchkiln._ps_roi_pool_mapped(input, boxes, 1, 1, 1.0, -1, 1, True)
    assert output.item() == 1.0
    boxes = torch.tensor([[0.0, 1, 1, 1, 3], [0, 1, 1, 3, 3]])
    output, _ = torch.ops.torchkiln._ps_roi_pool_mapped(input, boxes, 1, 1, 1.0, -1, 0, True)
    assert output.isnan().flatten().tolist() == [True, False]
    output, _ = torch.ops.torchkiln._ps_roi_pool_mapped(input, boxes, 1, 1, 1.0, 2, 0, True)
    assert not output.isnan().any()


def test_references_by_hand() -> None:
    input = torch.arange(32, dtype=torch.float64).reshape(1, 2, 4, 4)
    boxes = torch.tensor([[0, 0, 0, 4, 4]], dtype=torch.float64)
    # Two bins side by side: the left half of channel 0, the right half of channel 1.
    halves = [input[0, 0, :, :2].mean().item(), input[0, 1, :, 2:].mean().item()]
    assert reference.ps_roi_align(input, boxes, 1, 2).flatten().tolist() == halves
    assert reference.ps_roi_pool(input, boxes, 1, 2).flatten().tolist() == halves
