"""roi_pool in plain PyTorch, one bin at a time, from Girshick 2015, section 2.1."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch
from torch import Tensor

from torchkiln.testing import FORMATS, Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["roi_pool"]


def _cuts(
    low: float, high: float, scale: float, bins: int, limit: int, rounding: bool
) -> list[tuple[int, int]]:
    """First cell and one past the last one of each bin along one side, inside of the image."""
    if rounding:
        first = math.floor(abs(low * scale) + 0.5) * (1 if low * scale > 0 else -1)
        last = math.floor(abs(high * scale) + 0.5) * (1 if high * scale > 0 else -1)
        start, size = Fraction(first), Fraction(max(last - first + 1, 1))
    else:
        start = Fraction(low * scale)
        size = Fraction((high + 1) * scale) - start
    if size <= 0:
        return [(0, 0)] * bins
    edges = [start + size * p / bins for p in range(bins + 1)]
    return [
        (max(math.floor(begin), 0), min(math.ceil(end), limit))
        for begin, end in itertools.pairwise(edges)
    ]


def _greatest(plane: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest element of each channel and its place; the first of equals, NaN before all."""
    flat = plane.flatten(1)
    wins = (flat == flat.amax(1, keepdim=True)) | flat.isnan()
    place = wins.int().cumsum(1).eq(0).sum(1)
    return flat.gather(1, place[:, None])[:, 0], place


def roi_pool(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    rounding: bool = True,
    deterministic: bool = False,
    with_argmax: bool = True,
) -> tuple[Tensor, Tensor]:
    """Max pooling of regions.

    Args:
        input: (N, C, H, W).
        boxes: (K, 5) image, x1, y1, x2, y2.
        pooled_height: rows of bins.
        pooled_width: columns of bins.
        spatial_scale: cells per pixel.
        rounding: rounded inclusive corners, or corners as they are with x2 + 1 and y2 + 1.
        deterministic: no effect.
        with_argmax: whether the cells are returned.

    Returns:
        (K, C, pooled_height, pooled_width), and the cell of each as y << half | x, all bits set
        for an empty bin.
    """
    images, channels, height, width = input.shape
    half, dtype = (8, torch.int16) if max(height, width) <= 254 else (16, torch.int32)
    # A sum over nothing: zeros with a gradient, also where the input is NaN.
    none = input[:0].sum((0, 2, 3)), torch.full((channels,), -1, device=input.device)
    values, codes = [], []
    for image, x1, y1, x2, y2 in boxes.tolist():
        inside = -1 < image < images and all(map(math.isfinite, (x1, y1, x2, y2)))
        for p in range(pooled_height):
            for q in range(pooled_width):
                if inside:
                    rows = _cuts(y1, y2, spatial_scale, pooled_height, height, rounding)[p]
                    columns = _cuts(x1, x2, spatial_scale, pooled_width, width, rounding)[q]
                if not inside or rows[0] >= rows[1] or columns[0] >= columns[1]:
                    value, code = none
                else:
                    window = input[int(image), :, slice(*rows), slice(*columns)]
                    value, place = _greatest(window)
                    y = rows[0] + place // window.shape[2]
                    code = y << half | columns[0] + place % window.shape[2]
                values.append(value)
                codes.append(code)
    shape = (boxes.shape[0], pooled_height, pooled_width, channels)
    output = torch.stack(values) if values else none[0][:0]
    argmax = torch.stack(codes) if codes else none[1][:0]
    argmax = argmax.reshape(shape).permute(0, 3, 1, 2).contiguous().to(dtype)
    if not with_argmax:
        argmax = argmax.new_empty(0)
    return output.reshape(shape).permute(0, 3, 1, 2).contiguous(), argmax


