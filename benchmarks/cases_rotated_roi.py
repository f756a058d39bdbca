"""Rows of the operators that pool bilinear samples at points of any place.

torchvision has none of them. Autograd Functions of mmcv take arguments by position only.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.cases import (
    BACKWARD,
    BF16,
    F16,
    F32,
    FORWARD,
    MMCV,
    OURS,
    PARITIES,
    SEED,
    Bind,
    Case,
    Target,
    name_of,
    nbytes,
    oracle_of,
    ours,
    side,
)
from benchmarks.harness import Inputs, Work
from benchmarks.mmcv_sides import mmcv_sides
from torchkiln import backend

GOAL = (Target("speedup", 3, 6, MMCV),)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Subject:
    """An operator: its workload, mmcv's arguments by position, and smaller sizes."""

    workload: str
    arguments: tuple[str, ...]
    cpu: Mapping[str, int] | None  # None: mmcv has no CPU version
    tiny: Mapping[str, int]


_POOLED = ("output_size", "spatial_scale", "sampling_ratio")
_TINY_MAP = {"images": 1, "height": 20, "width": 24}
SUBJECTS = {
    "roi_align_rotated": Subject(
        "pyramid",
        ("input", "boxes", *_POOLED),
        {"images": 1, "height": 100, "width": 168, "regions": 256, "stride": 8},
        {**_TINY_MAP, "channels": 8, "regions": 6, "bins": 3},
    ),
    "riroi_align_rotated": Subject(
        "pyramid",
        ("input", "boxes", *_POOLED),
        None,
        {**_TINY_MAP, "channels": 16, "regions": 6, "bins": 3},
    ),
    "bezier_align": Subject(
        "text",
        ("input", "beziers", *_POOLED),
        {"height": 100, "width": 168, "regions": 64, "stride": 8},
        {**_TINY_MAP, "channels": 8, "regions": 6},
    ),
    "border_align": Subject(
        "head",
        ("input", "boxes", "pool_size"),
        None,
        {"channels": 4, "height": 8, "width": 9},
    ),
    "rotated_feature_align": Subject(
        "refine",
        ("input", "boxes", "spatial_scale", "points"),
        {"images": 1, "height": 64, "width": 64},
        {"images": 1, "channels": 8, "height": 9, "width": 8},
    ),
}


def reference(operator: str) -> Callable[..., Tensor]:
    """Our operator by its definition."""
    function = ours(operator)

    def call(*arguments: Any) -> Tensor:
        with backend("reference"):
            return function(*arguments)

    return call


def by_position(function: Callable[..., Tensor], names: tuple[str, ...], rest: Any) -> Bind:
    """Ties inputs, and what of the arguments is no tensor, to a function."""

    def bind(inputs: Inputs) -> Callable[[], Tensor]:
        arguments = [inputs[name] if name in inputs else rest[name] for name in names]
        return lambda: function(*arguments)

    return bind


def row(
    operator: str,
    direction: str,
    dtype: torch.dtype,
    layout: str,
    sizes: Mapping[str, int],
    **options: Any,
) -> Case:
    """One row; sizes are those of the workload where none are given."""
    subject = SUBJECTS[operator]
    (found,) = (w for w in PARITIES[operator].workloads if w.name == subject.workload)
    sizes = {**found.sizes, **sizes}

    def make(device: torch.device) -> Work:
        made = found.make(sizes)
        tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        inputs: Inputs = {
            name: value.to(device, dtype, copy=True) for name, value in tensors.items()
        }
        inputs["input"] = inputs["input"].contiguous(memory_format=LAYOUTS[layout])
        names = subject.arguments
        # mmcv launches these kernels on the default stream.
        unordered = device.type == "cuda" and operator == "roi_align_rotated"

        def of_mmcv(ops: Any, i: Inputs) -> Callable[[], Tensor]:
            return by_position(getattr(ops, operator), names, made)(i)

        shadows = {name: value.to("meta") for name, value in tensors.items()}
        shape = ours(operator)(**{**made, **shadows}).shape
        if direction == BACKWARD:
            inputs["grad"] = data.normal(tuple(shape), SEED + 1).to(device, dtype, copy=True)
            inputs["input"].requires_grad_()
        return Work(
            inputs,
            [
                side(OURS, lambda: by_position(ours(operator), names, made), direction),
                *mmcv_sides(of_mmcv, direction, unordered),
            ],
            oracle=oracle_of(by_position(reference(operator), names, made), direction),
            floor_bytes=nbytes(dtype) * (inputs["input"].numel() + shape.numel()),
        )

    described = ", ".join(f"{name} {value}" for name, value in sizes.items())
    return Case(operator, described, name_of(dtype), direction, make, layout=layout, **options)


def gpu_rows() -> Iterator[Case]:
    """Both directions and layouts in float32 and float16; the forward in bfloat16."""
    for operator in SUBJECTS:
        for direction in (FORWARD, BACKWARD):
            for layout in LAYOUTS:
                goal = GOAL if layout == "NCHW" else ()
                for dtype in (F32, F16):
                    yield row(operator, direction, dtype, layout, {}, targets=goal, quick=True)
        yield row(operator, FORWARD, BF16, "channels_last", {})


GPU_TABLES = (gpu_rows,)


def cpu_rows(threads: int) -> Iterator[Case]:
    """Those that mmcv has on the CPU, with one thread or with all (0)."""
    goal = (Target("speedup", 1, 2, MMCV) if threads == 1 else Target("speedup", 6, 10, MMCV),)
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "targets": goal, "quick": True}
    for operator, subject in SUBJECTS.items():
        for direction in (FORWARD, BACKWARD) if subject.cpu is not None else ():
            yield row(operator, direction, F32, "NCHW", subject.cpu or {}, **options)


def tiny_rows() -> Iterator[Case]:
    """Every operator, small: tries the harness where there is no GPU."""
    for operator, subject in SUBJECTS.items():
        for direction in (FORWARD, BACKWARD):
            for layout in LAYOUTS:
                yield row(operator, direction, F32, layout, subject.tiny, device="cpu", quick=True)
