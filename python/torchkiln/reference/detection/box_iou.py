"""box_iou in all its modes in plain PyTorch, from the papers.

Sources: GIoU, Rezatofighi et al. 2019, algorithm 1; DIoU and CIoU, Zheng et al. 2020, equations 7
to 11.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["box_iou"]


def _sides(lower: Tensor, upper: Tensor) -> Tensor:
    """Width and height, (..., 2); a box with its corners exchanged has none."""
    return (upper - lower).clamp(min=0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0; the inner `where` keeps its gradient free of NaN."""
    is_zero = denominator == 0
    safe = torch.where(is_zero, torch.ones_like(denominator), denominator)
    return torch.where(is_zero, torch.zeros_like(denominator), numerator / safe)


def _aspect_angle(boxes: Tensor) -> Tensor:
    """Angle of the diagonal, arctan(w / h) of equation 9, and 0 for a box of size 0."""
    width, height = _sides(boxes[..., :2], boxes[..., 2:]).unbind(-1)
    is_point = (width == 0) & (height == 0)
    angle = torch.atan2(width, torch.where(is_point, torch.ones_like(height), height))
    return torch.where(is_point, torch.zeros_like(angle), angle)


def box_iou(
    boxes1: Tensor,
    boxes2: Tensor,
    mode: int = 0,
    eps: float = 1e-7,
    aligned: bool = False,
    offset: float = 0.0,
) -> Tensor:
    """Overlap of boxes, pair by pair or row by row.

    Args:
        boxes1: (N, 4) x1, y1, x2, y2.
        boxes2: (M, 4).
        mode: 0 IoU, 1 generalized, 2 distance, 3 complete, 4 over the first box; 5 and 6 are 0 and
            4 as mmcv has them.
        eps: added to the squared diagonal and to the denominator of the aspect term's weight.
        aligned: row by row.
        offset: added to the upper corners.

    Returns:
        (N, M), or (N,). A pair with an empty union has IoU 0.
    """
    grown = torch.tensor([0, 0, offset, offset], dtype=boxes1.dtype, device=boxes1.device)
    a, b = boxes1 + grown, boxes2 + grown
    if not aligned:
        a, b = a[:, None], b[None]
    (a_min, a_max), (b_min, b_max) = a.split(2, -1), b.split(2, -1)
    intersection = _sides(torch.maximum(a_min, b_min), torch.minimum(a_max, b_max)).prod(-1)
    if mode in (5, 6):
        base = (a_max - a_min).prod(-1)
        if mode == 5:
            base = base + (b_max - b_min).prod(-1) - intersection
        over: Tensor = intersection / base.clamp(min=offset)
        return over
    if mode == 4:
        return _ratio(intersection, _sides(a_min, a_max).prod(-1).expand_as(intersection))
    union = _sides(a_min, a_max).prod(-1) + _sides(b_min, b_max).prod(-1) - intersection
    iou = _ratio(intersection, union)
    if mode == 0:
        return iou

    enclosing = _sides(torch.minimum(a_min, b_min), torch.maximum(a_max, b_max))
    if mode == 1:
        area = enclosing.prod(-1)
        return iou - _ratio(area - union, area)

    distance = ((a_min + a_max - b_min - b_max) / 2).square().sum(-1)
    diou = iou - _ratio(distance, enclosing.square().sum(-1) + eps)
    if mode == 2:
        return diou

    v = (_aspect_angle(a) - _aspect_angle(b)).square() * (4 / math.pi**2)
    alpha = _ratio(v, 1 - iou + v + eps).detach()  # a constant: equation 11
    return diou - alpha * v


