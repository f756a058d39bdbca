"""Position-sensitive pooling in plain PyTorch, from Dai et al., "R-FCN", 2016, section 2."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.roi_align import roi_align, takes_all_samples
from torchkiln.testing import FORMATS, Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["ps_roi_align", "ps_roi_pool"]


def _own_channels(pooled: Tensor) -> Tensor:
    """(K, C, H, W) to (K, C / (H W), H, W): of all channels pooled, those that belong to a bin."""
    height, width = pooled.shape[2:]
    count = pooled.shape[1] // (height * width)
    by_bin = pooled.unflatten(1, (count, height, width))
    own: Tensor = by_bin.diagonal(dim1=2, dim2=4).diagonal(dim1=2, dim2=3)
    return own


def ps_roi_align(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """Pools each region; each bin out of channels of its own.

    Args:
        input: (N, C, H, W).
        boxes: (K, 5) batch index, x1, y1, x2, y2 in image pixels.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per pixel, rounded up.

    Returns:
        (K, C / bins, pooled_height, pooled_width). A region without samples, or of no image,
        gives 0.
    """
    size = (pooled_height, pooled_width)
    return _own_channels(roi_align(input, boxes, *size, spatial_scale, sampling_ratio, True))


def _rounded(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _shares(low: float, high: float, bins: int, limit: int) -> Tensor:
    """(bins, limit): the share of each cell in each bin of an axis."""
    shares = torch.zeros(bins, limit, dtype=torch.float64)
    if not (math.isfinite(low) and math.isfinite(high)):
        return shares
    first = _rounded(low)
    size = Fraction(max(_rounded(high) - first, 1), bins)
    for bin in range(bins):
        begin = min(max(first + math.floor(bin * size), 0), limit)
        end = min(max(first + math.ceil((bin + 1) * size), 0), limit)
        if begin < end:
            shares[bin, begin:end] = 1 / (end - begin)
    return shares


def ps_roi_pool(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Averages the cells of each bin, out of channels of its own.

    Args:
        input: (N, C, H, W).
        boxes: (K, 5) batch index, x1, y1, x2, y2 in image pixels.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scale: input cells per image pixel.

    Returns:
        (K, C / bins, pooled_height, pooled_width). A bin without cells, or of no image, gives 0.
    """
    image = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    count = input.shape[1] // (pooled_height * pooled_width)
    # Keeps the graph when there is no region.
    pooled = [image.new_zeros(0, count, pooled_height, pooled_width) + 0 * image.sum()]
    for batch, *box in boxes.detach().double().tolist():
        if not -1 < batch < input.shape[0]:
            pooled.append(image.new_zeros(1, count, pooled_height, pooled_width))
            continue
        x1, y1, x2, y2 = (value * spatial_scale for value in box)
        y = _shares(y1, y2, pooled_height, input.shape[2]).to(image)
        x = _shares(x1, x2, pooled_width, input.shape[3]).to(image)
        maps = image[int(batch)].unflatten(0, (count, pooled_height, pooled_width))
        shares = y[:, None, :, None] * x[None, :, None, :]
        # A cell outside of a bin does not count, whatever its value.
        pooled.append((torch.where(shares > 0, maps, 0) * shares).sum((3, 4))[None])
    return torch.cat(pooled).to(input.dtype)


def parities() -> tuple[Parity, ...]:
    """What both are tried on."""
    return _parity("ps_roi_align", {"sampling_ratio": 2}), _parity("ps_roi_pool", {})


