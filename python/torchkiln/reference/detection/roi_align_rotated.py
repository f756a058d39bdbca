"""roi_align_rotated in plain PyTorch, from the definition.

Source: Ma et al., "Arbitrary-Oriented Scene Text Detection via Rotation Proposals", 2018.
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

__all__ = ["roi_align_rotated"]


def roi_align_rotated(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Pools each rotated region to a grid of bins.

    Args:
        input: (N, C, H, W).
        boxes: (K, 6) batch index, centre x, centre y, width, height, angle.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per pixel, rounded up.
        aligned: whether positions are moved by half a pixel, and small regions keep their size.
        clockwise: sense of the angle.
        deterministic: no effect.

    Returns:
        (K, C, pooled_height, pooled_width). A region without samples gives 0.
    """

    def points(row: list[float]) -> tuple[Tensor, Tensor] | None:
        return points_of(
            row, (pooled_height, pooled_width), spatial_scale, sampling_ratio, aligned, clockwise
        )

    return _points.pooled(input, boxes, (pooled_height, pooled_width), points)


def points_of(
    row: list[float],
    bins: tuple[int, int],
    scale: float,
    ratio: int,
    aligned: bool,
    clockwise: bool,
) -> tuple[Tensor, Tensor] | None:
    """Y and x, (*bins, samples), of the samples of a region; None for no samples."""
    _, x, y, width, height, angle = row
    if not all(map(math.isfinite, row[1:])):
        return None
    x, y = (value * scale - (0.5 if aligned else 0.0) for value in (x, y))
    width, height = (value * scale for value in (width, height))
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    grid = _points.counts((height / bins[0], width / bins[1]), ratio)
    if grid is None:
        return None
    # Equal parts of the region, from its centre.
    down = (_points.middles(bins[0] * grid[0]) - 0.5) * height
    across = (_points.middles(bins[1] * grid[1]) - 0.5) * width
    down, across = down.reshape(bins[0], 1, grid[0], 1), across.reshape(1, bins[1], 1, grid[1])
    sense = -1 if clockwise else 1
    cosine, sine = math.cos(angle), math.sin(angle) * sense
    position_y = down * cosine - across * sine + y
    position_x = down * sine + across * cosine + x
    return position_y.flatten(2), position_x.flatten(2)


def parity() -> Parity:
    """What roi_align_rotated is tried on."""
    return Parity(
        op="roi_align_rotated",
        tier="B",
        differentiable=("input",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _arguments(new, 12, sampling_ratio=2)),
            Case("adaptive", lambda new: _arguments(new, 6, output_size=(2, 3), clockwise=True)),
            Case("not_aligned", lambda new: _arguments(new, 6, aligned=False, sampling_ratio=1)),
            Case("no_boxes", lambda new: _arguments(new, 0)),
            Case("no_channels", lambda new: _arguments(new, 3, shape=(1, 0, 5, 6))),
            Case("single", lambda new: _arguments(new, 1, shape=(1, 1, 1, 1), output_size=1)),
            Case("channels_last", lambda new: _points.channels_last(_arguments(new, 9))),
            # More channels than a block has, and more bins.
            Case(
                "wide",
                lambda new: _arguments(new, 4, (2, 72, 9, 11), output_size=9, sampling_ratio=2),
            ),
            Case(
                "wide_channels_last",
                lambda new: _points.channels_last(_arguments(new, 4, (2, 72, 9, 11))),
            ),
            Case("degenerate", _degenerate),
        ),
        workloads=(
            Workload("pyramid", _PYRAMID, regions, layouts=tuple(FORMATS)),
            Workload("deterministic", _PYRAMID, _deterministic),
            # One image at a coarse level, as in a small detector.
            Workload("coarse", _COARSE, regions),
        ),
    )


_PYRAMID = {**scenes.PYRAMID_LEVEL, "ratio": 2}
_COARSE = {**_PYRAMID, "images": 1, "height": 50, "width": 84, "regions": 64, "stride": 16}


def regions(sizes: Sizes) -> dict[str, Any]:
    """A level of a pyramid, and regions of it at any angle."""
    made = scenes.pooling(sizes)
    boxes = scenes.rotated(made.pop("boxes"))
    return {
        **made,
        "boxes": boxes,
        "output_size": sizes["bins"],
        "spatial_scale": 1 / sizes["stride"],
        "sampling_ratio": sizes["ratio"],
    }


def _deterministic(sizes: Sizes) -> dict[str, Any]:
    return {**regions(sizes), "deterministic": True}


def _arguments(
    new: Inputs,
    count: int,
    shape: tuple[int, int, int, int] = (2, 5, 13, 17),
    output_size: int | tuple[int, int] = 7,
    **options: Any,
) -> dict[str, Any]:
    own = {
        "input": new.normal(*shape),
        "boxes": _points.rotated_boxes(new, count, shape),
        "output_size": output_size,
        "spatial_scale": 0.25,
        "deterministic": True,
    }
    return {**own, **options}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """No size, negative sizes, NaN, infinities, on the border, outside, a thousand times wider."""
    nan, inf = math.nan, math.inf
    rows = [[0, 3, 3, 0, 0, 0.3], [0, 3, 3, -2, 2, 0.3], [0, nan, 1, 2, 2, 0.3]]
    rows += [[0, 3, 3, inf, 2, 0.3], [0, 3, 3, 2, 2, nan], [0, 3, 3, 2, 2, inf]]
    rows += [[0, 0, 0, 3, 3, 0], [0, 7, 6, 3, 2, 0], [0, 30, 30, 4, 4, 0.5]]
    rows += [[0, 3, 3, 40, 1, 0.4], [0, 3, 3, 6e4, 0.5, 0.4]]
    return {
        "input": new.normal(1, 2, 6, 7),
        "boxes": torch.tensor(rows, dtype=torch.float64),
        "output_size": 2,
        "deterministic": True,
    }


def _fuzz(draw: Draw) -> dict[str, Any]:
    arguments = _points.drawn(draw, draw.option("channels", 0, 1, 3, 40))
    images = arguments["input"].shape[0]
    return {
        **arguments,
        "boxes": draw.indexed(draw.rotated(draw.size(6), 60.0), images),
        "aligned": draw.option("aligned", True, False),
        "clockwise": draw.option("clockwise", True, False),
    }
