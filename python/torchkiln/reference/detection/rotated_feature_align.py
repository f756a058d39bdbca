"""rotated_feature_align in plain PyTorch, from the definition.

Source: Yang et al., "R3Det: Refined Single-Stage Detector with Feature Refinement for Rotating
Object", 2021, section 3.3.
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

__all__ = ["rotated_feature_align"]


def rotated_feature_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float = 0.125,
    points: int = 1,
    deterministic: bool = False,
) -> Tensor:
    """Adds samples at the box of each pixel.

    Args:
        input: (N, C, H, W).
        boxes: (N, H, W, 5) centre y, centre x, width, height, angle.
        spatial_scale: input pixels per image pixel.
        points: 1, or 5 for the corners too.
        deterministic: no effect.

    Returns:
        (N, C, H, W).
    """
    image = _points.wide(input)
    y, x, width, height, angle = boxes.double().unbind(3)
    y, x, half_w, half_h = (
        v * spatial_scale * factor for v, factor in ((y, 1), (x, 1), (width, 0.5), (height, 0.5))
    )
    places = [(y, x)]
    if points == 5:
        wide_x, wide_y = half_w * angle.cos(), half_w * angle.sin()
        high_x, high_y = -half_h * angle.sin(), half_h * angle.cos()
        signs = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
        places += [(y + w * wide_y + h * high_y, x + w * wide_x + h * high_x) for w, h in signs]
    outputs = []
    for number, features in enumerate(image):
        if features.numel():
            outputs.append(
                features + sum(_points.samples(features, a[number], b[number]) for a, b in places)
            )
        else:
            outputs.append(features)
    return (torch.stack(outputs) if outputs else image).to(input.dtype)


def parity() -> Parity:
    """What rotated_feature_align is tried on."""
    return Parity(
        op="rotated_feature_align",
        tier="B",
        differentiable=("input",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _arguments(new, (2, 5, 13, 11), 5)),
            Case("centres", lambda new: _arguments(new, (1, 3, 8, 9), 1)),
            Case("no_images", lambda new: _arguments(new, (0, 3, 8, 9), 1)),
            Case("no_channels", lambda new: _arguments(new, (1, 0, 5, 6), 5)),
            Case("single", lambda new: _arguments(new, (1, 1, 1, 1), 5)),
            Case("wide", lambda new: _arguments(new, (1, 72, 9, 8), 5)),
            Case(
                "channels_last", lambda new: _points.channels_last(_arguments(new, (2, 8, 6, 7), 5))
            ),
            Case("degenerate", _degenerate),
        ),
        workloads=(Workload("refine", _REFINE, _boxes, layouts=tuple(FORMATS)),),
    )


# R3Det on the finest level of its pyramid.
_REFINE = {"images": 2, "channels": 256, "height": 128, "width": 128, "stride": 8, "points": 5}


def _boxes(sizes: Sizes) -> dict[str, Any]:
    """A box near each pixel."""
    shape = (sizes["images"], sizes["height"], sizes["width"])
    g = scenes.generator(scenes.SEED)
    y = torch.arange(shape[1])[:, None] + torch.randn(shape, generator=g)
    x = torch.arange(shape[2]) + torch.randn(shape, generator=g)
    width, height = (2 + 14 * torch.rand(shape, generator=g) for _ in range(2))
    angle = math.pi * (torch.rand(shape, generator=g) - 0.5)
    stride = sizes["stride"]
    boxes = torch.stack([y * stride, x * stride, width * stride, height * stride, angle], 3)
    features = scenes.normal((shape[0], sizes["channels"], *shape[1:]), scenes.SEED)
    own = {"input": features, "boxes": boxes, "spatial_scale": 1 / stride}
    return {**own, "points": sizes["points"]}


def _arguments(new: Inputs, shape: tuple[int, int, int, int], points: int) -> dict[str, Any]:
    images, _, height, width = shape
    center = new.uniform(images, height, width, 2, low=-0.1, high=1.1)
    size = new.uniform(images, height, width, 2, low=0.1, high=0.6)
    extent = torch.tensor([height, width]) * 4.0
    angle = new.uniform(images, height, width, 1, low=-4, high=4)
    boxes = torch.cat([_points.rounded(center * extent), _points.rounded(size * extent)], 3)
    own = {"input": new.normal(*shape), "boxes": torch.cat([boxes, angle.bfloat16().double()], 3)}
    return {**own, "spatial_scale": 0.25, "points": points, "deterministic": True}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """No size, negative, NaN, infinite."""
    rows = [[1, 1, 0, 0, 0], [1, 1, -2, 2, 1], [math.nan, 1, 2, 2, 0], [1, 1, math.inf, 2, 0.5]]
    rows += [[1, 1, 2, 2, math.inf], [-1, 3, 2, 2, 0]]
    own = {"input": new.normal(1, 2, 2, 3), "points": 5, "spatial_scale": 1.0}
    boxes = torch.tensor(rows, dtype=torch.float64).reshape(1, 2, 3, 5)
    return {**own, "boxes": boxes, "deterministic": True}


def _fuzz(draw: Draw) -> dict[str, Any]:
    images, height, width = draw.size(3), draw.size(8), draw.size(8)
    channels = draw.option("channels", 0, 1, 3, 40)
    return {
        "input": draw.values(images, channels, height, width, special=False),
        "boxes": draw.rotated(images * height * width, 40.0).reshape(images, height, width, 5),
        "spatial_scale": draw.pick(0.25, 1.0, 0.1),
        "points": draw.option("points", 1, 5),
        "deterministic": draw.option("deterministic", True, False),
    }
