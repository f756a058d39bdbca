"""Non-maximum suppression in plain PyTorch, from its definition: one box after the other.

Source: Girshick et al., "Rich feature hierarchies", 2014, section 2.2; ties and NaN as documented
with the public functions.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["batched_nms", "nms", "nms_padded"]

# Makes boxes and scores.
_Candidates = Callable[[Inputs], tuple[Tensor, Tensor]]


def _suppressed_by(box: Tensor, others: Tensor, iou_threshold: float) -> Tensor:
    """Which of `others` overlap `box` by more than the threshold; of an empty union, NaN."""
    upper, lower = torch.minimum(box[2:], others[:, 2:]), torch.maximum(box[:2], others[:, :2])
    intersection = (upper - lower).clamp(min=0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).clamp(min=0).prod(1)
    union = (box[2:] - box[:2]).clamp(min=0).prod() + areas - intersection
    return intersection / union > iou_threshold


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    offset: float = 0.0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    """Greedy suppression inside each class.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        scores: (N,).
        idxs: (N,) class of each box.
        iou_threshold: a box goes when it overlaps a kept one by more.
        offset: added to x2 and y2.
        score_threshold: only boxes with a greater score are looked at.
        max_output: the most rows.

    Returns:
        (K,) rows of the kept boxes by descending score.
    """
    if boxes.dtype in (torch.float16, torch.bfloat16):
        boxes, scores = boxes.float(), scores.float()
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    if score_threshold is not None:
        limit = torch.tensor(score_threshold, dtype=scores.dtype)
        rows = (scores > limit.to(scores.device)).nonzero().squeeze(1)
        kept = batched_nms(boxes[rows], scores[rows], idxs[rows], iou_threshold)
        return rows[kept][:max_output]
    kept = greedy(scores, idxs, lambda row: _suppressed_by(boxes[row], boxes, iou_threshold))
    return kept[:max_output]


def greedy(scores: Tensor, idxs: Tensor | None, hits: Callable[[int], Tensor]) -> Tensor:
    """Rows that stay, by descending score, when each suppresses `hits(row)` of its class."""
    is_number = ~scores.isnan()
    alive = torch.ones_like(scores, dtype=torch.bool)
    kept = []
    for row in by_score(scores).tolist():
        if not alive[row]:
            continue
        kept.append(row)
        if is_number[row]:
            meets = is_number if idxs is None else is_number & (idxs == idxs[row])
            alive &= ~(hits(row) & meets)
    return torch.tensor(kept, dtype=torch.int64, device=scores.device)


def by_score(scores: Tensor) -> Tensor:
    """Rows by descending score, the lower one first among equals, NaN last."""
    is_number = ~scores.isnan()
    ranked = torch.where(is_number, scores, torch.full_like(scores, -math.inf))
    # By score, then numbers before NaN: the last of two stable sorts decides first.
    by_kind = torch.argsort((~is_number).int(), stable=True)
    return by_kind[torch.argsort(ranked[by_kind], descending=True, stable=True)]


def padded(kept: Tensor, max_output: int) -> tuple[Tensor, Tensor]:
    """The first rows followed by -1, and how many they are."""
    kept = kept[:max_output]
    rows = kept.new_full((max_output,), -1)
    rows[: kept.shape[0]] = kept
    return rows, torch.tensor(kept.shape[0], dtype=torch.int64, device=kept.device)


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    offset: float = 0.0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    """Greedy suppression among all boxes; see `batched_nms`."""
    classes = torch.zeros_like(scores, dtype=torch.int64)
    return batched_nms(boxes, scores, classes, iou_threshold, offset, score_threshold, max_output)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    idxs: Tensor | None = None,
    offset: float = 0.0,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `max_output` rows of `batched_nms` followed by -1, and how many they are."""
    classes = torch.zeros_like(scores, dtype=torch.int64) if idxs is None else idxs
    kept = batched_nms(boxes, scores, classes, iou_threshold, offset, score_threshold)
    return padded(kept, max_output)


def parity() -> Parity:
    """What the family is tried on; nms_padded stands first because its sizes are known."""
    return Parity(
        op="nms",
        functions=("nms_padded", "nms", "batched_nms"),
        tier="X",
        fuzz=_fuzz,
        cases=tuple(
            Case(f"{name}_{function}", _make(boxes, function), functions=(function,))
            for function in ("nms_padded", "nms", "batched_nms")
            for name, boxes in _CANDIDATES.items()
        )
        + tuple(
            Case(f"options_{function}", _with_options(function), functions=(function,))
            for function in ("nms_padded", "nms", "batched_nms")
        )
        + tuple(
            Case(f"at_threshold_{function}", _at_threshold(function), functions=(function,))
            for function in ("nms_padded", "nms", "batched_nms")
        ),
        workloads=(
            # Proposals of one level of a pyramid, of all levels, and without a cut before.
            Workload("level", {"boxes": 1000}, _proposals, functions=("nms",)),
            Workload("proposals", {"boxes": 4741}, _proposals, functions=("nms",)),
            Workload("uncut", {"boxes": 20_000}, _proposals, functions=("nms",)),
            Workload("padded", {"boxes": 4741, "most": 1000}, _padded, functions=("nms_padded",)),
            # What RetinaNet and YOLO have before suppression, and many times more.
            Workload("detections", {"boxes": 10_000, "classes": 80}, _classified, ("batched_nms",)),
            Workload("many", {"boxes": 100_000, "classes": 80}, _classified, ("batched_nms",)),
        ),
    )


