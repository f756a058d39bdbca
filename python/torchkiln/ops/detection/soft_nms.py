"""Soft suppression: boxes that overlap better ones lose score instead of going at once."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import require_choice

__all__ = ["soft_nms", "soft_nms_padded"]

_METHODS = {"naive": 0, "linear": 1, "gaussian": 2}


def _fake_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    method: int = 1,
    idxs: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64), boxes.new_empty((kept,))


def _fake_soft_nms_padded(
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
    indices = boxes.new_empty((max_output,), dtype=torch.int64)
    return indices, boxes.new_empty((max_output,)), boxes.new_empty((), dtype=torch.int64)


_soft_nms = operator("soft_nms", fake=_fake_soft_nms, autocast=torch.float32)
_soft_nms_padded = operator("soft_nms_padded", fake=_fake_soft_nms_padded, autocast=torch.float32)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    idxs: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Takes out the best box again and again, and lowers the scores of those that overlap it.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        scores: (N,), dtype and device of `boxes`; at least 0.
        iou_threshold: from this IoU on the methods naive and linear act.
        sigma: width of the gaussian method, greater than 0 whatever the method is.
        min_score: a box goes when its score is below it, or has fallen so far.
        method: "naive" (score 0), "linear" (times 1 - IoU) or "gaussian" (times
            exp(-IoU² / sigma)).
        idxs: (N,), uint8 or signed integers; boxes of different classes do not meet. None: one
            class.
        offset: added to x2 and y2, at least 0: 1 for boxes whose last pixel belongs to them.

    Returns:
        indices: (K,), int64; rows of the boxes by descending new score, the lower row first among
            equals.
        scores: (K,), dtype of `scores`; what is left of them.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, another method, `sigma` of 0 or less,
            a threshold or `min_score` that is NaN, or an offset below 0.
        CaptureError: while a CUDA graph is captured; `soft_nms_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 (float64 for float64): the IoU that meets the threshold is the rounded
        quotient, on every device. A pair with an empty union, or with a NaN coordinate, does not
        act. A NaN score comes last, is kept and lowers nothing. Negative scores rise when they are
        lowered: inside a class they come in the order in which they were the best. On CUDA the call
        waits for the size of its result; all classes run in one launch.

    Source:
        Bodla et al., "Soft-NMS", 2017, equations 2 and 3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import soft_nms
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [5.0, 0.0, 9.0, 4.0]])
        >>> soft_nms(boxes, torch.tensor([0.5, 0.9, 0.7]))
        (tensor([1, 2, 0]), tensor([0.9000, 0.7000, 0.1000]))
    """
    require_choice("soft_nms", "method", method, _METHODS)
    number = _METHODS[method]
    return _soft_nms(boxes, scores, iou_threshold, sigma, min_score, number, idxs, offset)


def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    max_output: int,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    idxs: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`soft_nms` into results of fixed size.

    Nothing waits for the GPU, the call can be captured into a CUDA graph, and no class takes more
    than `max_output` steps.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        scores: (N,), dtype and device of `boxes`; at least 0.
        max_output: length of the results, 0 to 2^30; the best boxes fill it.
        iou_threshold: from this IoU on the methods naive and linear act.
        sigma: width of the gaussian method, greater than 0 whatever the method is.
        min_score: a box goes when its score is below it, or has fallen so far.
        method: "naive", "linear" or "gaussian".
        idxs: (N,), uint8 or signed integers; the class of each box, or None for one class.
        offset: added to x2 and y2, at least 0: 1 for boxes whose last pixel belongs to them.

    Returns:
        indices: (max_output,), int64; rows of the boxes by descending new score, then -1.
        scores: (max_output,), dtype of `scores`; what is left of them, then 0.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, another method, `sigma` of 0 or less,
            a negative `max_output`, a threshold or `min_score` that is NaN, or an offset below 0.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Boxes, scores and ties as in `soft_nms`.

    Source:
        Bodla et al., "Soft-NMS", 2017, equations 2 and 3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import soft_nms_padded
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0]])
        >>> soft_nms_padded(boxes, torch.tensor([0.5, 0.9]), 3)
        (tensor([ 1,  0, -1]), tensor([0.9000, 0.1000, 0.0000]), tensor(2))
    """
    require_choice("soft_nms_padded", "method", method, _METHODS)
    number = _METHODS[method]
    return _soft_nms_padded(
        boxes, scores, max_output, iou_threshold, sigma, min_score, number, idxs, offset
    )
