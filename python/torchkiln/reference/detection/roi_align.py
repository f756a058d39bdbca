"""RoIAlign in plain PyTorch, from the definition: every sample is taken, then pooled.

Source: He et al., "Mask R-CNN", 2017, section 3.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchkiln.testing import FORMATS, Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes
from torchkiln.testing._cases import Arguments

__all__ = ["roi_align"]


def _positions(
    begin: float, end: float, bins: int, ratio: int, aligned: bool, size: int
) -> Tensor | None:
    """(bins, samples) positions on one axis; None for a box without samples."""
    start, extent = begin, end - begin
    if aligned:
        start -= 0.5
    else:
        extent = max(extent, 1.0)
    if not math.isfinite(start) or not math.isfinite(extent) or extent < 0:
        return None
    count = ratio if ratio > 0 else math.ceil(extent / bins)
    if count == 0:
        return None
    bin_begins = torch.arange(bins, dtype=torch.float64)[:, None]
    offsets = (torch.arange(count, dtype=torch.float64)[None] + 0.5) / count
    return start + (bin_begins + offsets) * (extent / bins)


def _bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C, Y, X) samples of a (C, H, W) image at all pairs of positions; 0 off the image.

    Up to one pixel outside counts as the border.
    """
    height, width = image.shape[1:]

    def axis(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inside = (position >= -1) & (position <= size)
        clamped = position.clamp(0, size - 1)
        low = clamped.floor().long()
        return low, (low + 1).clamp(max=size - 1), (clamped - low).to(image), inside.to(image)

    y_low, y_high, y_part, y_inside = axis(y, height)
    x_low, x_high, x_part, x_inside = axis(x, width)
    top = image[:, y_low][:, :, x_low] * (1 - x_part) + image[:, y_low][:, :, x_high] * x_part
    low = image[:, y_high][:, :, x_low] * (1 - x_part) + image[:, y_high][:, :, x_high] * x_part
    values = top * (1 - y_part[:, None]) + low * y_part[:, None]
    is_inside = (y_inside[:, None] * x_inside).bool()
    return torch.where(is_inside, values, torch.zeros_like(values))


def _pool(image: Tensor, y: Tensor, x: Tensor, pooling: int) -> Tensor:
    """(C, bins, bins) of the samples of each bin."""
    samples: Tensor = _bilinear(image, y.flatten(), x.flatten())
    samples = samples.unflatten(2, x.shape).unflatten(1, y.shape).transpose(2, 3).flatten(3)
    return samples.mean(-1) if pooling == 0 else samples.max(-1)[0]


def roi_align(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    pooling: int = 0,
) -> Tensor:
    """Pools each region to a grid of bins.

    Args:
        input: (N, C, H, W).
        boxes: (K, 5) batch index, x1, y1, x2, y2 in image pixels.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per pixel, rounded up.
        aligned: whether positions are moved by half a pixel, and small regions keep their size.
        pooling: 0 average, 1 maximum.

    Returns:
        (K, C, pooled_height, pooled_width). A region without samples, or of no image, gives 0.
    """
    # Half types lose the digits that tell a row from the next one.
    image = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    has_pixels = input.shape[1:].numel() > 0
    pooled = []
    for batch, x1, y1, x2, y2 in boxes.detach().double().tolist():
        box = [value * spatial_scale for value in (x1, y1, x2, y2)]
        x = _positions(box[0], box[2], pooled_width, sampling_ratio, aligned, input.shape[3])
        y = _positions(box[1], box[3], pooled_height, sampling_ratio, aligned, input.shape[2])
        of_image = has_pixels and -1 < batch < input.shape[0]
        if x is None or y is None or not of_image:
            pooled.append(image.new_zeros(input.shape[1], pooled_height, pooled_width))
            continue
        x, y = x.to(image.device), y.to(image.device)
        pooled.append(_pool(image[int(batch)], y, x, pooling))
    if not pooled:
        return input.new_zeros(0, input.shape[1], pooled_height, pooled_width) + 0 * input.sum()
    # Keeps the graph when no region has samples.
    return (torch.stack(pooled) + 0 * image.flatten()[:1].nan_to_num().sum()).to(input.dtype)


def parity() -> Parity:
    """What roi_align is tried on."""
    maximum: dict[str, Any] = {"pool_mode": "max"}
    return Parity(
        op="roi_align",
        tier="B",
        differentiable=("input",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _arguments(new, 12, sampling_ratio=2)),
            Case("aligned", lambda new: _arguments(new, 12, aligned=True)),
            Case("adaptive", lambda new: _arguments(new, 8, output_size=(2, 3))),
            Case("max", lambda new: _arguments(new, 9, sampling_ratio=2, **maximum)),
            Case("max_adaptive", lambda new: _arguments(new, 7, aligned=True, **maximum)),
            Case("no_boxes", lambda new: _arguments(new, 0)),
            Case("no_channels", lambda new: _arguments(new, 3, shape=(1, 0, 5, 6))),
            Case("single", lambda new: _arguments(new, 1, shape=(1, 1, 1, 1), output_size=1)),
            Case("channels_last", lambda new: _channels_last(_arguments(new, 9))),
            Case("channels_last_max", lambda new: _channels_last(_arguments(new, 5, **maximum))),
            # More channels than a warp, regions over many tiles, and enough outputs for the taps'
            # table.
            Case("wide", lambda new: _arguments(new, 30, shape=(2, 48, 19, 35), sampling_ratio=2)),
            Case(
                "wide_channels_last",
                lambda new: _channels_last(_arguments(new, 30, shape=(2, 48, 19, 35))),
            ),
            # Several channels of a lane, not a multiple of them; more bins in a tile, and more
            # regions, than the gradient looks at together.
            Case("many_channels", lambda new: _arguments(new, 9, (1, 140, 9, 11))),
            Case("some_channels", lambda new: _arguments(new, 9, (1, 70, 9, 11))),
            Case("many_bins", lambda new: _arguments(new, 4, (1, 2, 9, 11), (19, 36))),
            Case("crowded", lambda new: _arguments(new, 1030, (1, 2, 5, 6), 2, sampling_ratio=1)),
            Case("border", _border),
            Case("degenerate", _degenerate),
        ),
        workloads=(
            Workload("pyramid", _PYRAMID, _regions, layouts=tuple(FORMATS)),
            # Mask R-CNN's second head.
            Workload(
                "masks", {**_PYRAMID, "regions": 128, "bins": 14}, _regions, layouts=tuple(FORMATS)
            ),
            Workload("maximum", _PYRAMID, _maxima, layouts=tuple(FORMATS)),
            # One image at a coarse level, as in a small detector.
            Workload("coarse", _COARSE, _regions),
        ),
    )


