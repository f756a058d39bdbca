"""Suppression of rotated boxes, quadrilaterals and boxes in space in plain PyTorch."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.box_iou_rotated import box_iou_rotated, corners
from torchkiln.reference.detection.nms import batched_nms, greedy, output_size, padded
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = [
    "nms3d",
    "nms3d_normal",
    "nms3d_normal_padded",
    "nms3d_padded",
    "nms_quadri",
    "nms_quadri_padded",
    "nms_rotated",
    "nms_rotated_padded",
]

# Forms of box_iou_rotated.
_RECTANGLE, _QUAD, _GROUND = 0, 1, 3


def kept_of_form(
    form: int,
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None,
    clockwise: bool = True,
) -> Tensor:
    """Rows that stay among boxes in a form of `box_iou_rotated`."""
    wide = torch.promote_types(boxes.dtype, torch.float32)
    boxes, scores = boxes.to(wide), scores.to(wide)
    area = box_iou_rotated(boxes, boxes, form, mode=2, aligned=True)

    def hits(row: int) -> Tensor:
        overlaps = box_iou_rotated(boxes[row : row + 1], boxes, form, clockwise=clockwise)[0]
        # Two without an area have no overlap that could exceed anything, not even a number below 0.
        return (overlaps > iou_threshold) & ~((area == 0) & (area[row] == 0))

    return greedy(scores, labels, hits)


def nms_rotated(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> Tensor:
    """Rows (K,) of the kept ones among x, y, w, h, angle (N, 5), inside each label."""
    return kept_of_form(_RECTANGLE, boxes, scores, iou_threshold, labels, clockwise)


def nms_quadri(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """Rows (K,) of the kept ones among convex quadrilaterals (N, 8), inside each label."""
    return kept_of_form(_QUAD, boxes, scores, iou_threshold, labels)


def nms3d(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """Rows (K,) of the kept ones among x, y, z, dx, dy, dz, angle (N, 7), seen from above."""
    flat = torch.cat([boxes[:, :2], torch.zeros_like(boxes[:, :1]), boxes[:, 3:5]], 1)
    flat = torch.cat([flat, torch.ones_like(boxes[:, :1]), boxes[:, 6:]], 1)
    return kept_of_form(_GROUND, flat, scores, iou_threshold, labels)


def nms3d_normal(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """`nms3d` of boxes whose angle does not count."""
    wide = torch.promote_types(boxes.dtype, torch.float32)
    center, half = boxes[:, :2].to(wide), boxes[:, 3:5].to(wide) / 2
    classes = torch.zeros_like(scores, dtype=torch.int64) if labels is None else labels
    upright = torch.cat([center - half, center + half], 1)
    return batched_nms(upright, scores.to(wide), classes, iou_threshold)


def nms_rotated_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> tuple[Tensor, Tensor]:
    """The first of `nms_rotated` followed by -1, and how many they are."""
    return padded(nms_rotated(boxes, scores, iou_threshold, labels, clockwise), max_output)


def nms_quadri_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first of `nms_quadri` followed by -1, and how many they are."""
    return padded(nms_quadri(boxes, scores, iou_threshold, labels), max_output)


def nms3d_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first of `nms3d` followed by -1, and how many they are."""
    return padded(nms3d(boxes, scores, iou_threshold, labels), max_output)


def nms3d_normal_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first of `nms3d_normal` followed by -1, and how many they are."""
    return padded(nms3d_normal(boxes, scores, iou_threshold, labels), max_output)


# --- what it is tried on ------------------------------------------------------------------------

_Rows = Callable[[Inputs, int], Tensor]
_Make = Callable[[Inputs], dict[str, Any]]


def _turned(new: Inputs, count: int) -> Tensor:
    """Rotated boxes that crowd, so that a part of them goes."""
    center, size = new.uniform(count, 2, high=30), new.uniform(count, 2, low=2, high=14)
    return torch.cat([center, size, new.uniform(count, 1, low=-7, high=7)], 1)


def _quads(new: Inputs, count: int) -> Tensor:
    """Convex ones: on circles, by ascending angle."""
    center, radius = new.uniform(count, 1, 2, high=30), new.uniform(count, 1, 1, low=2, high=9)
    gaps = new.uniform(count, 4, low=0.5)
    angle = new.uniform(count, 1, high=6) + (gaps / gaps.sum(1, True) * 2 * math.pi).cumsum(1)
    return (center + radius * torch.stack([angle.cos(), angle.sin()], 2)).flatten(1)


def _upright(new: Inputs, count: int) -> Tensor:
    turned = _turned(new, count)
    height = new.uniform(count, 1, low=-50, high=50)
    return torch.cat([turned[:, :2], height, turned[:, 2:4], height, turned[:, 4:]], 1)


def parities() -> list[Parity]:
    """Each operator and its padded form, which stands first because its sizes are known."""
    return [
        _parity("nms_rotated", _turned, _turned_scene),
        _parity("nms_quadri", _quads, _quad_scene),
        _parity("nms3d", _upright, _street_scene),
        _parity("nms3d_normal", _upright, _street_scene),
    ]


