"""multi_scale_roi_align and its modules."""

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
from torchkiln import nn, ops
from torchkiln.reference.detection.multi_scale_roi_align import parity
from torchkiln.testing import Inputs

_OP = "multi_scale_roi_align"


class TestMultiScaleRoiAlign(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"boxes": 0}
    failures = (
        Failure(
            "three_dimensions",
            {"middle": lambda middle: middle[0]},
            ValueError,
            rf"^{_OP}: inputs must have shape \(N, C, H, W\); got \(5, 7, 9\)$",
        ),
        Failure(
            "other_channels",
            {"coarse": lambda coarse: coarse[:, :4]},
            ValueError,
            rf"^{_OP}: inputs must have the same number of images and channels on all levels; "
            r"the first has shape \(2, 5, 14, 18\); got \(2, 4, 4, 5\)$",
        ),
        Failure(
            "other_dtype",
            {"coarse": lambda coarse: coarse.double()},
            TypeError,
            rf"^{_OP}: inputs must have the dtype of the first \(float32\); got float64$",
        ),
        Failure(
            "scale_missing",
            {"spatial_scales": [0.5, 0.25]},
            ValueError,
            f"^{_OP}: spatial_scales must have one number for each of the 3 levels; got 2$",
        ),
        Failure(
            "scale_of_zero",
            {"spatial_scales": [0.5, 0.25, 0.0]},
            ValueError,
            f"^{_OP}: spatial_scales must be finite numbers above 0; got 0",
        ),
        Failure(
            "side_missing",
            {"level_sides": [8.0]},
            ValueError,
            f"^{_OP}: level_sides must have 2 numbers, one between each two levels; got 1$",
        ),
        Failure(
            "sides_descend",
            {"level_sides": [8.0, 4.0]},
            ValueError,
            f"^{_OP}: level_sides must be ascending numbers above 0; got 4",
        ),
        Failure(
            "four_columns",
            {"boxes": lambda boxes: boxes[:, 1:]},
            ValueError,
            rf"^{_OP}: boxes must have shape \(N, 5\); got \(12, 4\)$",
        ),
        Failure(
            "no_bins",
            {"output_size": (3, 0)},
            ValueError,
            f"^{_OP}: pooled_width must be at least 1; got 0$",
        ),
    )


def _regions(new: Inputs, count: int, images: int) -> Tensor:
    """(count, 5) boxes of 2 to 400 pixels around an image of 256 x 320."""
    center = new.uniform(count, 2) * torch.tensor([320.0, 256.0])
    half = torch.exp(new.uniform(count, 2) * math.log(200.0))
    batch = new.integers(count, 1, high=images).double()
    return torch.cat([batch, center - half, center + half], 1).float()


