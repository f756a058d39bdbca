"""RoIAlign over a pyramid in plain PyTorch.

Source: Lin et al., "Feature Pyramid Networks for Object Detection", 2017, section 4.2.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.roi_align import roi_align, takes_all_samples
from torchkiln.testing import FORMATS, Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["multi_scale_roi_align"]


def multi_scale_roi_align(
    inputs: Sequence[Tensor],
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scales: Sequence[float],
    level_sides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pools each region on its level.

    Args:
        inputs: (N, C, H, W) of each level, finest first.
        boxes: (K, 5) batch index, x1, y1, x2, y2 in image pixels.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scales: input pixels per image pixel of each level.
        level_sides: the side of the smallest square of each level but the first.
        sampling_ratio: samples per bin and axis; 0 or less: one per pixel, rounded up.
        aligned: whether positions are moved by half a pixel, and small regions keep their size.

    Returns:
        (K, C, pooled_height, pooled_width).
    """
    size = (pooled_height, pooled_width)
    pooled = inputs[0].new_zeros(boxes.shape[0], inputs[0].shape[1], *size)
    levels = [
        sum((x2 - x1) * (y2 - y1) >= side * side for side in level_sides)
        for _, x1, y1, x2, y2 in boxes.detach().double().tolist()
    ]
    for index, (input, scale) in enumerate(zip(inputs, spatial_scales, strict=True)):
        rows = torch.tensor([i for i, level in enumerate(levels) if level == index]).long()
        rows = rows.to(boxes.device)
        of_level = roi_align(input, boxes[rows], *size, scale, sampling_ratio, aligned)
        pooled = pooled.index_add(0, rows, of_level)
    return pooled


def _three(fine: Tensor, middle: Tensor, coarse: Tensor, **others: Any) -> dict[str, Any]:
    """Three levels, each a differentiable argument of its own."""
    return {"inputs": [fine, middle, coarse], **others}


def parity() -> Parity:
    """What multi_scale_roi_align is tried on."""
    return Parity(
        op="multi_scale_roi_align",
        tier="B",
        fuzz=_fuzz,
        arrange=_three,
        differentiable=("fine", "middle", "coarse"),
        cases=(
            Case("typical", lambda new: _arguments(new, 12, sampling_ratio=2)),
            Case("aligned", lambda new: _arguments(new, 9, aligned=True, sampling_ratio=1)),
            Case("adaptive", lambda new: _arguments(new, 9, output_size=(2, 3))),
            Case("no_boxes", lambda new: _arguments(new, 0)),
            Case("single", lambda new: _arguments(new, 1, 1, 1)),
            Case("channels_last", lambda new: _channels_last(_arguments(new, 9))),
            # More channels than a warp, an odd number of them.
            Case("wide", lambda new: _arguments(new, 20, channels=49, sampling_ratio=2)),
            Case("wide_channels_last", lambda new: _channels_last(_arguments(new, 9, channels=40))),
            Case("degenerate", _degenerate),
            Case("no_pixels", _without_pixels),
        ),
        workloads=(
            # Faster R-CNN R50-FPN: an image of 800 x 1344, and its pyramid from stride 4 to 32.
            Workload("pyramid", _PYRAMID, _workload, layouts=tuple(FORMATS)),
            Workload("masks", {**_PYRAMID, "regions": 100, "bins": 14}, _workload),
        ),
    )


_PYRAMID = {
    "images": 1, "channels": 256, "height": 200, "width": 336, "regions": 1000, "bins": 7,
    "stride": 4, "ratio": 2,
}  # fmt: skip


def _workload(sizes: Sizes) -> dict[str, Any]:
    """The three finest levels of a pyramid, with the sides of its paper."""
    height, width, stride = sizes["height"], sizes["width"], sizes["stride"]
    shape = (sizes["images"], sizes["channels"])
    levels = {
        name: scenes.normal((*shape, height >> i, width >> i), scenes.SEED + i)
        for i, name in enumerate(("fine", "middle", "coarse"))
    }
    image = (float(height * stride), float(width * stride))
    return {
        **levels,
        "boxes": scenes.regions(sizes["regions"], sizes["images"], scenes.SEED, image),
        "output_size": sizes["bins"],
        "spatial_scales": [1 / (stride << i) for i in range(3)],
        "level_sides": [112.0, 224.0],
        "sampling_ratio": sizes["ratio"],
    }


def _arguments(
    new: Inputs,
    count: int,
    output_size: int | tuple[int, int] = 3,
    channels: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Regions of 2 to 40 pixels inside and around an image of 36 x 28."""
    extent = torch.tensor([36.0, 28.0])
    center = new.uniform(count, 2, low=-0.1, high=1.1) * extent
    half = torch.exp(new.uniform(count, 2) * math.log(20.0))
    batch = new.integers(count, 1, high=2).double()
    # On a grid that every dtype can hold: positions, unlike values, must not be rounded apart.
    corners = torch.cat([center - half, center + half], 1).mul(2).round().div(2)
    return {
        "fine": new.normal(2, channels, 14, 18),
        "middle": new.normal(2, channels, 7, 9),
        "coarse": new.normal(2, channels, 4, 5),
        "boxes": torch.cat([batch, corners], 1).bfloat16().double(),
        "output_size": output_size,
        "spatial_scales": [0.5, 0.25, 0.125],
        "level_sides": [8.0, 16.0],
        **options,
    }


def _without_pixels(new: Inputs) -> dict[str, Any]:
    """A level that regions belong to, and has no rows."""
    problem = _arguments(new, 9, sampling_ratio=2)
    return {**problem, "middle": problem["middle"][:, :, :0]}


def _channels_last(arguments: dict[str, Any]) -> dict[str, Any]:
    last = {
        name: arguments[name].contiguous(memory_format=torch.channels_last)
        for name in ("fine", "middle", "coarse")
    }
    return {**arguments, **last}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """Areas on the border of two levels, exchanged corners, points, and what is not finite."""
    nan, inf = math.nan, math.inf
    rows: list[list[float]] = [
        [0, 0, 0, 8, 8],
        [0, 0, 0, 16, 16],
        [0, 0, 0, 4, 16],
        [0, 8, 8, 0, 0],
    ]
    rows += [
        [0, 8, 8, 0, 0],
        [1, 20, 20, 3, 3],
        [1, 9, 3, 3, 9],
        [0, 5, 5, 5, 5],
        [0, nan, 0, 9, 9],
    ]
    rows += [[0, 0, 0, inf, 9], [1, -inf, -inf, inf, inf], [1, 0, 0, 1000, 1000]]
    return {
        **_arguments(new, 0),
        "boxes": torch.tensor(rows, dtype=torch.float64),
        "output_size": 2,
        "sampling_ratio": 2,
    }


def _fuzz(draw: Draw) -> dict[str, Any]:
    images, channels = draw.size(3), draw.option("channels", 0, 1, 5, 40)
    ratio = draw.option("sampling_ratio", 0, 1, 3)
    draw.undefined("scaled", where=takes_all_samples)
    levels = {
        name: draw.values(images, channels, draw.size(16, 1), draw.size(16, 1), special=False)
        for name in ("fine", "middle", "coarse")
    }
    return {
        **levels,
        "boxes": draw.regions(draw.size(6), images, 60.0),
        "output_size": draw.option("output_size", 1, 2, (3, 1)),
        "spatial_scales": [0.5, 0.25, 0.125],
        "level_sides": [16.0, 32.0],
        "sampling_ratio": ratio,
        "aligned": draw.option("aligned", False, True),
    }