def _proposals(sizes: Sizes) -> dict[str, Any]:
    boxes, scores, _ = scenes.clustered_scene(sizes["boxes"], scenes.SEED)
    return {"boxes": boxes, "scores": scores, "iou_threshold": 0.7}


def _padded(sizes: Sizes) -> dict[str, Any]:
    return {**_proposals(sizes), "max_output": sizes["most"]}


def _classified(sizes: Sizes) -> dict[str, Any]:
    boxes, scores, owner = scenes.clustered_scene(sizes["boxes"], scenes.SEED)
    idxs = scenes.classes_of(owner, sizes["classes"], scenes.SEED)
    return {"boxes": boxes, "scores": scores, "idxs": idxs, "iou_threshold": 0.5}


def _make(candidates: _Candidates, function: str) -> Callable[[Inputs], Mapping[str, Any]]:
    def make(new: Inputs) -> Mapping[str, Any]:
        boxes, scores = candidates(new)
        arguments: dict[str, Any] = {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}
        if function == "nms_padded":
            arguments["max_output"] = 20
        if function == "batched_nms":
            arguments["idxs"] = new.integers(boxes.shape[0], high=3)
        return arguments

    return make


def _with_options(function: str) -> Callable[[Inputs], Mapping[str, Any]]:
    """More than a panel of boxes, half of them left out, NaN too; grown by one."""

    def make(new: Inputs) -> Mapping[str, Any]:
        arguments = dict(_make(_random(150, 40.0), function)(new))
        arguments["scores"][3] = math.nan
        arguments |= {"offset": 1.0, "score_threshold": 0.5}
        return arguments if function == "nms_padded" else arguments | {"max_output": 30}

    return make


def _random(count: int, extent: float = 100.0) -> _Candidates:
    return lambda new: (new.boxes(count, extent), new.uniform(count))


def _ties(new: Inputs) -> tuple[Tensor, Tensor]:
    return new.boxes(40, 10.0), new.integers(40, high=4).double() / 4


def _degenerate(new: Inputs) -> tuple[Tensor, Tensor]:
    """Equal boxes, points, lines, exchanged corners, NaN and infinities, in boxes and scores."""
    nan, inf = math.nan, math.inf
    rows: list[list[float]]
    rows = [[0, 0, 4, 4], [0, 0, 4, 4], [2, 2, 2, 2], [2, 2, 2, 2], [1, 1, 3, 1], [3, 3, 1, 1]]
    rows += [[0, nan, 4, 4], [0, 0, 4, 4], [-inf, 0, 4, 4], [0, 0, inf, inf], [0, 0, 4, 4]]
    scores = [0.5, 0.5, 0.75, 0.25, 0.5, 1, 2, nan, inf, -inf, nan]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64)


_CANDIDATES = {
    "typical": _random(70, 40.0),
    "empty": _random(0),
    "single": _random(1),
    # Around the panels of 32 to 128 boxes that blocks and threads take.
    "panel": _random(64, 30.0),
    "panels": _random(257, 100.0),
    # More than one tile of the sort.
    "tiles": _random(1500, 60.0),
    "ties": _ties,
    "degenerate": _degenerate,
    # Areas beyond float16.
    "large": _random(50, 6e4),
}


def at_threshold(numerator: int, denominator: int) -> tuple[Tensor, Tensor]:
    """Pairs of boxes with one IoU, and scores: a quotient rounds to it, a product may not."""
    first = torch.arange(1.0, 41, dtype=torch.float64) * denominator
    both = torch.stack([first, first / denominator * numerator], 1).flatten()
    below = torch.arange(40.0, dtype=torch.float64).repeat_interleave(2) * 2
    boxes = torch.stack([torch.zeros_like(both), below, both, below + 1], 1)
    return boxes, torch.arange(80.0, 0, -1, dtype=torch.float64) / 80


def _at_threshold(function: str) -> Callable[[Inputs], Mapping[str, Any]]:
    def make(new: Inputs) -> Mapping[str, Any]:
        arguments = dict(_make(lambda new: at_threshold(13, 20), function)(new))
        arguments |= {"iou_threshold": 13 / 20}
        return arguments | ({"max_output": 80} if function == "nms_padded" else {})

    return make


def output_size(draw: Draw) -> int:
    """The length of a padded result; now and then one that no memory has."""
    if draw.chance(0.03):
        draw.promise(ValueError)
        return draw.pick(2**30 + 1, 2**40)
    return draw.size(30)


def _fuzz(draw: Draw) -> dict[str, Any]:
    boxes = draw.boxes(draw.size(60), draw.pick(100.0, 40.0))
    arguments: dict[str, Any] = {"boxes": boxes, "scores": draw.scores(len(boxes))}
    arguments["iou_threshold"] = draw.threshold(boxes)
    if draw.function == "nms_padded":
        arguments["max_output"] = output_size(draw)
    elif draw.chance(0.25):
        arguments["max_output"] = draw.pick(2**40, draw.size(30), draw.size(30))
    if draw.chance(0.25):
        arguments["score_threshold"] = draw.pick(0.5, 0.0, -1.0)
    if draw.chance(0.25):
        arguments["offset"] = draw.pick(1.0, 0.5)
    has_classes = draw.function == "nms_padded" and draw.option("classes", False, True)
    if has_classes or draw.function == "batched_nms":
        arguments["idxs"] = draw.labels(len(boxes), 3)
    return arguments
