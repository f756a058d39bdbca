"""Rows of corner pooling, polygons and segmentation.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.cases import (
    BACKWARD,
    F16,
    F32,
    FLOOR,
    FORWARD,
    OURS,
    PLAIN,
    SEED,
    Case,
    Mmcv,
    Target,
    bound,
    name_of,
    nbytes,
    oracle_of,
    ours,
    side,
    workload,
)
from benchmarks.harness import Inputs, Work

# --- corner_pool --------------------------------------------------------------------------------


def plain_corner_pool(input: Tensor, mode: str) -> Tensor:
    """What mmcv does: a cumulative maximum of a flipped map."""
    dim = 2 if mode in ("top", "bottom") else 3
    if mode in ("bottom", "right"):
        return torch.cummax(input, dim).values
    return torch.cummax(input.flip(dim), dim).values.flip(dim)


def corner_pool(
    shape: tuple[int, int, int, int],
    mode: str,
    direction: str = FORWARD,
    dtype: torch.dtype = F32,
    layout: str = "NCHW",
    **options: Any,
) -> Case:
    """One direction; the backward must read the map and its gradient, and write one."""
    names = ("input",)

    def make(device: torch.device) -> Work:
        features = data.normal(shape, SEED).to(device, dtype, copy=True)
        if layout == "channels_last":
            features = features.to(memory_format=torch.channels_last)
        inputs: Inputs = {"input": features.requires_grad_(direction == BACKWARD)}
        if direction == BACKWARD:
            inputs["grad"] = data.normal(shape, SEED + 1).to(device, dtype, copy=True)
        answer = bound(plain_corner_pool, names, mode)
        return Work(
            inputs,
            [
                side(OURS, lambda: bound(ours("corner_pool"), names, mode), direction),
                side(PLAIN, lambda: answer, direction),
            ],
            oracle=oracle_of(answer, direction),
            floor_bytes=(2 if direction == FORWARD else 3) * nbytes(dtype) * features.numel(),
        )

    size = f"{'x'.join(map(str, shape))}, {mode}"
    return Case("corner_pool", size, name_of(dtype), direction, make, layout=layout, **options)


def corner_pool_rows() -> Iterator[Case]:
    """CornerNet's heads in every direction, then other dtypes, layouts and sizes."""
    sizes = workload("corner_pool", "top")
    shape = sizes["images"], sizes["channels"], sizes["height"], sizes["width"]
    goals = (Target("mmcv", 3, 5), FLOOR)
    yield corner_pool(shape, "top", targets=goals, mmcv=Mmcv(136.0), quick=True)
    for mode in ("bottom", "left", "right"):
        yield corner_pool(shape, mode, targets=(FLOOR,), quick=True)
    for mode in ("top", "left"):
        yield corner_pool(shape, mode, BACKWARD, targets=(FLOOR,), quick=True)
        for layout in ("NCHW", "channels_last"):
            yield corner_pool(shape, mode, FORWARD, F16, layout)
            yield corner_pool(shape, mode, BACKWARD, F16, layout)
        yield corner_pool(shape, mode, FORWARD, F32, "channels_last")
        yield corner_pool((2, 128, 64, 64), mode)
        yield corner_pool((1, 100, 37, 53), mode)
        yield corner_pool((1, 64, 512, 512), mode)


# --- the tables ---------------------------------------------------------------------------------


def cpu_rows(threads: int) -> Iterator[Case]:
    """Ours against PyTorch's."""
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    for mode in ("top", "left"):
        for direction in (FORWARD, BACKWARD):
            yield corner_pool((2, 64, 128, 128), mode, direction, **options)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    for direction in (FORWARD, BACKWARD):
        yield corner_pool((1, 2, 9, 11), "left", direction, **options)


GPU_TABLES = (corner_pool_rows,)
