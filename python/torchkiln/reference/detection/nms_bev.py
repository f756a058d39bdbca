"""Suppression of boxes seen from above in plain PyTorch: corners before they are turned, angle."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.nms import batched_nms, by_score, output_size, padded
from torchkiln.reference.detection.nms_rotated import kept_of_form
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["nms_bev", "nms_bev_padded", "nms_normal_bev", "nms_normal_bev_padded"]

_CORNERS = 2  # form of box_iou_rotated


def nms_bev(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    pre_max_size: int | None = None,
    post_max_size: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Rows (K,) of the kept ones among x1, y1, x2, y2, angle (N, 5), inside each label.

    Args:
        boxes: (N, 5).
        scores: (N,).
        iou_threshold: a box goes when it overlaps a kept one by more.
        pre_max_size: how many of the best ones are looked at.
        post_max_size: the most rows.
        labels: (N,).
    """
    rows = by_score(scores)[:pre_max_size]
    few = None if labels is None else labels[rows]
    kept = kept_of_form(_CORNERS, boxes[rows], scores[rows], iou_threshold, few)
    return rows[kept][:post_max_size]


def nms_bev_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    pre_max_size: int | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first of `nms_bev` followed by -1, and how many they are."""
    kept = nms_bev(boxes, scores, iou_threshold, pre_max_size, None, labels)
    return padded(kept, max_output)


def nms_normal_bev(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """`nms_bev` of boxes whose angle does not count."""
    classes = torch.zeros_like(scores, dtype=torch.int64) if labels is None else labels
    return batched_nms(boxes[:, :4], scores, classes, iou_threshold)


def nms_normal_bev_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first of `nms_normal_bev` followed by -1, and how many they are."""
    return padded(nms_normal_bev(boxes, scores, iou_threshold, labels), max_output)


# --- what it is tried on ------------------------------------------------------------------------

_Make = Callable[[Inputs], dict[str, Any]]


def parities() -> list[Parity]:
    """Each function by itself: they are made of other operators, and are judged as they stand."""
    return [
        _parity("nms_bev", nms_bev),
        _parity("nms_bev_padded", nms_bev_padded),
        _parity("nms_normal_bev", nms_normal_bev),
        _parity("nms_normal_bev_padded", nms_normal_bev_padded),
    ]


def _parity(op: str, reference: Callable[..., Any]) -> Parity:
    is_padded = op.endswith("_padded")
    cut = {"max_output": 40} if is_padded else {}
    made = {
        "typical": _random(70, **cut),
        "empty": _random(0, **cut),
        "single": _random(1, **cut),
        "panels": _random(150, **cut),
        "labels": _random(90, labels=3, **cut),
        "not_finite": _not_finite(**cut),
    }
    if not op.startswith("nms_normal"):
        made["best"] = _random(90, pre_max_size=30, **cut)
        made["best_of_few"] = _random(9, labels=2, pre_max_size=500, **cut)
    if op == "nms_bev":
        made["cut"] = _random(90, pre_max_size=60, post_max_size=7)
    sizes = {"boxes": 1000} | ({"most": 500} if is_padded else {})
    return Parity(
        op=op,
        tier="X",
        function=op,
        reference=reference,
        fuzz=_fuzz,
        cases=tuple(Case(name, make) for name, make in made.items()),
        workloads=(Workload("padded" if is_padded else "street", sizes, _street),),
    )


def _random(count: int, labels: int = 0, **options: Any) -> _Make:
    def make(new: Inputs) -> dict[str, Any]:
        boxes = torch.cat([new.boxes(count, 40.0), new.uniform(count, 1, low=-2, high=2)], 1)
        arguments = {"boxes": boxes, "scores": new.uniform(count), "iou_threshold": 0.2137}
        if labels:
            arguments["labels"] = new.integers(count, high=labels)
        return arguments | options

    return make


def _not_finite(**options: Any) -> _Make:
    """Equal boxes and scores, and numbers that are not finite, in boxes and scores."""

    def make(new: Inputs) -> dict[str, Any]:
        arguments = _random(8, **options)(new)
        boxes, scores = arguments["boxes"].repeat(2, 1), arguments["scores"].repeat(2)
        boxes[1, 0], boxes[2, 1] = math.nan, math.nan
        scores[4], scores[5], scores[6] = math.nan, math.inf, -math.inf
        return arguments | {"boxes": boxes, "scores": scores}

    return make


def _street(sizes: Sizes) -> dict[str, Any]:
    cars = scenes.cars(sizes["boxes"], scenes.SEED)
    center, size = cars[:, :2], cars[:, 3:5]
    boxes = torch.cat([center - size / 2, center + size / 2, cars[:, 6:]], 1)
    scores = scenes.quantized(torch.rand(len(cars), generator=scenes.generator(scenes.SEED + 1)))
    cut = {"max_output": sizes["most"]} if "most" in sizes else {}
    return {"boxes": boxes, "scores": scores, "iou_threshold": 0.25, **cut}


def _fuzz(draw: Draw) -> dict[str, Any]:
    count = draw.size(40)
    angle = draw.rotated(count)[:, 4:]
    boxes = torch.cat([draw.boxes(count, 60.0), angle], 1)
    arguments: dict[str, Any] = {
        "boxes": draw.repeated(boxes, boxes),
        "scores": draw.scores(count),
        # Touching or equal, areas are off by rounding alone: 0 and 1 decide nothing.
        "iou_threshold": draw.pick(-0.5, 1.5, draw.number(0.01, 0.99)),
    }
    if draw.function.endswith("_padded"):
        arguments["max_output"] = output_size(draw)
    if draw.option("labels", False, True):
        arguments["labels"] = draw.labels(count, 3)
    if not draw.function.startswith("nms_normal") and draw.chance(0.4):
        arguments["pre_max_size"] = draw.size(30)
    if draw.function == "nms_bev" and draw.chance(0.25):
        arguments["post_max_size"] = draw.size(30)
    return arguments
