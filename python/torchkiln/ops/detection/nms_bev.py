"""Suppression of boxes seen from above that are given by their corners and an angle."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.ops._arguments import (
    cast_for_autocast,
    require_count,
    require_device,
    require_floating,
    require_integers,
    require_number,
    require_output_size,
    require_pair,
    shape,
    widened,
)
from torchkiln.ops.detection.nms import batched_nms_op, nms, nms_padded
from torchkiln.ops.detection.nms_rotated import nms_rotated, nms_rotated_padded

__all__ = ["nms_bev", "nms_bev_padded", "nms_normal_bev", "nms_normal_bev_padded"]


def _checked(
    op: str, boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both, as autocast has them."""
    require_floating(op, boxes=boxes, scores=scores)
    boxes, scores = cast_for_autocast(boxes, scores)
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(f"{op}: boxes must have shape (N, 5); got {shape(boxes)}")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"{op}: scores must have shape ({boxes.shape[0]},); got {shape(scores)}")
    require_pair(op, boxes=boxes, scores=scores)
    require_number(op, iou_threshold=iou_threshold)
    if labels is not None:
        require_integers(op, labels=labels)
        require_device(op, boxes=boxes, labels=labels)
        if labels.shape != scores.shape:
            raise ValueError(
                f"{op}: labels must have shape ({boxes.shape[0]},); got {shape(labels)}"
            )
    return boxes, scores


def _turned(boxes: Tensor) -> Tensor:
    """Centre, size and angle, in float32 at least."""
    first, last, angle = widened(boxes).split([2, 2, 1], 1)
    return torch.cat([(first + last) / 2, last - first, angle], 1)


def _best(op: str, scores: Tensor, count: int | None) -> Tensor | None:
    """Rows of the best scores, NaN last; None for all of them."""
    require_count(op, pre_max_size=count)
    if count is None or count >= scores.shape[0]:
        return None
    rows = scores.argsort(dim=0, descending=True, stable=True)
    # torch has NaN first. Both sorts are stable.
    last = scores[rows].isnan().to(torch.uint8).argsort(dim=0, stable=True)
    return rows[last][:count]


def nms_bev(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    pre_max_size: int | None = None,
    post_max_size: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Keeps the best boxes seen from above: each suppresses lower ones that overlap it too much.

    Args:
        boxes: (N, 5), float16, bfloat16, float32 or float64; x1, y1, x2, y2 of the box before it is
            turned around its centre, and the angle in radians, from x towards y.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater. Any number.
        pre_max_size: how many of the best boxes are looked at, at least 0. None: all.
        post_max_size: the most boxes to return, at least 0. None: all.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape or size, two different devices, or a threshold that is NaN.
        CaptureError: while a CUDA graph is captured; `nms_bev_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        As `nms_rotated`.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_bev
        >>> boxes = torch.tensor([[0.0, 0, 4, 2, 0], [0, 0, 4, 2, 0.1], [0, 0, 4, 2, 1.5]])
        >>> nms_bev(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        tensor([0, 2])
    """
    boxes, scores = _checked("nms_bev", boxes, scores, iou_threshold, labels)
    require_count("nms_bev", post_max_size=post_max_size)
    rows = _best("nms_bev", scores, pre_max_size)
    turned, scores = _turned(boxes), widened(scores)
    if rows is None:
        return nms_rotated(turned, scores, iou_threshold, labels)[:post_max_size]
    labels = None if labels is None else labels[rows]
    return rows[nms_rotated(turned[rows], scores[rows], iou_threshold, labels)][:post_max_size]


def nms_bev_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    pre_max_size: int | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms_bev` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 5), as in `nms_bev`.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater.
        max_output: length of the result, 0 to 2^30; the best boxes fill it.
        pre_max_size: how many of the best boxes are looked at, at least 0. None: all.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        indices: (max_output,), int64; rows of the kept boxes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape or size, two different devices, or a threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_bev_padded
        >>> boxes = torch.tensor([[0.0, 0, 4, 2, 0], [0, 0, 4, 2, 0.1]])
        >>> nms_bev_padded(boxes, torch.tensor([0.8, 0.9]), 0.5, 2)
        (tensor([ 1, -1]), tensor(1))
    """
    boxes, scores = _checked("nms_bev_padded", boxes, scores, iou_threshold, labels)
    require_output_size("nms_bev_padded", max_output)
    rows = _best("nms_bev_padded", scores, pre_max_size)
    turned, scores = _turned(boxes), widened(scores)
    if rows is None:
        return nms_rotated_padded(turned, scores, iou_threshold, max_output, labels)
    labels = None if labels is None else labels[rows]
    kept, count = nms_rotated_padded(turned[rows], scores[rows], iou_threshold, max_output, labels)
    if rows.shape[0] == 0:
        return kept, count
    return torch.where(kept < 0, kept, rows[kept.clamp(min=0)]), count


def nms_normal_bev(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """`nms` of the first four columns of `boxes`, whose angles are not looked at.

    Args:
        boxes: (N, 5), float16, bfloat16, float32 or float64; x1, y1, x2, y2, angle.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a threshold that is NaN.
        CaptureError: while a CUDA graph is captured; `nms_normal_bev_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_normal_bev
        >>> boxes = torch.tensor([[0.0, 0, 4, 2, 0], [0, 0, 4, 2, 1.5]])
        >>> nms_normal_bev(boxes, torch.tensor([0.8, 0.9]), 0.5)
        tensor([1])
    """
    boxes, scores = _checked("nms_normal_bev", boxes, scores, iou_threshold, labels)
    if labels is None:
        return nms(boxes[:, :4], scores, iou_threshold)
    return batched_nms_op(boxes[:, :4], scores, labels, iou_threshold, 0.0, None, None)


def nms_normal_bev_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms_normal_bev` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 5), as in `nms_normal_bev`.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater.
        max_output: length of the result, 0 to 2^30; the best boxes fill it.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        indices: (max_output,), int64; rows of the kept boxes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a negative `max_output`, or a
            threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_normal_bev_padded
        >>> boxes = torch.tensor([[0.0, 0, 4, 2, 0], [0, 0, 4, 2, 1.5]])
        >>> nms_normal_bev_padded(boxes, torch.tensor([0.8, 0.9]), 0.5, 2)
        (tensor([ 1, -1]), tensor(1))
    """
    boxes, scores = _checked("nms_normal_bev_padded", boxes, scores, iou_threshold, labels)
    require_output_size("nms_normal_bev_padded", max_output)
    return nms_padded(boxes[:, :4], scores, iou_threshold, max_output, labels)
