"""Non-maximum suppression, and with a result of fixed size."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._nms_fakes import fake_padded, fake_sized

__all__ = ["nms", "nms_padded"]


def _fake_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    offset: float = 0.0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    return fake_sized(boxes, scores, iou_threshold)


def _fake_batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    offset: float = 0.0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    return fake_sized(boxes, scores, iou_threshold)


def _fake_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    idxs: Tensor | None = None,
    offset: float = 0.0,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    return fake_padded(boxes, scores, iou_threshold, max_output)


# float32: areas of boxes are beyond float16 from a side of 256 on.
_nms = operator("nms", fake=_fake_nms, autocast=torch.float32)
batched_nms_op = operator("batched_nms", fake=_fake_batched_nms, autocast=torch.float32)
_nms_padded = operator("nms_padded", fake=_fake_nms_padded, autocast=torch.float32)


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    offset: float = 0.0,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    """Keeps the best boxes: each suppresses the lower ones that overlap it by too much.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater. Any number: below 0 all
            boxes but the best one go, from 1 on none.
        offset: added to x2 and y2, at least 0: 1 for boxes whose last pixel belongs to them.
        score_threshold: boxes without a greater score are left out, those with NaN too. None: none.
        max_output: the most boxes to return, at least 0. None: all.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a threshold that is NaN, an offset or
            a `max_output` below 0.
        CaptureError: while a CUDA graph is captured; `nms_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 (float64 for float64): the IoU that meets the threshold is the rounded
        quotient, on every device. A pair with an empty union, or with a NaN coordinate, does not
        suppress. A box with x2 < x1 or y2 < y1 is empty. A NaN score sorts last, is kept and
        suppresses nothing. On CUDA the call waits for the size of its result.

    Source:
        Girshick et al., "Rich feature hierarchies for accurate object detection", 2014,
        section 2.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [5.0, 0.0, 9.0, 4.0]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5)
        tensor([1, 2])
    """
    return _nms(boxes, scores, iou_threshold, offset, score_threshold, max_output)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    idxs: Tensor | None = None,
    *,
    offset: float = 0.0,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms`, or with classes `batched_nms`, into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater.
        max_output: length of the result, 0 to 2^30; the best boxes fill it.
        idxs: (N,), uint8 or signed integers; the class of each box, or None for one class.
        offset: added to x2 and y2, at least 0: 1 for boxes whose last pixel belongs to them.
        score_threshold: boxes without a greater score are left out, those with NaN too. None: none.

    Returns:
        indices: (max_output,), int64; rows of the kept boxes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a threshold that is NaN, an offset or
            a `max_output` below 0.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Boxes, scores and ties as in `nms`.

    Source:
        Girshick et al., "Rich feature hierarchies for accurate object detection", 2014,
        section 2.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_padded
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [5.0, 0.0, 9.0, 4.0]])
        >>> nms_padded(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5, 4)
        (tensor([ 1,  2, -1, -1]), tensor(2))
    """
    return _nms_padded(boxes, scores, iou_threshold, max_output, idxs, offset, score_threshold)