def _parity(op: str, rows: _Rows, scene: Callable[[Sizes], dict[str, Any]]) -> Parity:
    functions = (f"{op}_padded", op)
    made = {
        "typical": _random(rows, 70),
        "labels": _random(rows, 90, labels=3),
        "empty": _random(rows, 0),
        "single": _random(rows, 1),
        "panels": _random(rows, 257),
        # More than one tile of the sort.
        "tiles": _random(rows, 1100, labels=2, iou_threshold=0.02),
        "degenerate": _degenerate(rows),
        "apart": _apart(rows),
    }
    if op == "nms_rotated":
        made["counterclockwise"] = _random(rows, 70, clockwise=False)
    return Parity(
        op=op,
        functions=functions,
        tier="X",
        fuzz=_fuzz,
        cases=tuple(
            Case(f"{name}_{function}", _for(function, make), functions=(function,))
            for function in functions
            for name, make in made.items()
            if name != "tiles" or function == op
        ),
        workloads=(
            Workload("image", {"boxes": 2000}, scene, (op,)),
            Workload("many", {"boxes": 10_000, "classes": 15}, scene, (op,)),
            Workload("padded", {"boxes": 2000, "most": 500}, scene, (f"{op}_padded",)),
        ),
    )


def _for(function: str, make: _Make) -> Callable[[Inputs], Mapping[str, Any]]:
    cut = {"max_output": 20} if function.endswith("_padded") else {}
    return lambda new: {**make(new), **cut}


def _random(rows: _Rows, count: int, labels: int = 0, **options: Any) -> _Make:
    def make(new: Inputs) -> dict[str, Any]:
        boxes, scores = rows(new, count), new.uniform(count)
        if labels:
            options["labels"] = new.integers(count, high=labels)
        return {"boxes": boxes, "scores": scores, "iou_threshold": 0.2137} | options

    return make


def _degenerate(rows: _Rows) -> _Make:
    """Equal boxes and scores, and numbers that are not finite, in boxes and scores."""

    def make(new: Inputs) -> dict[str, Any]:
        nan, inf = math.nan, math.inf
        boxes, scores = rows(new, 8).repeat(2, 1), new.uniform(8).repeat(2)
        boxes[1, 0], boxes[2, 1], boxes[3, 3] = nan, inf, -inf
        scores[4], scores[5], scores[6] = nan, inf, -inf
        return {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}

    return make


def _apart(rows: _Rows) -> _Make:
    """Pairs that do not meet, each with a label: all of them stay."""

    # At a threshold of 0 the reference itself would keep or drop them by its own rounding.
    def make(new: Inputs) -> dict[str, Any]:
        first, second = rows(new, 600), rows(new, 600)
        form = {5: _RECTANGLE, 7: _GROUND, 8: _QUAD}[first.shape[1]]
        area = box_iou_rotated(first, second, form, mode=2, aligned=True)
        pairs = (area == 0).nonzero()[:60, 0]
        boxes = torch.stack([first[pairs], second[pairs]], 1).flatten(0, 1)
        labels = torch.arange(len(boxes)) // 2
        return {"boxes": boxes, "scores": new.uniform(len(boxes)), "iou_threshold": 1e-9,
                "labels": labels}  # fmt: skip

    return make


def _scene(boxes: Tensor, sizes: Sizes, threshold: float) -> dict[str, Any]:
    g = scenes.generator(scenes.SEED + 1)
    count = boxes.shape[0]
    arguments: dict[str, Any] = {
        "boxes": boxes,
        "scores": scenes.quantized(torch.rand(count, generator=g)),
        "iou_threshold": threshold,
    }
    if "classes" in sizes:
        arguments["labels"] = torch.randint(sizes["classes"], (count,), generator=g)
    if "most" in sizes:
        arguments["max_output"] = sizes["most"]
    return arguments


def _turned_scene(sizes: Sizes) -> dict[str, Any]:
    return _scene(scenes.rotated_boxes(sizes["boxes"], scenes.SEED), sizes, 0.1)


def _quad_scene(sizes: Sizes) -> dict[str, Any]:
    turned = scenes.rotated_boxes(sizes["boxes"], scenes.SEED)
    return _scene(corners(turned).flatten(1), sizes, 0.1)


def _street_scene(sizes: Sizes) -> dict[str, Any]:
    return _scene(scenes.cars(sizes["boxes"], scenes.SEED), sizes, 0.25)


def _fuzz(draw: Draw) -> dict[str, Any]:
    op, count = draw.function.removesuffix("_padded"), draw.size(40)
    if op.startswith("nms3d"):
        boxes = draw.upright(count, 60.0)
    else:
        boxes = draw.rotated(count, 60.0)
        boxes = corners(boxes).flatten(1) if op == "nms_quadri" else boxes
    arguments: dict[str, Any] = {
        "boxes": draw.repeated(boxes, boxes),
        "scores": draw.scores(count),
        # Apart or equal, areas are off by rounding alone: 0 and 1 decide nothing.
        "iou_threshold": draw.pick(-0.5, 1.5, draw.number(0.01, 0.99)),
    }
    if draw.function.endswith("_padded"):
        arguments["max_output"] = output_size(draw)
    if draw.option("labels", False, True):
        arguments["labels"] = draw.labels(count, 3)
    if op == "nms_rotated":
        arguments["clockwise"] = draw.option("clockwise", True, False)
    return arguments
