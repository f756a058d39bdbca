"""border_align in plain PyTorch, from the definition.

Source: Qiu et al., "BorderDet: Border Feature for Dense Object Detection", 2020, section 3.2.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection import _points
from torchkiln.testing import FORMATS, Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["border_align"]


def border_align(
    input: Tensor,
    boxes: Tensor,
    pool_size: int,
    deterministic: bool = False,
    with_argmax: bool = True,
) -> tuple[Tensor, Tensor]:
    """Takes the greatest sample along each border.

    Args:
        input: (N, 4 * C, H, W).
        boxes: (N, B, 4) x1, y1, x2, y2 in pixels of the input.
        pool_size: parts of a border.
        deterministic: no effect.
        with_argmax: whether the winners are returned.

    Returns:
        (N, C, B, 4), and the number of the winning sample of each.
    """
    image = _points.wide(input)
    channels = input.shape[1] // 4
    outputs = []
    winners = []
    parts = torch.arange(pool_size + 1, dtype=torch.float64, device=input.device) / pool_size
    for blocks, rows in zip(image.unflatten(1, (4, channels)), boxes.double(), strict=True):
        x1, y1, x2, y2 = (value[:, None] for value in rows.unbind(1))
        across, down = (x2 - x1) * parts, (y2 - y1) * parts
        ends = [(y1 + 0 * parts, x1 + across), (y1 + down, x1 + 0 * parts)]
        ends += [(y2 + 0 * parts, x2 - across), (y2 - down, x2 + 0 * parts)]
        if input[0].numel():
            lines = [_points.samples(block, *at) for block, at in zip(blocks, ends, strict=True)]
        else:
            lines = [image.new_zeros(channels, len(rows), 1) + 0 * image.sum()] * 4
        values, places = torch.stack(lines, 2).max(-1)
        outputs.append(values)
        winners.append(places if input[0].numel() else places - 1)
    shape = (input.shape[0], channels, boxes.shape[1], 4)
    output = torch.stack(outputs) if outputs else input.new_zeros(shape) + 0 * input.sum()
    argmax = torch.stack(winners).int() if winners else input.new_empty(shape, dtype=torch.int32)
    return output.to(input.dtype), argmax if with_argmax else argmax.new_empty(0)


def parity() -> Parity:
    """What border_align is tried on."""
    return Parity(
        op="border_align",
        tier="B",
        differentiable=("input",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _arguments(new, 12, 4)),
            Case("ends", lambda new: _arguments(new, 5, 1)),
            Case("long", lambda new: _arguments(new, 3, 70, (1, 8, 9, 7))),
            Case("no_boxes", lambda new: _arguments(new, 0, 2)),
            Case("no_channels", lambda new: _arguments(new, 3, 2, (1, 0, 5, 6))),
            Case("no_pixels", lambda new: _arguments(new, 3, 2, (2, 4 * 40, 0, 0))),
            Case("single", lambda new: _arguments(new, 1, 1, (1, 4, 1, 1))),
            Case("wide", lambda new: _arguments(new, 30, 3, (2, 4 * 40, 6, 5))),
            Case("channels_last", lambda new: _points.channels_last(_arguments(new, 7, 3))),
            Case(
                "wide_channels_last",
                lambda new: _points.channels_last(_arguments(new, 20, 2, (1, 4 * 48, 6, 5))),
            ),
            Case("degenerate", _degenerate),
        ),
        workloads=(Workload("head", _HEAD, _boxes, layouts=tuple(FORMATS)),),
    )


# BorderDet on the finest level of its pyramid: a box for each pixel.
_HEAD = {"images": 1, "channels": 256, "height": 100, "width": 168, "pool": 10}


def _boxes(sizes: Sizes) -> dict[str, Any]:
    height, width = sizes["height"], sizes["width"]
    shape = (sizes["images"], 4 * sizes["channels"], height, width)
    count = sizes["images"] * height * width
    boxes = scenes.uniform_boxes(count, scenes.SEED, 2, 64, (float(height), float(width)))
    return {
        "input": scenes.normal(shape, scenes.SEED),
        "boxes": boxes.reshape(sizes["images"], height * width, 4),
        "pool_size": sizes["pool"],
    }


def _arguments(
    new: Inputs, count: int, pool_size: int, shape: tuple[int, int, int, int] = (2, 12, 11, 9)
) -> dict[str, Any]:
    """Boxes in and around the map, some with exchanged corners."""
    extent = torch.tensor([shape[3], shape[2]] * 2)
    corners = new.uniform(shape[0], count, 4, low=-0.3, high=1.3) * extent
    own = {"input": new.normal(*shape), "boxes": corners.bfloat16().double()}
    return {**own, "pool_size": pool_size, "deterministic": True}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """A point, on the border, outside, NaN, infinity."""
    nan, inf = math.nan, math.inf
    rows = [[2, 2, 2, 2], [-1, -1, 7, 6], [20, 20, 30, 30], [nan, 1, 3, 3], [0, 0, inf, 3]]
    own = {"input": new.normal(1, 8, 6, 7), "boxes": torch.tensor([rows], dtype=torch.float64)}
    return {**own, "pool_size": 3, "deterministic": True}


def _fuzz(draw: Draw) -> dict[str, Any]:
    images, count = draw.size(3), draw.size(6)
    shape = (images, 4 * draw.option("channels", 0, 1, 3, 40), draw.size(), draw.size())
    return {
        "input": draw.values(*shape, special=False),
        "boxes": draw.boxes(images * count, 16.0).reshape(images, count, 4),
        "pool_size": draw.option("pool_size", 1, 3, 10),
        "deterministic": draw.option("deterministic", True, False),
    }
