"""Soft suppression in plain PyTorch, from its definition: one box after the other, class by class.

Source: Bodla et al., "Soft-NMS", 2017, equations 2 and 3; ties and NaN as documented with the
public functions.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.nms import at_threshold, output_size
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["soft_nms", "soft_nms_padded"]


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """IoU of one box with others; NaN where the union is empty or a coordinate is NaN."""
    upper, lower = torch.minimum(box[2:], others[:, 2:]), torch.maximum(box[:2], others[:, :2])
    intersection = (upper - lower).clamp(min=0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).clamp(min=0).prod(1)
    union = (box[2:] - box[:2]).clamp(min=0).prod() + areas - intersection
    return intersection / torch.where(union > 0, union, math.nan)


def _factors(overlaps: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == 2:
        return torch.where(overlaps.isnan(), 1.0, (-(overlaps**2) / sigma).exp())
    lowered = torch.zeros_like(overlaps) if method == 0 else 1 - overlaps
    return torch.where(overlaps >= iou_threshold, lowered, 1.0)


def _select(
    boxes: Tensor,
    scores: Tensor,
    rows: Tensor,
    most: int,
    softness: tuple[float, float, float, int],
) -> list[tuple[float, int]]:
    """Scores and rows of what is kept of one class, at most so many."""
    iou_threshold, sigma, min_score, method = softness
    left = rows[~(scores[rows] < min_score)]
    values = scores[left]
    found: list[tuple[float, int]] = []
    while left.numel() and len(found) < most:
        numbers = (~values.isnan()).nonzero()[:, 0]
        best = 0
        if numbers.numel():
            best = int(numbers[values[numbers] == values[numbers].max()][0])
        row, is_number = int(left[best]), bool(numbers.numel())
        found.append((float(values[best]), row))
        others = torch.arange(left.numel(), device=left.device) != best
        left, values = left[others], values[others]
        if is_number:
            factors = _factors(_overlaps(boxes[row], boxes[left]), iou_threshold, sigma, method)
            values = values * factors
        stays = ~(values < min_score)
        left, values = left[stays], values[stays]
    return found


def _by_score(found: tuple[float, int]) -> tuple[bool, float, int]:
    score, row = found
    return (True, 0.0, row) if math.isnan(score) else (False, -score, row)


def _found(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    most: int,
    softness: tuple[float, float, float, int],
) -> list[tuple[float, int]]:
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if idxs is None:
        rows = torch.arange(boxes.shape[0], device=boxes.device)
        return _select(boxes, scores, rows, most, softness)
    found = []
    for value in idxs.unique():
        found += _select(boxes, scores, (idxs == value).nonzero()[:, 0], most, softness)
    return sorted(found, key=_by_score)[:most]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    method: int = 1,
    idxs: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Greedy selection whose scores fall with the overlap.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: from which IoU on methods 0 and 1 act.
        sigma: width of method 2.
        min_score: what falls below it goes.
        method: 0 naive, 1 linear, 2 gaussian.
        idxs: (N,) class of each box, or None.
        offset: added to x2 and y2.

    Returns:
        (K,) rows by descending new score, and (K,) the scores.
    """
    softness = (iou_threshold, sigma, min_score, method)
    if boxes.dtype in (torch.float16, torch.bfloat16):
        boxes = boxes.float()
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    found = _found(boxes, scores, idxs, boxes.shape[0], softness)
    indices = torch.tensor([row for _, row in found], dtype=torch.int64, device=boxes.device)
    return indices, scores.new_tensor([score for score, _ in found])


