"""Suppression of lanes in plain PyTorch.

Source: Tabelini et al., "Keep your Eyes on the Lane", 2021, section 3.5.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.nms import by_score, greedy, output_size, padded
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload

__all__ = ["line_nms", "line_nms_groups", "line_nms_padded"]


def _runs(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(N, S): on which heights each lane runs; (N,): whether it starts outside."""
    heights = boxes.shape[1] - 5
    at = torch.arange(heights, device=boxes.device, dtype=boxes.dtype)
    first, length = (boxes[:, 2] * (heights - 1) + 0.5)[:, None], boxes[:, 4:5]
    is_lane = (first.abs() < 2**24) & (length >= 1)
    start = first.trunc()
    runs = is_lane & (at >= start) & (at <= start + length.trunc() - 1)
    return runs, start.squeeze(1) < 0


def _hits(boxes: Tensor, distance: float) -> Callable[[int], Tensor]:
    """Which lanes (N,) are near to one."""
    (runs, is_outside), x = _runs(boxes), boxes[:, 5:]

    def hits(row: int) -> Tensor:
        common = runs & runs[row]
        apart = torch.where(common, (x - x[row]).abs(), 0.0).sum(1)
        count = common.sum(1)
        return (count > 0) & (apart < distance * count) & ~(is_outside & is_outside[row])

    return hits


def _wide(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    is_half = boxes.dtype in (torch.float16, torch.bfloat16)
    return (boxes.float(), scores.float()) if is_half else (boxes, scores)


def line_nms(
    boxes: Tensor, scores: Tensor, distance: float, labels: Tensor | None = None
) -> Tensor:
    """Greedy suppression by the mean distance over common heights.

    Args:
        boxes: (N, 5 + S); columns 2 and 4 are start and length, from 5 on x.
        scores: (N,).
        distance: below which lanes suppress.
        labels: (N,); only lanes of one label meet.

    Returns:
        (K,) rows of the kept lanes by descending score.
    """
    boxes, scores = _wide(boxes, scores)
    return greedy(scores, labels, _hits(boxes, distance))


def line_nms_padded(
    boxes: Tensor, scores: Tensor, distance: float, max_output: int, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first of `line_nms` followed by -1, and how many they are."""
    return padded(line_nms(boxes, scores, distance, labels), max_output)


def line_nms_groups(
    boxes: Tensor, scores: Tensor, distance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) rows by descending score, (N,) the number of the kept lane of each, () how many."""
    boxes, scores = _wide(boxes, scores)
    rows, kept = by_score(scores), line_nms(boxes, scores, distance)
    groups = torch.full_like(rows, -1)
    hits = _hits(boxes, distance)
    for number, row in enumerate(kept.tolist()):
        joins = hits(row) & ~scores.isnan() & ~scores[row].isnan()
        joins[kept] = False
        joins[row] = True
        groups[joins[rows] & (groups < 0)] = number
    return rows, groups, torch.tensor(len(kept), dtype=torch.int64, device=boxes.device)


def parity() -> Parity:
    """What both are tried on."""
    functions = ("line_nms_padded", "line_nms", "line_nms_groups")
    made = {
        "typical": _lanes(70),
        "empty": _lanes(0),
        "single": _lanes(1),
        "panels": _lanes(257),
        "labels": _labelled,
        "degenerate": _degenerate,
    }
    return Parity(
        op="line_nms",
        functions=functions,
        tier="X",
        fuzz=_fuzz,
        cases=tuple(
            Case(f"{name}_{function}", _for(function, make), functions=(function,))
            for function in functions
            for name, make in made.items()
            if not (function == "line_nms_groups" and name == "labels")
        ),
        workloads=(
            Workload("lanes", {"boxes": 1000}, _scene, ("line_nms",)),
            Workload("groups", {"boxes": 1000}, _scene, ("line_nms_groups",)),
            Workload("padded", {"boxes": 1000, "most": 10}, _scene, ("line_nms_padded",)),
        ),
    )


_Make = Callable[[Inputs], dict[str, Any]]


def _for(function: str, make: _Make) -> Callable[[Inputs], Mapping[str, Any]]:
    cut = {"max_output": 20} if function == "line_nms_padded" else {}
    return lambda new: {**make(new), **cut}


def straight_lanes(new: Inputs, count: int, heights: int = 20) -> Tensor:
    """Straight lanes that lean a little."""
    head = torch.cat(
        [new.uniform(count, 2), new.uniform(count, 2), new.uniform(count, 1, high=heights)], 1
    )
    lean = new.normal(count, 1) * torch.arange(heights)
    return torch.cat([head, new.uniform(count, 1, high=300) + lean], 1)


def _lanes(count: int) -> _Make:
    return lambda new: {
        "boxes": straight_lanes(new, count),
        "scores": new.uniform(count),
        "distance": 15.321,
    }


def _labelled(new: Inputs) -> dict[str, Any]:
    return _lanes(90)(new) | {"labels": new.integers(90, high=3)}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """Equal lanes and scores; starts, lengths, places and scores that are no numbers."""
    nan, inf = math.nan, math.inf
    boxes, scores = straight_lanes(new, 10).repeat(2, 1), new.uniform(10).repeat(2)
    boxes[1, 2], boxes[2, 4], boxes[3, 5:] = nan, nan, nan
    boxes[4, 2], boxes[5, 4], boxes[6, 2] = -1.0, 0.5, inf
    boxes[7, 4], scores[8] = inf, nan
    return {"boxes": boxes, "scores": scores, "distance": 10.0}


def _scene(sizes: Sizes) -> dict[str, Any]:
    new = Inputs(20)
    count = sizes["boxes"]
    arguments: dict[str, Any] = {
        "boxes": straight_lanes(new, count, 72).float(),
        "scores": new.uniform(count).float(),
        "distance": 50.0,
    }
    return arguments | ({"max_output": sizes["most"]} if "most" in sizes else {})


def _fuzz(draw: Draw) -> dict[str, Any]:
    count, heights = draw.size(30), draw.option("heights", 2, 20)
    head = draw.uniform(count, 5)
    head[:, 4] *= 1.2 * heights
    head[:, 2] = 1.2 * head[:, 2] - 0.2  # some start outside
    x = draw.boxes(count, 40.0)[:, :1] + draw.boxes(count, 4.0)[:, :1] * torch.arange(heights)
    lanes = draw.strange(torch.cat([head, x], 1))
    arguments: dict[str, Any] = {
        "boxes": draw.repeated(lanes, lanes),
        "scores": draw.scores(count),
        "distance": draw.pick(-1.0, draw.number(0.1, 30.0), 1e4),
    }
    if draw.function == "line_nms_padded":
        arguments["max_output"] = output_size(draw)
    if draw.function != "line_nms_groups" and draw.option("labels", False, True):
        arguments["labels"] = draw.labels(count, 3)
    return arguments
