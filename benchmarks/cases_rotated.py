"""Rows of the overlaps of rotated boxes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import (
    BOTH,
    F16,
    F32,
    FLOOR,
    FORWARD,
    MMCV,
    OURS,
    PARITIES,
    PLAIN,
    Baseline,
    Case,
    Target,
    bound,
    name_of,
    nbytes,
    ours,
    side,
)
from benchmarks.harness import Inputs, Work
from benchmarks.mmcv_sides import by_name, mmcv_sides

NAMES = ("boxes1", "boxes2")
# Rows of the first set at a time: the reference keeps 64 vertices of each pair.
CHUNK = 128


def inputs_of(
    operator: str, workload: str, sizes: dict[str, int], device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Those of a workload, in any size."""
    (found,) = (w for w in PARITIES[operator].workloads if w.name == workload)
    return dict(found.arguments(sizes, dtype, "contiguous", device))


def in_chunks(function: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    """The answer of a function of pairs."""
    return torch.cat([function(rows, inputs["boxes2"]) for rows in inputs["boxes1"].split(CHUNK)])


def pairs(
    function: str,
    form: int,
    workload: str,
    n: int,
    m: int,
    dtype: torch.dtype = F32,
    **options: Any,
) -> Case:
    """Every pair of two sets. Form and mode are those of the schema."""
    mode = 2 if function == "boxes_overlap_bev" else 0

    def make(device: torch.device) -> Work:
        from torchkiln import reference

        inputs = inputs_of("box_iou_rotated", workload, {"n": n, "m": m}, device, dtype)
        answer = partial(reference.box_iou_rotated, form=form, mode=mode)
        columns = inputs["boxes1"].shape[1]
        return Work(
            inputs,
            [
                side(OURS, lambda: bound(ours(function), NAMES)),
                *mmcv_sides(by_name(function, *NAMES)),
            ],
            oracle=lambda i: in_chunks(answer, i),
            floor_bytes=nbytes(dtype) * (n * m + columns * (n + m)),
        )

    return Case(function, f"{n}x{m}", name_of(dtype), FORWARD, make, data=workload, **options)


def loss(
    function: str, workload: str, n: int, direction: str, dtype: torch.dtype = F32, **options: Any
) -> Case:
    """Matched pairs; mmcv's version is a composition of sixty operators, as the plain one here."""

    def make(device: torch.device) -> Work:
        from torchkiln import reference

        inputs = inputs_of("diff_iou_rotated", workload, {"n": n}, device, dtype)
        # What is differentiated is the first set: the harness calls it input.
        inputs["input"] = inputs.pop("boxes1").requires_grad_(direction != FORWARD)
        plain = partial(reference.diff_iou_rotated, space=function.endswith("3d"))

        def call(operator: Callable[..., Tensor], i: Inputs) -> Callable[[], Tensor]:
            if direction == FORWARD:
                return lambda: operator(i["input"], i["boxes2"])
            return lambda: operator(i["input"], i["boxes2"]).sum()

        columns = inputs["input"].shape[-1]
        return Work(
            inputs,
            [
                side(OURS, lambda: partial(call, ours(function)), direction),
                side(PLAIN, lambda: partial(call, plain), direction),
                *mmcv_sides(lambda ops, i: call(getattr(ops, function), i), direction),
            ],
            oracle=lambda i: side("", lambda: partial(call, plain), direction).prepare(i)(),
            floor_bytes=nbytes(dtype)
            * n
            * (2 * columns + (1 if direction == FORWARD else columns)),
        )

    return Case(function, f"{n} pairs", name_of(dtype), direction, make, data=workload, **options)


def rotated_rows() -> Iterator[Case]:
    """Sizes of oriented detectors and of detectors in space."""
    goal = (Target("baseline", 5, 10, MMCV),)
    rotated = partial(pairs, "box_iou_rotated", 0)
    yield rotated(
        "proposals", 2000, 512, targets=goal, baselines=(Baseline(MMCV, 143.5),), quick=True
    )
    yield rotated("anchors", 21_824, 500, targets=(FLOOR,), quick=True)
    yield rotated("proposals", 2000, 512, F16)
    yield rotated("proposals", 4096, 4096)
    yield rotated("proposals", 123, 37)
    yield pairs("box_iou_quadri", 1, "text", 2000, 512, quick=True)
    in_space = partial(pairs, m=1000, quick=True, workload="proposals_in_space")
    goal_in_space = (Target("baseline", 3, 6, MMCV),)
    yield in_space(
        "boxes_iou3d", 4, n=1000, targets=goal_in_space, baselines=(Baseline(MMCV, 167.8),)
    )
    yield in_space("boxes_overlap_bev", 3, n=1000)
    for direction in (FORWARD, BOTH):
        yield loss("diff_iou_rotated_2d", "aerial_loss", 512, direction, quick=True)
        yield loss("diff_iou_rotated_3d", "street_loss", 512, direction, quick=True)
        yield loss("diff_iou_rotated_3d", "dense_loss", 20_000, direction)


def cpu_rows(threads: int) -> Iterator[Case]:
    """On the CPU; no peer stands beside them."""
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    yield pairs("box_iou_rotated", 0, "proposals", 2000, 512, **options)
    yield pairs("boxes_iou3d", 4, "proposals_in_space", 1000, 1000, **options)
    yield loss("diff_iou_rotated_3d", "dense_loss", 20_000, BOTH, **options)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    yield pairs("box_iou_rotated", 0, "proposals", 140, 9, **options)
    yield pairs("box_iou_quadri", 1, "text", 40, 9, **options)
    yield pairs("boxes_overlap_bev", 3, "proposals_in_space", 40, 9, **options)
    for direction in (FORWARD, BOTH):
        yield loss("diff_iou_rotated_3d", "street_loss", 40, direction, **options)


GPU_TABLES = (rotated_rows,)
