"""riroi_align_rotated in plain PyTorch, from the definition.

Source: Han et al., "ReDet: A Rotation-equivariant Detector for Aerial Object Detection", 2021.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection import _points, roi_align_rotated
from torchkiln.testing import FORMATS, Case, Draw, Inputs, Parity, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["riroi_align_rotated"]


def riroi_align_rotated(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    num_orientations: int = 8,
    clockwise: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Pools each rotated region and turns its channels.

    Args:
        input: (N, C * num_orientations, H, W).
        boxes: (K, 6) batch index, centre x, centre y, width, height, angle.
        pooled_height: bins.
        pooled_width: bins.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per pixel, rounded up.
        num_orientations: orientations of a channel.
        clockwise: sense of the angle of regions.
        deterministic: no effect.

    Returns:
        (K, C * num_orientations, pooled_height, pooled_width). A region without samples gives 0.
    """
    bins = (pooled_height, pooled_width)

    def points(row: list[float]) -> tuple[Tensor, Tensor] | None:
        return roi_align_rotated.points_of(
            row, bins, spatial_scale, sampling_ratio, False, clockwise
        )

    def turned(output: Tensor, row: list[float]) -> Tensor:
        steps = row[5] * num_orientations / (2 * math.pi)
        whole = math.floor(steps)
        channels = output.reshape(-1, num_orientations, *bins)
        own, after = (torch.roll(channels, whole - more, 1) for more in (0, 1))
        return ((1 - (steps - whole)) * own + (steps - whole) * after).reshape(output.shape)

    return _points.pooled(input, boxes, bins, points, turned)


def parity() -> Parity:
    """What riroi_align_rotated is tried on."""
    return Parity(
        op="riroi_align_rotated",
        tier="B",
        differentiable=("input",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _arguments(new, 8, sampling_ratio=2)),
            Case("adaptive", lambda new: _arguments(new, 5, output_size=(2, 3), clockwise=True)),
            Case("three", lambda new: _arguments(new, 5, (1, 6, 9, 8), num_orientations=3)),
            Case("one", lambda new: _arguments(new, 3, (1, 2, 9, 8), num_orientations=1)),
            Case("no_boxes", lambda new: _arguments(new, 0)),
            Case("no_channels", lambda new: _arguments(new, 3, shape=(1, 0, 5, 6))),
            Case("channels_last", lambda new: _points.channels_last(_arguments(new, 6))),
            Case("wide", lambda new: _arguments(new, 3, (2, 80, 9, 11), sampling_ratio=1)),
        ),
        workloads=(
            Workload("pyramid", _PYRAMID, roi_align_rotated.regions, layouts=tuple(FORMATS)),
        ),
    )


_PYRAMID = {**scenes.PYRAMID_LEVEL, "ratio": 2, "regions": 512}


def _arguments(
    new: Inputs,
    count: int,
    shape: tuple[int, int, int, int] = (2, 16, 11, 9),
    output_size: int | tuple[int, int] = 5,
    **options: Any,
) -> dict[str, Any]:
    boxes = _points.rotated_boxes(new, count, shape)
    own = {"input": new.normal(*shape), "boxes": boxes, "output_size": output_size}
    return {**own, "spatial_scale": 0.25, "deterministic": True, **options}


def _fuzz(draw: Draw) -> dict[str, Any]:
    orientations = draw.option("orientations", 1, 3, 8)
    arguments = _points.drawn(draw, orientations * draw.option("channels", 0, 1, 5))
    images = arguments["input"].shape[0]
    boxes = draw.rotated(draw.size(6), 60.0)
    if draw.kind == "grid":
        boxes[:, 4] += 0.01  # what channels are blended jumps at whole orientations
    return {
        **arguments,
        "boxes": draw.indexed(boxes, images),
        "num_orientations": orientations,
        "clockwise": draw.option("clockwise", True, False),
    }