_PYRAMID = {**scenes.PYRAMID_LEVEL, "ratio": 2}
_COARSE = {**_PYRAMID, "images": 1, "height": 50, "width": 84, "regions": 64, "stride": 16}


def _regions(sizes: Sizes) -> dict[str, Any]:
    return {
        **scenes.pooling(sizes),
        "output_size": sizes["bins"],
        "spatial_scale": 1 / sizes["stride"],
        "sampling_ratio": sizes["ratio"],
    }


def _maxima(sizes: Sizes) -> dict[str, Any]:
    return {**_regions(sizes), "pool_mode": "max"}


def _arguments(
    new: Inputs,
    count: int,
    shape: tuple[int, int, int, int] = (2, 5, 13, 17),
    output_size: int | tuple[int, int] = 7,
    **options: Any,
) -> dict[str, Any]:
    """Regions inside and around an input of which four image pixels make one."""
    extent = torch.tensor([shape[3], shape[2]]) * 4.0
    corner = new.uniform(count, 2, low=-0.2, high=0.8) * extent
    far = corner + new.uniform(count, 2, high=0.8) * extent
    batch = new.integers(count, 1, high=shape[0]).double()
    # On a grid that every dtype can hold: positions, unlike values, must not be rounded apart.
    boxes = torch.cat([batch, (corner * 2).round() / 2, (far * 2).round() / 2], dim=1)
    boxes = boxes.bfloat16().double()
    return {
        "input": new.normal(*shape),
        "boxes": boxes,
        "output_size": output_size,
        "spatial_scale": 0.25,
        **options,
    }


def _channels_last(arguments: dict[str, Any]) -> dict[str, Any]:
    image = arguments["input"]
    assert isinstance(image, Tensor)
    return {**arguments, "input": image.contiguous(memory_format=torch.channels_last)}


def _border(new: Inputs) -> dict[str, Any]:
    """Samples on the border, within a pixel of it and beyond."""
    rows = [[0, -2, -2, 2, 2], [0, 3, 3, 8, 8], [0, -1, -1, 7, 6], [0, 20, 20, 30, 30]]
    return {
        "input": new.normal(1, 2, 6, 7),
        "boxes": torch.tensor(rows, dtype=torch.float64),
        "output_size": 4,
        "sampling_ratio": 1,
        "aligned": True,
    }


def _degenerate(new: Inputs) -> dict[str, Any]:
    """Points, exchanged corners, NaN and infinities."""
    nan, inf = math.nan, math.inf
    rows = [[0, 2, 2, 2, 2], [0, 4, 1, 2, 3], [0, nan, 0, 3, 3], [0, 0, 0, inf, 3]]
    rows += [[0, 0, -inf, 3, 3], [0, 1, 1, 3, 3]]
    return {
        "input": new.normal(1, 2, 6, 7),
        "boxes": torch.tensor(rows, dtype=torch.float64),
        "output_size": 2,
        "aligned": True,
    }


def takes_all_samples(arguments: Arguments) -> bool:
    """Whether the reference would take all samples of a region, of any size."""
    return not arguments["sampling_ratio"] > 0


def _fuzz(draw: Draw) -> dict[str, Any]:
    shape = (draw.size(3), draw.option("channels", 0, 1, 3, 8, 40), draw.size(16), draw.size(16))
    output_size = draw.option("output_size", 1, 2, (3, 1), 7)
    ratio = draw.option("sampling_ratio", 0, 1, 2, 3)
    draw.undefined("scaled", where=takes_all_samples)
    return {
        "input": draw.values(*shape, special=False),
        "boxes": draw.regions(draw.size(8), shape[0], 60.0),
        "output_size": output_size,
        "spatial_scale": draw.pick(0.25, 1.0, 0.1),
        "sampling_ratio": ratio,
        "aligned": draw.option("aligned", False, True),
        "pool_mode": draw.option("pool_mode", "avg", "max"),
    }
