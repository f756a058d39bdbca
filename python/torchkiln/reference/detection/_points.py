"""What references that pool bilinear samples share: samples at points of any place, and cases."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.roi_align import takes_all_samples
from torchkiln.testing import Draw, Inputs


def wide(input: Tensor) -> Tensor:
    """Half types lose the digits that tell a sample from the next one."""
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


def samples(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C, *) bilinear samples of a (C, H, W) image at points; up to a pixel outside, the border."""
    height, width = image.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    # Off the map any place will do.
    y = torch.where(inside, y, torch.zeros_like(y)).clamp(0, height - 1)
    x = torch.where(inside, x, torch.zeros_like(x)).clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    low, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, across = (y - top).to(image), (x - left).to(image)
    upper = image[:, top, left] * (1 - across) + image[:, top, right] * across
    lower = image[:, low, left] * (1 - across) + image[:, low, right] * across
    values = upper * (1 - down) + lower * down
    return torch.where(inside, values, torch.zeros_like(values))


def counts(sizes: tuple[float, float], ratio: int) -> tuple[int, int] | None:
    """Samples of a bin on each axis; None where there are none."""
    if not all(map(math.isfinite, sizes)) or min(sizes) < 0:
        return None
    rows, columns = (ratio if ratio > 0 else math.ceil(size) for size in sizes)
    return (rows, columns) if rows and columns else None


def middles(parts: int) -> Tensor:
    """The middles of equal parts of a length of 1."""
    return (torch.arange(parts, dtype=torch.float64) + 0.5) / parts


def pooled(
    input: Tensor,
    rows: Tensor,
    bins: tuple[int, int],
    points: Callable[[list[float]], tuple[Tensor, Tensor] | None],
    turned: Callable[[Tensor, list[float]], Tensor] = lambda output, row: output,
) -> Tensor:
    """(K, C, *bins) averages of samples; 0 for a batch index out of range.

    Args:
        input: (N, C, H, W).
        rows: (K, columns), batch index first.
        bins: height and width.
        points: y and x, (*bins, samples), of a row; None for no samples.
        turned: what is done with the output of a row.
    """
    image = wide(input)
    has_pixels = input.shape[1:].numel() > 0
    outputs = []
    for row in rows.detach().double().tolist():
        at = points(row) if has_pixels and -1 < row[0] < input.shape[0] else None
        if at is None:
            outputs.append(image.new_zeros(input.shape[1], *bins))
            continue
        y, x = (position.to(image.device) for position in at)
        outputs.append(turned(samples(image[int(row[0])], y, x).mean(-1), row))
    if not outputs:
        return input.new_zeros(0, input.shape[1], *bins) + 0 * input.sum()
    # Keeps the graph when no region has samples.
    return (torch.stack(outputs) + 0 * image.flatten()[:1].nan_to_num().sum()).to(input.dtype)


def rounded(values: Tensor) -> Tensor:
    """On a grid that every dtype holds: positions, unlike values, must not be rounded apart."""
    return ((values * 4).round() / 4).bfloat16().double()


def rotated_boxes(new: Inputs, count: int, shape: tuple[int, ...], stride: float = 4.0) -> Tensor:
    """(count, 6) regions in and around maps of (N, C, H, W), `stride` image pixels to one of them.

    Angles of more than a turn are among them, none near a multiple of an eighth of a turn.
    """
    extent = torch.tensor([shape[3], shape[2]]) * stride
    center = new.uniform(count, 2, low=-0.1, high=1.1) * extent
    size = new.uniform(count, 2, low=0.1, high=0.8) * extent
    eighths = new.integers(count, 1, low=-20, high=20) + new.uniform(count, 1, low=0.2, high=0.8)
    image = new.integers(count, 1, high=shape[0]).double()
    angle = (eighths * math.pi / 4).bfloat16().double()
    return torch.cat([image, rounded(center), rounded(size), angle], 1)


def channels_last(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with an input of channels last."""
    return {
        **arguments,
        "input": arguments["input"].contiguous(memory_format=torch.channels_last),
    }


def drawn(draw: Draw, channels: int) -> dict[str, Any]:
    """A map and the options that operators on regions share, for a random call."""
    ratio = draw.option("sampling_ratio", 0, 1, 3)
    draw.undefined("scaled", where=takes_all_samples)
    return {
        "input": draw.values(draw.size(3), channels, draw.size(16), draw.size(16), special=False),
        "output_size": draw.option("output_size", 1, 2, (3, 1)),
        "spatial_scale": draw.pick(0.25, 1.0, 0.1),
        "sampling_ratio": ratio,
        "deterministic": draw.option("deterministic", True, False),
    }