def _pyramid(new: Inputs, strides: tuple[int, ...], channels: int = 3) -> list[Tensor]:
    return [new.normal(2, channels, 256 // s, 320 // s).float() for s in strides]


def test_too_many_levels() -> None:
    levels = [torch.ones(1, 1, 4, 4)] * 9
    boxes = torch.tensor([[0.0, 0, 0, 3, 3]])
    with pytest.raises(ValueError, match=r"inputs must have 1 to 8 levels; got 9"):
        ops.multi_scale_roi_align(levels, boxes, 2, [1.0] * 9, [1.0] * 8)
    with pytest.raises(ValueError, match=r"inputs must have 1 to 8 levels; got 0"):
        ops.multi_scale_roi_align([], boxes, 2, [], [])


@pytest.mark.parametrize("size", [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("empty", [0, 1])
def test_a_level_without_pixels(empty: int, size: tuple[int, int], device: str) -> None:
    """Its regions give 0, those of the other level what they always do."""
    levels = [torch.ones(1, 1, 4, 4, device=device), torch.ones(1, 1, 2, 2, device=device)]
    levels[empty] = torch.ones(1, 1, *size, device=device)
    for level in levels:
        level.requires_grad_()
    # Also on the border, which belongs to the last pixel of a level that has one.
    rows = [[0.0, 0, 0, 3, 3], [0, 0, 0, 8, 8], [0, -0.5, -0.5, 0, 0], [0, -1, -1, 8, 8]]
    boxes = torch.tensor(rows, device=device)
    output = ops.multi_scale_roi_align(levels, boxes, 2, [1.0, 0.5], [8.0], 1, aligned=True)
    sums = output.detach().sum((1, 2, 3)) > 0
    assert sums.tolist() == [empty != level for level in (0, 1, 0, 1)]
    output.sum().backward()
    grads = [level.grad for level in levels]
    assert [grad.shape for grad in grads] == [level.shape for level in levels]
    assert grads[1 - empty].sum() > 0


def test_batch_index_out_of_range() -> None:
    boxes = torch.tensor([[1.0, 0, 0, 3, 3]])
    with pytest.raises(IndexError, match=rf"^{_OP}: boxes must have batch indices from 0 to 0"):
        ops.multi_scale_roi_align([torch.ones(1, 1, 4, 4)], boxes, 2, [1.0], [])


@given(st.integers(1, 5), st.sampled_from([-1, 2]), st.booleans(), seeds)
def test_levels_are_those_of_roi_align(count: int, ratio: int, aligned: bool, seed: int) -> None:
    """Each region equals roi_align on the level that its area says."""
    new = Inputs(seed)
    strides = (4, 8, 16, 32, 64)[:count]
    levels, boxes = _pyramid(new, strides), _regions(new, 20, 2)
    scales, sides = [1 / s for s in strides], [16.0 * 2**i for i in range(count - 1)]
    output = ops.multi_scale_roi_align(levels, boxes, (2, 3), scales, sides, ratio, aligned)
    area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
    index = torch.bucketize(area.sqrt(), torch.tensor(sides), right=True)
    for i, (input, scale) in enumerate(zip(levels, scales, strict=True)):
        expected = ops.roi_align(input, boxes, (2, 3), scale, ratio, aligned)
        assert torch.equal(output[index == i], expected[index == i])


def _torchvision_levels(boxes: Tensor, first: int, last: int) -> Tensor:
    """LevelMapper, as its documentation has it."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (4 + torch.log2(side / 224) + 1e-6).floor().clamp(first, last).long() - first


def test_multi_scale_module() -> None:
    new = Inputs(5)
    strides = (4, 8, 16, 32)
    named = dict(zip("abcd", _pyramid(new, strides), strict=True))
    rows = _regions(new, 60, 2)
    # On the borders: 112, 224 and 448 belong to the level above.
    for i, side in enumerate((112.0, 224.0, 448.0)):
        rows[i, 1:] = torch.tensor([8.0, 4.0, 8.0 + side, 4.0 + side])
    boxes = [rows[rows[:, 0] == image, 1:] for image in (0, 1)]
    module = nn.MultiScaleRoIAlign(list("abcd"), 3, 2)
    output = module({**named, "pool": torch.ones(2, 3, 4, 5)}, boxes, [(256, 300), (250, 320)])
    assert module.scales == [1 / s for s in strides]
    joined = torch.cat(boxes)
    images = torch.cat([torch.full((len(b), 1), float(i)) for i, b in enumerate(boxes)])
    levels = _torchvision_levels(joined, 2, 5)
    assert set(levels.tolist()) == {0, 1, 2, 3}
    for i, (input, stride) in enumerate(zip(named.values(), strides, strict=True)):
        pooled = ops.roi_align(input, torch.cat([images, joined], 1), 3, 1 / stride, 2)
        assert torch.equal(output[levels == i], pooled[levels == i])
    assert "featmap_names=['a', 'b', 'c', 'd'], output_size=(3, 3), sampling_ratio=2" in repr(
        module
    )
    with pytest.raises(ValueError, match=r"x must have maps named a, b, c, d; got e"):
        module({"e": named["a"]}, boxes, [(256, 320)])


def test_maps_of_other_proportions() -> None:
    module = nn.MultiScaleRoIAlign(["a"], 3, 2)
    with pytest.raises(
        ValueError, match=r"must have maps of the images' proportions; got \(8, 9\)"
    ):
        module({"a": torch.ones(1, 1, 8, 9)}, [torch.ones(0, 4)], [(32, 128)])


def test_maps_without_pixels() -> None:
    for map, shape in (((8, 0), (32, 32)), ((8, 8), (0, 32))):
        with pytest.raises(ValueError, match="must have sides of at least 1; got"):
            nn.MultiScaleRoIAlign(["a"], 3, 2)(
                {"a": torch.ones(1, 1, *map)}, [torch.ones(0, 4)], [shape]
            )


def test_the_first_call_of_the_module_is_compiled() -> None:
    """It finds the scales of maps whose sizes are symbolic then."""
    module = nn.MultiScaleRoIAlign(["a", "b"], 2, 2)
    maps = {"a": torch.rand(1, 3, 24, 40), "b": torch.rand(1, 3, 12, 20)}
    boxes = torch.tensor([[0.0, 0, 30, 30], [0, 0, 150, 90]])
    compiled = torch.compile(
        lambda a, b: module({"a": a, "b": b}, [boxes], [(96, 160)]),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    output = compiled(*maps.values())
    assert module.scales == [0.25, 0.125]
    assert torch.equal(output, module(maps, [boxes], [(96, 160)]))


def test_single_extractor() -> None:
    """Mmdet's levels: floor(log2(side / finest_scale + 1e-6))."""
    new = Inputs(6)
    strides = (4, 8, 16, 32)
    levels, rois = _pyramid(new, strides), _regions(new, 60, 2)
    for i, side in enumerate((112.0, 224.0, 448.0)):
        rois[i, 1:] = torch.tensor([8.0, 4.0, 8.0 + side, 4.0 + side])
    module = nn.SingleRoIExtractor(3, strides, sampling_ratio=2)
    output = module([*levels, torch.ones(2, 3, 2, 2)], rois)
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    index = torch.log2(side / 56 + 1e-6).floor().clamp(0, 3).long()
    for i, (input, stride) in enumerate(zip(levels, strides, strict=True)):
        pooled = ops.roi_align(input, rois, 3, 1 / stride, 2, True)
        assert torch.equal(output[index == i], pooled[index == i])
    assert "finest_scale=56" in repr(module)


def test_one_level_has_the_gradient_of_roi_align() -> None:
    """No side parts it from another: an empty list, which torch takes for one of tensors."""
    new = Inputs(8)
    rois, maps = _regions(new, 9, 2), new.normal(2, 3, 20, 24).requires_grad_()
    single = nn.SingleRoIExtractor(3, [4.0], sampling_ratio=2)([maps], rois)
    whole = nn.MultiScaleRoIAlign(["0"], 3, 2)
    boxes = [rois[rois[:, 0] == i, 1:] for i in (0, 1)]
    by_image = whole({"0": maps}, boxes, [(80, 96)] * 2)
    expected = ops.roi_align(maps, rois, 3, 0.25, 2, True), ops.roi_align(maps, boxes, 3, 0.25, 2)
    for output, wanted in zip((single, by_image), expected, strict=True):
        along = new.normal(*output.shape)
        gradients = [torch.autograd.grad(x, maps, along)[0] for x in (output, wanted)]
        torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
def test_real_pyramid_equals_cpu(ratio: int, channels_last: bool) -> None:
    """Bands in shared memory on fine levels, whole maps on coarse ones; and gradients."""
    new = Inputs(7)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    levels = [new.normal(2, 32, 200 >> i, 336 >> i).float() for i in range(5)]
    boxes = torch.cat([_regions(new, 400, 2), _regions(new, 400, 2) * 3])
    boxes[:, 0] = torch.arange(800) % 2
    scales, sides = [1 / (4 << i) for i in range(5)], [112.0 * 2**i for i in range(4)]

    def both(device: str) -> list[Any]:
        leaves = [x.to(device).contiguous(memory_format=layout).requires_grad_() for x in levels]
        output = ops.multi_scale_roi_align(leaves, boxes.to(device), 7, scales, sides, ratio)
        return [output.cpu(), *(g.cpu() for g in torch.autograd.grad(output.sum(), leaves))]

    for result, expected in zip(both("cuda"), both("cpu"), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-3, atol=1e-3)
