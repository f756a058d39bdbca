"""Precise pooling of regions in plain PyTorch, differentiated by torch in the boxes too.

Source: Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection", 2018,
section 3.2.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchkiln.testing import FORMATS, Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["prroi_pool"]


def _ramp_integral(position: Tensor) -> Tensor:
    """The integral of max(0, 1 - |t|) up to a position."""
    inside = position.clamp(-1, 1)
    return torch.where(inside < 0, (inside + 1) ** 2 / 2, 1 - (1 - inside) ** 2 / 2)


def _shares(low: Tensor, size: Tensor, bins: int, pixels: int) -> Tensor:
    """(K, bins, pixels): what each bin of an axis takes of each pixel; 0 without a size."""
    edges = torch.arange(bins + 1, dtype=low.dtype, device=low.device) / bins
    at = low[:, None] + edges * size[:, None]
    pixel = torch.arange(pixels, dtype=low.dtype, device=low.device)
    whole = _ramp_integral(at[:, :, None] - pixel)
    return (whole[:, 1:] - whole[:, :-1]) * bins / size[:, None, None]


def prroi_pool(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Averages the interpolated map over each bin.

    Args:
        input: (N, C, H, W).
        boxes: (K, 5) batch index, x1, y1, x2, y2 in image pixels.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scale: input pixels per image pixel.

    Returns:
        (K, C, pooled_height, pooled_width). A region without area, or of no image,
        gives 0.
    """
    image = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    # Differences of integrals lose the digits that small bins need.
    box = boxes[:, 1:].double() * spatial_scale
    low, size = box[:, :2], box[:, 2:] - box[:, :2]
    batch = boxes[:, 0].detach()
    exists = (size > 0).all(1) & box.detach().isfinite().all(1)
    exists &= (batch > -1) & (batch < len(input))
    low = torch.where(exists[:, None], low, 0.0)
    size = torch.where(exists[:, None], size, 1.0)
    y = _shares(low[:, 1], size[:, 1], pooled_height, input.shape[2])
    x = _shares(low[:, 0], size[:, 0], pooled_width, input.shape[3])
    # The others take an image of zeros behind the last one.
    index = torch.where(exists, batch, len(input)).long()
    maps = torch.cat([image, image.new_zeros(1, *input.shape[1:])])[index].double()
    pooled = torch.einsum("kph,kchw,kqw->kcpq", y, maps, x)
    return torch.where(exists[:, None, None, None], pooled, 0.0).to(input.dtype)


def parity() -> Parity:
    """What prroi_pool is tried on."""
    return Parity(
        op="prroi_pool",
        tier="B",
        fuzz=_fuzz,
        differentiable=("input", "boxes"),
        cases=(
            Case("typical", lambda new: _arguments(new, 9)),
            Case("oblong", lambda new: _arguments(new, 7, output_size=(2, 5))),
            Case("no_boxes", lambda new: _arguments(new, 0)),
            Case("single", lambda new: _arguments(new, 1, shape=(1, 1, 1, 1), output_size=1)),
            Case("channels_last", lambda new: _channels_last(_arguments(new, 7))),
            # More channels than a warp, regions over many tiles.
            Case("wide", lambda new: _arguments(new, 12, shape=(2, 40, 19, 35))),
            Case(
                "wide_channels_last",
                lambda new: _channels_last(_arguments(new, 9, shape=(1, 40, 17, 20))),
            ),
            # Many pixels a bin; and corners on pixels, where the gradient jumps.
            Case("large_bins", lambda new: _arguments(new, 5, (1, 3, 40, 50), output_size=1)),
            Case("degenerate", _degenerate, gradient=False),
        ),
        workloads=(
            Workload("head", _HEAD, _workload, layouts=tuple(FORMATS)),
            # IoU-Net refines its boxes by their gradient.
            Workload("refine", {**_HEAD, "regions": 100, "height": 100, "width": 168}, _workload),
        ),
    )


_HEAD = {**scenes.PYRAMID_LEVEL, "images": 2}


def _workload(sizes: Sizes) -> dict[str, Any]:
    return {
        **scenes.pooling(sizes),
        "output_size": sizes["bins"],
        "spatial_scale": 1 / sizes["stride"],
    }


def _arguments(
    new: Inputs,
    count: int,
    shape: tuple[int, int, int, int] = (2, 5, 13, 17),
    output_size: int | tuple[int, int] = 3,
    **options: Any,
) -> dict[str, Any]:
    """Regions inside and around an input of which two image pixels make one."""
    extent = torch.tensor([shape[3], shape[2]]) * 2.0
    corner = new.uniform(count, 2, low=-0.2, high=0.7) * extent
    far = corner + (0.1 + new.uniform(count, 2, high=0.6)) * extent
    # An index is cut to a whole number: in between, finite differences find no slope.
    batch = new.integers(count, 1, high=shape[0]).double() + 0.5
    # On a grid that every dtype can hold, and off the pixels, where the gradient jumps.
    rows = torch.cat([(corner * 2).round() / 2, (far * 2).round() / 2], 1) + 0.25
    return {
        "input": new.normal(*shape),
        "boxes": torch.cat([batch, rows], dim=1).bfloat16().double(),
        "output_size": output_size,
        "spatial_scale": 0.5,
        **options,
    }


def _channels_last(arguments: dict[str, Any]) -> dict[str, Any]:
    image = arguments["input"]
    assert isinstance(image, Tensor)
    return {**arguments, "input": image.contiguous(memory_format=torch.channels_last)}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """Points, lines, exchanged corners, regions outside, tiny and huge ones, NaN, infinities."""
    nan, inf = math.nan, math.inf
    rows: list[list[float]] = [[0, 2, 2, 2, 2], [0, 2, 1, 2, 3], [0, 4, 1, 2, 3]]
    rows += [[0, 1, 1, 3, 3], [0, 0, 0, 6, 5]]
    rows += [[0, -9, -9, -2, -2], [0, 20, 3, 30, 5], [0, -2, -2, 9, 9], [0, -0.5, -0.5, 0.5, 0.5]]
    rows += [[0, 2.25, 2.25, 2.2578125, 2.2578125], [0, -1000, -1000, 1000, 1000]]
    rows += [[0, nan, 0, 3, 3], [0, 0, 0, inf, 3], [0, 0, -inf, 3, 3]]
    return {
        "input": new.normal(1, 2, 6, 7),
        "boxes": torch.tensor(rows, dtype=torch.float64),
        "output_size": 2,
    }


def _fuzz(draw: Draw) -> dict[str, Any]:
    shape = (draw.size(3), draw.option("channels", 0, 1, 5, 40), draw.size(16), draw.size(16))
    return {
        "input": draw.values(*shape, special=False),
        "boxes": draw.regions(draw.size(6), shape[0], 60.0),
        "output_size": draw.option("output_size", 1, 2, (3, 1)),
        "spatial_scale": draw.pick(0.25, 1.0, 0.1),
    }