def _parity(op: str, typical: dict[str, Any]) -> Parity:
    return Parity(
        op=op,
        tier="B",
        fuzz=_fuzz,
        differentiable=("input",),
        cases=(
            Case("typical", lambda new: _arguments(new, 9, **typical)),
            Case("no_boxes", lambda new: _arguments(new, 0)),
            Case("single", lambda new: _arguments(new, 1, shape=(1, 1, 1, 1), output_size=1)),
            Case("channels_last", lambda new: _channels_last(_arguments(new, 7, **typical))),
            # More channels than a warp, regions over many tiles.
            Case("wide", lambda new: _arguments(new, 20, (2, 54, 19, 35), (2, 3), **typical)),
            # More outputs than a warp has lanes, and fewer; more regions than a block looks at.
            Case("many_outputs", lambda new: _arguments(new, 9, (1, 80, 9, 11), (2, 1), **typical)),
            Case("some_outputs", lambda new: _arguments(new, 9, (1, 44, 9, 11), 2, **typical)),
            Case("crowded", lambda new: _arguments(new, 530, (1, 2, 5, 37), (2, 1), **typical)),
            Case("adaptive", lambda new: _arguments(new, 6, output_size=(3, 2))),
            Case("degenerate", _degenerate),
        ),
        workloads=(
            # R-FCN's 21 classes, and the thin head of Light-Head R-CNN.
            Workload("rfcn", _RFCN, lambda sizes: _workload(op, sizes), layouts=tuple(FORMATS)),
            Workload("light_head", _LIGHT, lambda sizes: _workload(op, sizes)),
        ),
    )


_RFCN = {
    "images": 1, "outputs": 21, "height": 38, "width": 63, "regions": 300, "bins": 7,
    "stride": 16,
}  # fmt: skip
_LIGHT = {**_RFCN, "outputs": 10, "height": 50, "width": 84, "regions": 1000}


def _workload(op: str, sizes: Sizes) -> dict[str, Any]:
    options = {"sampling_ratio": 2} if op == "ps_roi_align" else {}
    return {
        **scenes.pooling({**sizes, "channels": sizes["outputs"] * sizes["bins"] ** 2}),
        "output_size": sizes["bins"],
        "spatial_scale": 1 / sizes["stride"],
        **options,
    }


def _arguments(
    new: Inputs,
    count: int,
    shape: tuple[int, int, int, int] = (2, 18, 13, 17),
    output_size: int | tuple[int, int] = 3,
    **options: Any,
) -> dict[str, Any]:
    """Regions inside and around an input of which four image pixels make one."""
    extent = torch.tensor([shape[3], shape[2]]) * 4.0
    corner = new.uniform(count, 2, low=-0.2, high=0.8) * extent
    far = corner + new.uniform(count, 2, high=0.8) * extent
    batch = new.integers(count, 1, high=shape[0]).double()
    # On a grid that every dtype can hold: positions, unlike values, must not be rounded apart.
    boxes = torch.cat([batch, (corner * 2).round() / 2, (far * 2).round() / 2], dim=1)
    return {
        "input": new.normal(*shape),
        "boxes": boxes.bfloat16().double(),
        "output_size": output_size,
        "spatial_scale": 0.25,
        **options,
    }


def _channels_last(arguments: dict[str, Any]) -> dict[str, Any]:
    image = arguments["input"]
    assert isinstance(image, Tensor)
    return {**arguments, "input": image.contiguous(memory_format=torch.channels_last)}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """Points, exchanged corners, NaN, infinities, halves, and regions outside."""
    nan, inf = math.nan, math.inf
    rows = [[0, 2, 2, 2, 2], [0, 4, 1, 2, 3], [0, nan, 0, 3, 3], [0, 0, 0, inf, 3]]
    rows += [[0, 0, -inf, 3, 3], [0, 0.5, 1.5, 4.5, 5.5], [0, -9, -9, -2, -2], [0, 20, 3, 30, 5]]
    rows += [[0, -2, -2, 9, 9]]
    return {
        "input": new.normal(1, 4, 6, 7),
        "boxes": torch.tensor(rows, dtype=torch.float64),
        "output_size": 2,
    }


def _fuzz(draw: Draw) -> dict[str, Any]:
    output_size = draw.option("output_size", 1, 2, (3, 1))
    bins = {1: 1, 2: 4, (3, 1): 3}[output_size]
    shape = (draw.size(3), bins * draw.option("groups", 0, 1, 5), draw.size(16), draw.size(16))
    arguments = {
        "input": draw.values(*shape, special=False),
        "boxes": draw.regions(draw.size(6), shape[0], 60.0),
        "output_size": output_size,
        "spatial_scale": draw.pick(0.25, 1.0, 0.1),
    }
    if draw.function == "ps_roi_pool":
        return arguments
    ratio = draw.option("sampling_ratio", 0, 1, 3)
    draw.undefined("scaled", where=takes_all_samples)
    return {**arguments, "sampling_ratio": ratio}