def parity() -> Parity:
    """What box_iou is tried on."""
    return Parity(
        op="box_iou",
        functions=("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou"),
        tier="A",
        differentiable=("boxes1", "boxes2"),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _pair(new.boxes(64), new.boxes(37))),
            Case("empty_rows", lambda new: _pair(new.boxes(0), new.boxes(5))),
            Case("empty_columns", lambda new: _pair(new.boxes(5), new.boxes(0))),
            Case("single", lambda new: _pair(new.boxes(1), new.boxes(1))),
            # One more and one less than a block of threads.
            Case("odd_sizes", lambda new: _pair(new.boxes(65), new.boxes(257))),
            Case("identical", lambda new: _pair(*[new.boxes(7)] * 2)),
            Case("degenerate", lambda new: _pair(_degenerate(), _degenerate())),
            Case("not_finite", lambda new: _pair(_not_finite(), new.boxes(3)), gradient=False),
            # Squares of the coordinates are beyond float16.
            Case("large", lambda new: _pair(new.boxes(9, 6e4), new.boxes(8, 6e4))),
            *(_form(mode, row) for mode in ("iof", "giou", "ciou") for row in (False, True)),
            _form("iou", aligned=True, offset=1.0),
            _form("iof", aligned=False, offset=1.0),
            Case(
                "iof_degenerate",
                lambda new: _pair(_degenerate(), _degenerate()) | {"mode": "iof"},
                functions=("box_iou",),
            ),
        ),
        workloads=(
            # RetinaNet's anchors on an image of 800 x 1344, against its objects.
            Workload(
                "anchors", {"n": 201_600, "m": 100}, _boxes, functions=("box_iou",), gradient=False
            ),
            # Proposals of Faster R-CNN against objects.
            Workload(
                "proposals", {"n": 2000, "m": 100}, _boxes, functions=("box_iou",), gradient=False
            ),
            # DETR takes the diagonal of all pairs of matched boxes as its loss.
            Workload("loss", {"n": 256, "m": 256}, _boxes),
        ),
    )


def _pair(boxes1: Tensor, boxes2: Tensor) -> dict[str, Any]:
    return {"boxes1": boxes1, "boxes2": boxes2}


def _form(mode: str, aligned: bool, offset: float = 0.0) -> Case:
    """More rows than a block of threads."""
    options = {"mode": mode, "aligned": aligned, "offset": offset}
    name = f"{mode}{'_aligned' * aligned}{'_offset' * (offset > 0)}"
    return Case(
        name,
        lambda new: _pair(new.boxes(130), new.boxes(130 if aligned else 9)) | options,
        functions=("box_iou",),
    )


def _boxes(sizes: Sizes) -> dict[str, Any]:
    seed = scenes.SEED
    return _pair(scenes.uniform_boxes(sizes["n"], seed), scenes.uniform_boxes(sizes["m"], seed + 1))


def _degenerate() -> Tensor:
    """A box, one of size 0 at its corner, a line, exchanged corners, a box that touches it."""
    rows = [[0, 0, 4, 4], [4, 4, 4, 4], [1, 1, 3, 1], [3, 3, 1, 1], [4, 0, 8, 4]]
    return torch.tensor(rows, dtype=torch.float64)


def _not_finite() -> Tensor:
    nan, inf = math.nan, math.inf
    rows = [[nan, 0, 50, 50], [0, 0, 50, nan], [-inf, 0, 50, 50], [0, 0, inf, inf]]
    return torch.tensor(rows, dtype=torch.float64)


def _fuzz(draw: Draw) -> dict[str, Any]:
    aligned = draw.function == "box_iou" and draw.option("aligned", False, True)
    boxes1 = draw.boxes(draw.size(40))
    boxes2 = draw.boxes(len(boxes1) if aligned else draw.size(40), like=boxes1)
    arguments = _pair(boxes1, boxes2)
    if draw.function == "box_iou":
        mode = draw.option("mode", "iou", "iof", "giou", "diou", "ciou")
        return {**arguments, "mode": mode, "aligned": aligned, "offset": draw.pick(0.0, 1.0, 0.5)}
    has_eps = draw.function != "generalized_box_iou"
    return {**arguments, "eps": draw.pick(1e-7, 0.0, 1.0)} if has_eps else arguments
