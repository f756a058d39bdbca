"""Losses of pairs of boxes: one minus the generalized, distance or complete IoU."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln.ops._arguments import (
    require_choice,
    require_device,
    require_last,
    require_number,
    shape,
    widened,
)

__all__ = ["complete_box_iou_loss", "distance_box_iou_loss", "generalized_box_iou_loss"]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _checked(
    op: str, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the loss."""
    require_choice(op, "reduction", reduction, _REDUCTIONS)
    require_last(op, 4, boxes1=boxes1, boxes2=boxes2)
    require_device(op, boxes1=boxes1, boxes2=boxes2)
    if boxes1.shape != boxes2.shape:
        raise ValueError(
            f"{op}: boxes2 must have the shape of boxes1 {shape(boxes1)}; got {shape(boxes2)}"
        )
    require_number(op, eps=eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0; got {eps}")
    return widened(boxes1), widened(boxes2)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        # Of nothing it is 0, as torchvision has it: a batch without boxes costs nothing.
        loss = loss.sum() / max(loss.numel(), 1)
    return loss


def _ratio(numerator: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """0 where the denominator is 0, with a gradient of 0: that of 1 / eps is beyond float16."""
    is_zero = denominator == 0
    return torch.where(is_zero, 0.0, numerator / torch.where(is_zero, 1.0, denominator + eps))


def _area(first: Tensor, last: Tensor) -> Tensor:
    return _product((last - first).clamp(min=0))


def _product(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)  # the gradient of prod waits for the GPU
    return width * height


def _overlap(boxes1: Tensor, boxes2: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """IoU and union of each pair, and the size (..., 2) of the box around both."""
    (first1, last1), (first2, last2) = boxes1.split(2, -1), boxes2.split(2, -1)
    common = _area(torch.maximum(first1, first2), torch.minimum(last1, last2))
    union = _area(first1, last1) + _area(first2, last2) - common
    around = (torch.maximum(last1, last2) - torch.minimum(first1, first2)).clamp(min=0)
    return _ratio(common, union, eps), union, around


def _distance(boxes1: Tensor, boxes2: Tensor, around: Tensor, eps: float) -> Tensor:
    """Squared distance of the centres in squared diagonals of the box around both."""
    twice = boxes1[..., :2] + boxes1[..., 2:] - boxes2[..., :2] - boxes2[..., 2:]
    return _ratio(twice.square().sum(-1) / 4, around.square().sum(-1), eps)


def _aspect(boxes: Tensor) -> Tensor:
    """Angle between the diagonal and the height; 0 for a box of size 0."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    is_point = width * width + height * height == 0
    angle = torch.atan2(width, torch.where(is_point, 1.0, height))
    return torch.where(is_point, 0.0, angle)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the generalized IoU of each box with its partner.

    Args:
        boxes1: (..., 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        boxes2: shape and device of `boxes1`; any of these dtypes.
        reduction: "none", "mean" or "sum".
        eps: added to the union and to the area of the box around both.

    Returns:
        (...) for "none", else (); float64 where one of the boxes is, else float32. Each from 0 to
        2; the mean of nothing is 0.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or reduction, two different devices, or a negative eps.

    Differentiable: boxes1, boxes2. Deterministic: yes. Autocast: float32.

    Note:
        The half types give a loss in float32, as torchvision's do: a sum is beyond float16 soon.
        A box with x2 < x1 or y2 < y1 is empty, as in
        `generalized_box_iou`. Boxes of no size have finite gradients.

    Source:
        Rezatofighi et al., "Generalized Intersection over Union", 2019, algorithm 1.

    Example:
        >>> import torch
        >>> from torchkiln.ops import generalized_box_iou_loss
        >>> boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
        >>> generalized_box_iou_loss(boxes[:1], boxes[1:])
        tensor([1.5000])
    """
    a, b = _checked("generalized_box_iou_loss", boxes1, boxes2, reduction, eps)
    iou, union, around = _overlap(a, b, eps)
    area = _product(around)
    return _reduce(1 - iou + _ratio(area - union, area, eps), reduction)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the distance IoU of each box with its partner.

    Args:
        boxes1: (..., 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        boxes2: shape and device of `boxes1`; any of these dtypes.
        reduction: "none", "mean" or "sum".
        eps: added to the union and to the squared diagonal of the box around both.

    Returns:
        (...) for "none", else (); float64 where one of the boxes is, else float32. Each from 0 to
        2; the mean of nothing is 0.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or reduction, two different devices, or a negative eps.

    Differentiable: boxes1, boxes2. Deterministic: yes. Autocast: float32.

    Note:
        Half types and degenerate boxes as in `generalized_box_iou_loss`.

    Source:
        Zheng et al., "Distance-IoU Loss", 2020, equation 7.

    Example:
        >>> import torch
        >>> from torchkiln.ops import distance_box_iou_loss
        >>> boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
        >>> distance_box_iou_loss(boxes[:1], boxes[1:])
        tensor([1.5294])
    """
    a, b = _checked("distance_box_iou_loss", boxes1, boxes2, reduction, eps)
    iou, _, around = _overlap(a, b, eps)
    return _reduce(1 - iou + _distance(a, b, around, eps), reduction)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the complete IoU of each box with its partner.

    Args:
        boxes1: (..., 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        boxes2: shape and device of `boxes1`; any of these dtypes.
        reduction: "none", "mean" or "sum".
        eps: added to the union, to the squared diagonal of the box around both, and to the
            denominator of the aspect term's weight.

    Returns:
        (...) for "none", else (); float64 where one of the boxes is, else float32. Each from 0 to
        3; the mean of nothing is 0.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or reduction, two different devices, or a negative eps.

    Differentiable: boxes1, boxes2; the weight of the aspect term is a constant, as in the paper.
    Deterministic: yes. Autocast: float32.

    Note:
        Half types and degenerate boxes as in `generalized_box_iou_loss`; a box of size 0 has the
        aspect angle 0.

    Source:
        Zheng et al., "Distance-IoU Loss", 2020, equations 8 to 11.

    Example:
        >>> import torch
        >>> from torchkiln.ops import complete_box_iou_loss
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 2.0]])
        >>> complete_box_iou_loss(boxes[:1], boxes[1:])
        tensor([0.7629])
    """
    a, b = _checked("complete_box_iou_loss", boxes1, boxes2, reduction, eps)
    iou, _, around = _overlap(a, b, eps)
    aspect = (4 / math.pi**2) * (_aspect(a) - _aspect(b)).square()
    # Rounding may bring the IoU above 1.
    weight = _ratio(aspect, (1 - iou).clamp(min=0) + aspect, eps).detach()
    loss = 1 - iou + _distance(a, b, around, eps) + weight * aspect
    return _reduce(loss, reduction)
