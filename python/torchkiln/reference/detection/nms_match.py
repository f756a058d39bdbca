"""Groups of boxes around those that suppression keeps, in plain PyTorch."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.nms import at_threshold, by_score
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes
from torchkiln.testing._groups import in_one, matched

__all__ = ["nms_groups", "nms_match"]


def _overlaps(box: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Intersections and unions."""
    upper, lower = torch.minimum(box[2:], others[:, 2:]), torch.maximum(box[:2], others[:, :2])
    intersection = (upper - lower).clamp(min=0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).clamp(min=0).prod(1)
    return intersection, (box[2:] - box[:2]).clamp(min=0).prod() + areas - intersection


def nms_groups(
    boxes: Tensor, scores: Tensor, iou_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy grouping.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: from which IoU on a box joins the group of a better one.

    Returns:
        (N,) rows by descending score, (N,) the number of the group of each, () how many.
    """
    if boxes.dtype in (torch.float16, torch.bfloat16):
        boxes, scores = boxes.float(), scores.float()
    rows = by_score(scores)
    boxes, is_number = boxes[rows], ~scores[rows].isnan()
    groups = torch.full_like(rows, -1)
    count = 0
    for place in range(rows.shape[0]):
        if groups[place] >= 0:
            continue
        if is_number[place]:
            intersection, union = _overlaps(boxes[place], boxes)
            joins = (union > 0) & (intersection / union >= iou_threshold) & is_number
            groups[joins & (groups < 0)] = count
        groups[place] = count
        count += 1
    return rows, groups, torch.tensor(count, dtype=torch.int64, device=boxes.device)


def nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[Tensor]:
    """The rows of each group of `nms_groups`."""
    rows, groups, count = nms_groups(boxes, scores, iou_threshold)
    return [rows[groups == group] for group in range(int(count))]


def parities() -> tuple[Parity, ...]:
    """What both are tried on."""
    cases = (
        Case("typical", _random(70, 40.0)),
        Case("empty", _random(0)),
        Case("single", _random(1)),
        Case("panels", _random(257)),
        # More than one tile of the sort.
        Case("tiles", _random(1100)),
        Case("ties", _grid),
        Case("at_threshold", _at_threshold),
    )
    workloads = (Workload("proposals", {"boxes": 4000}, _scene),)
    return (
        Parity(op="nms_groups", tier="X", fuzz=_fuzz, cases=cases, workloads=workloads),
        Parity(
            op="nms_match",
            tier="X",
            function=matched,
            reference=_matched_plainly,
            fuzz=_fuzz,
            cases=cases,
            workloads=workloads,
        ),
    )


def _matched_plainly(**arguments: Any) -> tuple[Tensor, Tensor]:
    return in_one(nms_match(**arguments))


def _random(count: int, extent: float = 60.0) -> Callable[[Inputs], dict[str, Any]]:
    def make(new: Inputs) -> dict[str, Any]:
        boxes, scores = new.boxes(count, extent), new.uniform(count)
        return {"boxes": boxes, "scores": scores, "iou_threshold": 0.3}

    return make


def _at_threshold(new: Inputs) -> dict[str, Any]:
    boxes, scores = at_threshold(3, 10)
    return {"boxes": boxes, "scores": scores, "iou_threshold": 0.3}


def _grid(new: Inputs) -> dict[str, Any]:
    """Equal scores, overlaps of exactly a half, points, NaN."""
    corner = new.integers(60, 2, high=4).double()
    boxes = torch.cat([corner, corner + new.integers(60, 2, high=3)], 1)
    scores = new.integers(60, high=4).double() / 4
    boxes[7, 1], scores[9] = torch.nan, torch.nan
    return {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}


def _scene(sizes: Sizes) -> dict[str, Any]:
    boxes, scores, _ = scenes.clustered_scene(sizes["boxes"], scenes.SEED)
    return {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}


def _fuzz(draw: Draw) -> dict[str, Any]:
    boxes = draw.boxes(draw.size(60), 40.0)
    scores = draw.scores(len(boxes))
    return {"boxes": boxes, "scores": scores, "iou_threshold": draw.threshold(boxes)}