def parity() -> Parity:
    """What roi_pool is tried on."""
    return Parity(
        op="roi_pool",
        tier="A",
        differentiable=("input",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _problem(new, 2, 5, 17, 23, 9, 3)),
            Case("not_rounded", lambda new: _problem(new, 2, 5, 17, 23, 9, 3, rounding=False)),
            Case("scaled", lambda new: _problem(new, 1, 4, 12, 16, 8, (2, 5), spatial_scale=0.5)),
            Case("seven", lambda new: _problem(new, 1, 33, 40, 31, 5, 7)),
            Case("small_regions", lambda new: _problem(new, 1, 3, 6, 6, 5, 8)),
            Case("wide_codes", lambda new: _problem(new, 1, 2, 3, 600, 4, (2, 3))),
            Case("no_boxes", lambda new: _problem(new, 1, 3, 5, 5, 0, 2)),
            Case("no_channels", lambda new: _problem(new, 1, 0, 5, 5, 2, 2)),
            Case("single", lambda new: _problem(new, 1, 1, 1, 1, 1, 1)),
            Case("edges", lambda new: _edges(new)),
            Case("edges_not_rounded", lambda new: _edges(new, rounding=False)),
            Case("ties", _ties),
            Case("nan", _nan, gradient=False),
        ),
        workloads=(
            Workload("pyramid", scenes.PYRAMID_LEVEL, _regions, layouts=tuple(FORMATS)),
            Workload("deterministic", scenes.PYRAMID_LEVEL, _deterministic),
            # Faster R-CNN on the fourth stage of a ResNet; Fast R-CNN on VGG.
            Workload("c4", _C4, _regions, layouts=tuple(FORMATS)),
            Workload("vgg", _VGG, _regions),
        ),
    )


_C4 = {
    "images": 1,
    "channels": 1024,
    "height": 50,
    "width": 84,
    "regions": 256,
    "bins": 14,
    "stride": 16,
}
_VGG = {
    "images": 1,
    "channels": 512,
    "height": 38,
    "width": 50,
    "regions": 2000,
    "bins": 7,
    "stride": 16,
}


def _regions(sizes: Sizes) -> dict[str, object]:
    stride = sizes["stride"]
    return {**scenes.pooling(sizes), "output_size": sizes["bins"], "spatial_scale": 1 / stride}


def _deterministic(sizes: Sizes) -> dict[str, object]:
    return {**_regions(sizes), "deterministic": True}


def _problem(
    new: Inputs,
    images: int,
    channels: int,
    height: int,
    width: int,
    count: int,
    output_size: int | tuple[int, int],
    **settings: object,
) -> dict[str, object]:
    """Corners on quarters of a cell, which every dtype and both rules hold exactly."""
    sides = torch.tensor([width, height, width, height])
    corners = (new.boxes(count, 1.5) - 0.25) * sides
    index = new.integers(count, 1, high=images).double()
    boxes = torch.cat([index, corners.mul(4).round().div(4)], 1)
    features = new.normal(images, channels, height, width)
    own = {"input": features, "boxes": boxes, "output_size": output_size, "deterministic": True}
    return {**own, **settings}


def _edges(new: Inputs, **settings: object) -> dict[str, object]:
    """Malformed, outside, of no size, on halves, not finite, larger than the image."""
    nan, inf = math.nan, math.inf
    rows: list[list[float]] = []
    rows += [[5, 5, 2, 2], [-9, -9, -4, -4], [20, 3, 25, 6], [3, 3, 3, 3], [0.5, 1.5, 2.5, 3.5]]
    rows += [[-0.5, -1.5, 2, 2], [nan, 0, 5, 5], [0, 0, inf, 5], [-inf, 0, 5, 5]]
    rows += [[-50, -50, 60, 60], [1, 5, 7, 2]]
    boxes = torch.tensor([[0.0, *row] for row in rows], dtype=torch.float64)
    own = {"input": new.normal(1, 3, 8, 9), "boxes": boxes, "output_size": 2, "deterministic": True}
    return {**own, **settings}


def _ties(new: Inputs) -> dict[str, object]:
    problem = _problem(new, 1, 4, 12, 12, 6, 3)
    return {**problem, "input": new.integers(1, 4, 12, 12, high=3).double()}


def _nan(new: Inputs) -> dict[str, object]:
    problem = _problem(new, 1, 4, 12, 12, 6, 3)
    input = new.normal(1, 4, 12, 12)
    input[0, 1, 4:6, 3:8] = math.nan
    input[0, 2] = -math.inf
    return {**problem, "input": input}


def _fuzz(draw: Draw) -> dict[str, object]:
    shape = (draw.size(3), draw.option("channels", 0, 1, 3, 8, 40), draw.size(16), draw.size(16))
    return {
        "input": draw.values(*shape),
        "boxes": draw.regions(draw.size(6), shape[0], 60.0),
        "output_size": draw.option("output_size", 1, 2, (3, 1), 4),
        "spatial_scale": draw.pick(0.25, 1.0, 0.1),
        "rounding": draw.option("rounding", True, False),
        "deterministic": draw.option("deterministic", True, False),
    }
