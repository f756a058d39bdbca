"""Rows of losses, and of what else of boxes is differentiated.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cases import (
    BOTH,
    F16,
    F32,
    FLOOR,
    FORWARD,
    OURS,
    TORCHVISION,
    Case,
    bound,
    name_of,
    nbytes,
    oracle_of,
    ours,
    side,
    torchvision,
)
from benchmarks.harness import Call, Inputs, Work
from benchmarks.mmcv_sides import mmcv_sides
from torchkiln.testing import _scenes as scenes

BOXES = ("boxes1", "boxes2")
KINDS = ("generalized", "distance", "complete")


def softmax_focal_loss(
    rows: int, classes: int, direction: str, dtype: torch.dtype = F32, **options: Any
) -> Case:
    """Forward without reduction; forward+backward of the sum."""
    operator, names = "softmax_focal_loss", ("input", "targets")
    reduction = "none" if direction == FORWARD else "sum"
    arguments = (0.25, 2.0, reduction)

    def make(device: torch.device) -> Work:
        from torchkiln import reference

        logits = scenes.detector_logits(rows, classes).to(device, dtype)
        labels = scenes.detector_targets(rows, classes, False).to(device)
        inputs = {
            "input": logits.requires_grad_(direction != FORWARD),
            "targets": labels.clamp(max=classes - 1),  # mmcv reads beside the logits otherwise
        }

        def theirs(ops: Any, i: Inputs) -> Call:
            return lambda: ops.softmax_focal_loss(
                i["input"], i["targets"], 2.0, 0.25, None, reduction
            )

        passes = 1 if direction == FORWARD else 2
        return Work(
            inputs,
            [
                side(OURS, lambda: bound(ours(operator), names, *arguments), direction),
                *mmcv_sides(theirs, direction),
            ],
            oracle=oracle_of(bound(reference.softmax_focal_loss, names, *arguments), direction),
            floor_bytes=passes * nbytes(dtype) * rows * classes + 8 * rows,
        )

    return Case(operator, f"{rows}x{classes}", name_of(dtype), direction, make, **options)


def matched(kind: str, n: int, direction: str, dtype: torch.dtype = F32, **options: Any) -> Case:
    """A loss of each box with its partner, summed."""
    operator = f"{kind}_box_iou_loss"

    def make(device: torch.device) -> Work:
        from torchkiln import reference

        boxes = scenes.uniform_boxes(n, 0).to(device, dtype)
        moved = scenes.uniform_boxes(n, 1).to(device, dtype)
        inputs = {
            "boxes1": boxes.requires_grad_(direction != FORWARD),
            # Half of the way to another box: most pairs overlap.
            "boxes2": (boxes.detach() + moved) / 2,
        }
        settings: dict[str, Any] = {"direction": direction, "leaves": BOXES[:1]}
        answer = bound(getattr(reference, operator), BOXES, "sum")
        return Work(
            inputs,
            [
                side(OURS, lambda: bound(ours(operator), BOXES, "sum"), **settings),
                side(TORCHVISION, lambda: bound(torchvision(operator), BOXES, "sum"), **settings),
            ],
            oracle=oracle_of(answer, direction, BOXES[:1]),
            floor_bytes=nbytes(dtype) * n * (8 if direction == FORWARD else 12),
        )

    return Case(operator, f"{n} pairs", name_of(dtype), direction, make, **options)


def pairs(kind: str, n: int, m: int, dtype: torch.dtype = F32, **options: Any) -> Case:
    """Every pair of two sets."""
    operator = f"{kind}_box_iou"

    def make(device: torch.device) -> Work:
        from torchkiln import backend

        def answer(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
            with backend("reference"):
                return ours(operator)(boxes1, boxes2)  # type: ignore[no-any-return]

        return Work(
            {
                "boxes1": scenes.uniform_boxes(n, 0).to(device, dtype),
                "boxes2": scenes.uniform_boxes(m, 1).to(device, dtype),
            },
            [
                side(OURS, lambda: bound(ours(operator), BOXES)),
                side(TORCHVISION, lambda: bound(torchvision(operator), BOXES)),
            ],
            oracle=oracle_of(bound(answer, BOXES)),
            floor_bytes=nbytes(dtype) * (n * m + 4 * (n + m)),
        )

    return Case(operator, f"{n}x{m}", name_of(dtype), FORWARD, make, **options)


def loss_rows() -> Iterator[Case]:
    """RetinaNet's logits, the boxes of a few images, and anchors against an image's objects."""
    for direction in (FORWARD, BOTH):
        yield softmax_focal_loss(200_000, 80, direction, quick=True)
        yield softmax_focal_loss(200_000, 80, direction, F16)
        yield softmax_focal_loss(2000, 81, direction)
    for kind in KINDS:
        yield pairs(kind, 20_000, 100, targets=(FLOOR,), quick=True)
        for direction in (FORWARD, BOTH):
            yield matched(kind, 20_000, direction, quick=True)


def cpu_rows(threads: int) -> Iterator[Case]:
    """On the CPU, where mmcv has no focal loss."""
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    yield softmax_focal_loss(20_000, 80, BOTH, **options)
    for kind in KINDS:
        yield pairs(kind, 20_000, 100, **options)
        yield matched(kind, 20_000, BOTH, **options)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    for direction in (FORWARD, BOTH):
        yield softmax_focal_loss(50, 7, direction, **options)
        yield matched("complete", 50, direction, **options)
    yield pairs("distance", 50, 9, **options)


GPU_TABLES = (loss_rows,)
