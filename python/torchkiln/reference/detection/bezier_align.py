"""bezier_align in plain PyTorch, from the definition.

Source: Liu et al., "ABCNet: Real-time Scene Text Spotting with Adaptive Bezier-Curve Network",
2020, section 2.2.
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

__all__ = ["bezier_align"]


def bezier_align(
    input: Tensor,
    beziers: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    deterministic: bool = False,
) -> Tensor:
    """Pools each region between two Bezier curves.

    Args:
        input: (N, C, H, W).
        beziers: (K, 17) batch index, 4 points of the upper curve, 4 of the lower one backwards.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per pixel, rounded up.
        aligned: whether positions are moved by half a pixel, and small regions keep their size.
        deterministic: no effect.

    Returns:
        (K, C, pooled_height, pooled_width). A region without samples gives 0.
    """

    def points(row: list[float]) -> tuple[Tensor, Tensor] | None:
        if not all(map(math.isfinite, row[1:])):
            return None
        control = torch.tensor(row[1:], dtype=torch.float64).reshape(8, 2) * spatial_scale
        upper, lower = control[:4], control[4:].flip(0)
        size = (upper[0] - upper[3]).abs().maximum((lower[0] - lower[3]).abs())
        if not aligned:
            size = size.clamp(min=1)
        width, height = float(size[0]) / pooled_width, float(size[1]) / pooled_height
        grid = _points.counts((height, width), sampling_ratio)
        if grid is None:
            return None
        u = torch.arange(pooled_width, dtype=torch.float64) / pooled_width
        weights = torch.stack(
            [math.comb(3, i) * u**i * (1 - u) ** (3 - i) for i in range(4)], dim=1
        )
        v = (torch.arange(pooled_height, dtype=torch.float64) / pooled_height)[:, None, None]
        center = torch.lerp((weights @ upper)[None], (weights @ lower)[None], v)
        center = center - (0.5 if aligned else 0.0)
        down = (_points.middles(grid[0]) - 0.5) * height
        across = (_points.middles(grid[1]) - 0.5) * width
        y = center[:, :, 1, None, None] + down[:, None] + torch.zeros_like(across)
        x = center[:, :, 0, None, None] + across + torch.zeros_like(down)[:, None]
        return y.flatten(2), x.flatten(2)

    return _points.pooled(input, beziers, (pooled_height, pooled_width), points)


def parity() -> Parity:
    """What bezier_align is tried on."""
    return Parity(
        op="bezier_align",
        tier="B",
        differentiable=("input",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _arguments(new, 8, sampling_ratio=2)),
            Case("adaptive", lambda new: _arguments(new, 6, output_size=(2, 3))),
            Case("not_aligned", lambda new: _arguments(new, 6, aligned=False, sampling_ratio=1)),
            Case("no_beziers", lambda new: _arguments(new, 0)),
            Case("no_channels", lambda new: _arguments(new, 3, shape=(1, 0, 5, 6))),
            Case("single", lambda new: _arguments(new, 1, shape=(1, 1, 1, 1), output_size=1)),
            Case("channels_last", lambda new: _points.channels_last(_arguments(new, 6))),
            Case("degenerate", _degenerate),
        ),
        workloads=(Workload("text", _TEXT, _lines, layouts=tuple(FORMATS)),),
    )


# ABCNet: lines of text on a quarter of an image.
_TEXT = {"images": 1, "channels": 256, "height": 200, "width": 336, "regions": 128, "stride": 4}


def _lines(sizes: Sizes) -> dict[str, Any]:
    """Curved lines of text, as wide as regions and a quarter as high."""
    made = scenes.pooling(sizes)
    image, x1, y1, x2, y2 = made.pop("boxes").unbind(1)
    bow = 0.1 * (x2 - x1)
    along = [x1 + (x2 - x1) * part / 3 for part in range(4)]
    upper = [y1, y1 - bow, y1 - bow, y1]
    lower = [y + 0.25 * (y2 - y1) for y in upper]
    columns = [value for pair in zip(along, upper, strict=True) for value in pair]
    columns += [value for pair in zip(along[::-1], lower, strict=True) for value in pair]
    return {
        **made,
        "beziers": torch.stack([image, *columns], 1),
        "output_size": (8, 32),
        "spatial_scale": 1 / sizes["stride"],
        "sampling_ratio": 1,
    }


def _arguments(
    new: Inputs,
    count: int,
    shape: tuple[int, int, int, int] = (2, 5, 13, 17),
    output_size: int | tuple[int, int] = (3, 6),
    **options: Any,
) -> dict[str, Any]:
    """Points in and around an input of which four image pixels make one."""
    extent = torch.tensor([shape[3], shape[2]] * 8) * 4.0
    points = _points.rounded(new.uniform(count, 16, low=-0.2, high=1.2) * extent)
    image = new.integers(count, 1, high=shape[0]).double()
    own = {"input": new.normal(*shape), "beziers": torch.cat([image, points], 1)}
    own_options = {"output_size": output_size, "spatial_scale": 0.25, "deterministic": True}
    return {**own, **own_options, **options}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """All points in one place, NaN, infinity, outside."""
    rows = torch.zeros(4, 17, dtype=torch.float64)
    rows[0, 1:] = 2
    rows[1, 1:] = torch.arange(16.0)
    rows[1, 5] = math.nan
    rows[2, 1:] = torch.arange(16.0)
    rows[2, 8] = math.inf
    rows[3, 1:] = 30 + torch.arange(16.0)
    own = {"input": new.normal(1, 2, 6, 7), "beziers": rows, "output_size": 2}
    return {**own, "deterministic": True}


def _fuzz(draw: Draw) -> dict[str, Any]:
    arguments = _points.drawn(draw, draw.option("channels", 0, 1, 3, 40))
    images = arguments["input"].shape[0]
    return {
        **arguments,
        "beziers": draw.indexed(draw.values(draw.size(6), 16) * 20, images),
        "aligned": draw.option("aligned", True, False),
    }