def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    max_output: int,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    method: int = 1,
    idxs: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `max_output` of `soft_nms` followed by -1 and 0, and how many they are."""
    rows, values = soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, idxs, offset)
    count = min(max_output, rows.shape[0])
    indices, kept = rows.new_full((max_output,), -1), scores.new_zeros(max_output)
    indices[:count], kept[:count] = rows[:count], values[:count]
    return indices, kept, torch.tensor(count, dtype=torch.int64, device=boxes.device)


def parity() -> Parity:
    """What both are tried on; soft_nms_padded stands first because its sizes are known."""
    functions = ("soft_nms_padded", "soft_nms")
    return Parity(
        op="soft_nms",
        functions=functions,
        tier="B",
        fuzz=_fuzz,
        cases=tuple(
            Case(f"{name}_{function}", _for(function, make), functions=(function,))
            for function in functions
            for name, make in _CASES.items()
        ),
        workloads=(
            # One class, and all classes of a detector in one call, whole and cut to what it shows.
            Workload("class", {"boxes": 500}, _scene, ("soft_nms",)),
            Workload("large", {"boxes": 4000}, _scene, ("soft_nms",)),
            Workload("classes", {"boxes": 40_000, "classes": 80}, _scene, ("soft_nms",)),
            Workload(
                "shown", {"boxes": 40_000, "classes": 80, "most": 100}, _scene, ("soft_nms_padded",)
            ),
        ),
    )


def _scene(sizes: Sizes) -> dict[str, Any]:
    boxes, scores, owner = scenes.clustered_scene(sizes["boxes"], scenes.SEED)
    arguments: dict[str, Any] = {"boxes": boxes, "scores": scores, "min_score": 0.05}
    if "classes" in sizes:
        arguments["idxs"] = scenes.classes_of(owner, sizes["classes"], scenes.SEED)
    if "most" in sizes:
        arguments["max_output"] = sizes["most"]
    return arguments


_Make = Callable[[Inputs], dict[str, Any]]


def _for(function: str, make: _Make) -> Callable[[Inputs], Mapping[str, Any]]:
    cut = {"max_output": 20} if function == "soft_nms_padded" else {}
    return lambda new: {**make(new), **cut}


def _random(count: int, extent: float = 40.0, classes: int = 0, **options: Any) -> _Make:
    def make(new: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "boxes": new.boxes(count, extent),
            "scores": new.uniform(count),
        }
        if classes:
            arguments["idxs"] = new.integers(count, high=classes)
        return {**arguments, "min_score": 0.05, **options}

    return make


def _degenerate(method: str) -> _Make:
    """Equal boxes, points, lines, NaN and infinities, in boxes and scores."""

    def make(new: Inputs) -> dict[str, Any]:
        nan, inf = math.nan, math.inf
        rows: list[list[float]]
        rows = [[0, 0, 4, 4], [0, 0, 4, 4], [2, 2, 2, 2], [2, 2, 2, 2], [1, 1, 3, 1], [3, 3, 1, 1]]
        rows += [[0, nan, 4, 4], [0, 0, 4, 4], [0, 0, inf, inf], [0, 0, 4, 8], [0, 0, 4, 4]]
        scores = [0.5, 0.5, 0.75, 0.25, 0.5, 1, 2, nan, inf, 0.0, nan]
        return {
            "boxes": torch.tensor(rows, dtype=torch.float64),
            "scores": torch.tensor(scores, dtype=torch.float64),
            "iou_threshold": 0.5,
            "min_score": 0.0,
            "method": method,
        }

    return make


_CASES = {
    "typical": _random(70),
    "naive": _random(70, method="naive", iou_threshold=0.2),
    "gaussian": _random(70, method="gaussian", sigma=0.4),
    "classes": _random(90, classes=3, method="gaussian"),
    "at_threshold": lambda new: {
        **dict(zip(("boxes", "scores"), at_threshold(3, 10), strict=True)),
        "iou_threshold": 0.3,
        "method": "naive",
    },
    "offset": _random(70, method="naive", offset=1.0),
    "empty": _random(0),
    "single": _random(1, classes=1),
    # More than one tile of the order, and classes that do not fit into registers.
    "tiles": _random(1200, 100.0, classes=2, min_score=0.6),
    "many_classes": _random(300, 20.0, classes=120),
    "degenerate": _degenerate("linear"),
    "degenerate_gaussian": _degenerate("gaussian"),
    # Areas beyond float16.
    "large": _random(50, 6e4),
}


def _fuzz(draw: Draw) -> dict[str, Any]:
    boxes = draw.boxes(draw.size(30), 40.0)
    arguments: dict[str, Any] = {
        "boxes": boxes,
        "scores": draw.scores(len(boxes)).abs(),
        "iou_threshold": draw.threshold(boxes),
        "sigma": draw.pick(0.5, 0.1, 3.0),
        "min_score": draw.pick(0.0, 0.001, 0.25, 0.5),
        "method": draw.option("method", "naive", "linear", "gaussian"),
    }
    if draw.option("offset", False, True):
        arguments["offset"] = draw.pick(1.0, 0.25)
    if draw.function == "soft_nms_padded":
        arguments["max_output"] = output_size(draw)
    if draw.option("classes", False, True):
        arguments["idxs"] = draw.labels(len(boxes), 3)
    return arguments
