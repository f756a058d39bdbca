"""generalized, distance and complete_box_iou_loss in plain PyTorch, from lengths on each axis.

What two intervals have in common is the sum of their lengths less the length of what spans both.
Sources: Rezatofighi et al. 2019, algorithm 1; Zheng et al. 2020, equations 7 to 11.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = ["complete_box_iou_loss", "distance_box_iou_loss", "generalized_box_iou_loss"]


@dataclass(frozen=True)
class _Axis:
    """Lengths (...) along one axis; an interval that ends before it begins has none."""

    of_first: Tensor
    of_second: Tensor
    common: Tensor
    span: Tensor
    between_centres: Tensor


def _axis(a: Tensor, b: Tensor) -> _Axis:
    (a1, a2), (b1, b2) = a.unbind(-1), b.unbind(-1)
    reach = torch.stack([a2, b2]).amax(0) - torch.stack([a1, b1]).amin(0)
    no_length = (a2 < a1) | (b2 < b1) | ((a2 - a1) + (b2 - b1) < reach)
    return _Axis(
        torch.where(a2 < a1, 0.0, a2 - a1),
        torch.where(b2 < b1, 0.0, b2 - b1),
        torch.where(no_length, 0.0, (a2 - a1) + (b2 - b1) - reach),
        torch.where(reach < 0, 0.0, reach),
        (a1 + a2) / 2 - (b1 + b2) / 2,
    )


def _parts(boxes1: Tensor, boxes2: Tensor, eps: float) -> tuple[_Axis, _Axis, Tensor, Tensor]:
    """Both axes, the union and 1 - IoU."""
    x, y = (_axis(boxes1[..., i::2], boxes2[..., i::2]) for i in (0, 1))
    common = x.common * y.common
    union = x.of_first * y.of_first + x.of_second * y.of_second - common
    return x, y, union, (union + eps - common) / (union + eps)


def _distance(x: _Axis, y: _Axis, eps: float) -> Tensor:
    squared, diagonal = x.between_centres**2 + y.between_centres**2, x.span**2 + y.span**2
    # Around two empty boxes there may be nothing, and their centres mean nothing.
    return torch.where(diagonal == 0, 0.0, squared / (diagonal + eps))


def _angle(width: Tensor, height: Tensor) -> Tensor:
    """arctan(width / height), of which a box without height has 90 degrees, one of no size 0."""
    is_point = (width == 0) & (height == 0)
    safe = torch.where(height == 0, 1.0, height)
    flat = torch.where(is_point, 0.0, torch.full_like(width, math.pi / 2))
    return torch.where(height == 0, flat, (width / safe).atan())


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / (loss.numel() or 1) if reduction == "mean" else loss.sum()


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the generalized IoU of each box with its partner.

    Args:
        boxes1: (..., 4) x1, y1, x2, y2.
        boxes2: (..., 4).
        reduction: "none", "mean" or "sum".
        eps: added to the union and to the area of the box around both; above 0 here.

    Returns:
        (...) or ().
    """
    x, y, union, lack = _parts(boxes1, boxes2, eps)
    around = x.span * y.span
    return _reduce(lack + (around - union) / (around + eps), reduction)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the distance IoU of each box with its partner; arguments as above."""
    x, y, _, lack = _parts(boxes1, boxes2, eps)
    return _reduce(lack + _distance(x, y, eps), reduction)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the complete IoU of each box with its partner; arguments as above."""
    x, y, _, lack = _parts(boxes1, boxes2, eps)
    difference = _angle(x.of_first, y.of_first) - _angle(x.of_second, y.of_second)
    v = difference**2 * 4 / math.pi**2
    with torch.no_grad():
        alpha = v / (lack + v + eps)
    return _reduce(lack + _distance(x, y, eps) + alpha * v, reduction)


def parities() -> tuple[Parity, ...]:
    """What the three losses are tried on."""
    losses = (generalized_box_iou_loss, distance_box_iou_loss, complete_box_iou_loss)
    return tuple(_parity(loss) for loss in losses)


def _parity(reference: Callable[..., Tensor]) -> Parity:
    return Parity(
        op=reference.__name__,
        tier="A",
        differentiable=("boxes1", "boxes2"),
        function=reference.__name__,
        reference=reference,
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_problem, 33)),
            Case("mean", functools.partial(_problem, 65, reduction="mean")),
            Case("sum", functools.partial(_problem, 17, reduction="sum")),
            Case("large_eps", functools.partial(_problem, 9, eps=0.5)),
            Case("single", functools.partial(_problem, 1)),
            Case("one_box", _one_box),
            Case("no_boxes", functools.partial(_problem, 0)),
            Case("no_boxes_mean", functools.partial(_problem, 0, reduction="mean")),
            Case("no_boxes_sum", functools.partial(_problem, 0, reduction="sum")),
            Case("exchanged", _exchanged, gradient=False),
            Case("degenerate", _degenerate, gradient=False),
        ),
    )


def _problem(count: int, new: Inputs, **settings: object) -> dict[str, object]:
    return {"boxes1": new.boxes(count), "boxes2": new.boxes(count), **settings}


def _one_box(new: Inputs) -> dict[str, object]:
    return {"boxes1": new.boxes(1)[0], "boxes2": new.boxes(1)[0]}


def _exchanged(new: Inputs) -> dict[str, object]:
    """Corners in another order: empty boxes."""
    return {"boxes1": new.boxes(5).flip(1), "boxes2": new.boxes(5)}


def _degenerate(new: Inputs) -> dict[str, object]:
    """Equal boxes, points, lines, touching boxes, NaN."""
    nan = math.nan
    rows: list[list[float]] = []
    rows += [[1, 1, 3, 4], [2, 2, 2, 2], [2, 2, 2, 2], [0, 0, 4, 0], [0, 0, 2, 2], [nan, 0, 1, 1]]
    others: list[list[float]] = []
    others += [[1, 1, 3, 4], [2, 2, 2, 2], [5, 1, 7, 2], [0, 0, 0, 4], [2, 0, 4, 2], [0, 0, 1, 1]]
    return {
        "boxes1": torch.tensor(rows, dtype=torch.float64),
        "boxes2": torch.tensor(others, dtype=torch.float64),
    }


def _fuzz(draw: Draw) -> dict[str, object]:
    boxes1 = draw.boxes(draw.size(40))
    boxes2 = draw.boxes(len(boxes1), like=boxes1)
    reduction = draw.option("reduction", "none", "mean", "sum")
    # Above 0, as the reference has it.
    return {"boxes1": boxes1, "boxes2": boxes2, "reduction": reduction, "eps": draw.pick(1e-7, 0.5)}
