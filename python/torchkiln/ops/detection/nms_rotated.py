"""Non-maximum suppression of rotated boxes and of quadrilaterals."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._nms_fakes import fake_padded, fake_sized

__all__ = ["nms_quadri", "nms_quadri_padded", "nms_rotated", "nms_rotated_padded"]


def _fake_nms_rotated(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> Tensor:
    return fake_sized(boxes, scores, iou_threshold, labels)


def _fake_nms_rotated_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> tuple[Tensor, Tensor]:
    return fake_padded(boxes, scores, iou_threshold, max_output, labels)


def _fake_nms_by_peer(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    form: int,
    labels: Tensor | None = None,
) -> Tensor:
    return fake_sized(boxes, scores, iou_threshold, labels)


# Forms that follow mmcv's rules, for its drop-in: boxes in space, and quadrilaterals.
PEER_UPRIGHT, PEER_QUADRI = range(2)

_nms_rotated = operator("nms_rotated", fake=_fake_nms_rotated, autocast=torch.float32)
_nms_rotated_padded = operator(
    "nms_rotated_padded", fake=_fake_nms_rotated_padded, autocast=torch.float32
)
_nms_quadri = operator("nms_quadri", fake=fake_sized, autocast=torch.float32)
_nms_quadri_padded = operator("nms_quadri_padded", fake=fake_padded, autocast=torch.float32)
_nms_by_peer = operator("_nms_by_peer", fake=_fake_nms_by_peer)


def suppress_by_peer(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    form: int,
    labels: Tensor | None = None,
) -> Tensor:
    """Rows that stay by mmcv's overlaps of a form, computed in float32."""
    boxes, scores = boxes.detach().float(), scores.detach().float()
    return _nms_by_peer(boxes, scores, float(iou_threshold), form, labels)


def nms_rotated(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> Tensor:
    """Keeps the best rotated boxes: each suppresses the lower ones that overlap it by too much.

    Args:
        boxes: (N, 5), float16, bfloat16, float32 or float64; centre x, centre y, w, h, angle in
            radians.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater. Any number.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.
        clockwise: whether a positive angle turns clockwise where y points down, which is from x
            towards y.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a threshold that is NaN.
        CaptureError: while a CUDA graph is captured; `nms_rotated_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 (float64 for float64); the shared area is exact but for rounding, so a
        pair whose IoU equals the threshold within that may go either way. Boxes that do not meet
        share exactly 0. A box with a side of 0 or less overlaps nothing, and so does one with a
        number that is not finite. A NaN score sorts last, is kept and suppresses nothing. On CUDA
        the call waits for the size of its result.

    Source:
        Ma et al., "Arbitrary-Oriented Scene Text Detection via Rotation Proposals", 2018.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_rotated
        >>> boxes = torch.tensor([[0.0, 0, 4, 2, 0], [0, 0, 4, 2, 0.1], [0, 0, 4, 2, 1.5]])
        >>> nms_rotated(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        tensor([0, 2])
    """
    return _nms_rotated(boxes, scores, iou_threshold, labels, clockwise)


def nms_rotated_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> tuple[Tensor, Tensor]:
    """`nms_rotated` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 5), float16, bfloat16, float32 or float64; centre x, centre y, w, h, angle in
            radians.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater.
        max_output: length of the result, 0 to 2^30; the best boxes fill it.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.
        clockwise: whether a positive angle turns from x towards y.

    Returns:
        indices: (max_output,), int64; rows of the kept boxes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a negative `max_output`, or a
            threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Boxes, scores and ties as in `nms_rotated`.

    Source:
        Ma et al., "Arbitrary-Oriented Scene Text Detection via Rotation Proposals", 2018.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_rotated_padded
        >>> boxes = torch.tensor([[0.0, 0, 4, 2, 0], [0, 0, 4, 2, 0.1]])
        >>> nms_rotated_padded(boxes, torch.tensor([0.8, 0.9]), 0.5, 2)
        (tensor([ 1, -1]), tensor(1))
    """
    return _nms_rotated_padded(boxes, scores, iou_threshold, max_output, labels, clockwise)


def nms_quadri(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """Keeps the best quadrilaterals: each suppresses the lower ones that overlap it by too much.

    Args:
        boxes: (N, 8), float16, bfloat16, float32 or float64; x1, y1, ..., x4, y4, consecutive
            vertices in either sense. Sides must not cross.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU with a kept one is greater. Any number.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a threshold that is NaN.
        CaptureError: while a CUDA graph is captured; `nms_quadri_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        As `nms_rotated`. Quadrilaterals need not be convex; what lies in the notch of one that is
        not may share up to 1e-6 with it, by rounding.

    Source:
        Girshick et al., "Rich feature hierarchies for accurate object detection", 2014,
        section 2.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_quadri
        >>> boxes = torch.tensor([[0.0, 0, 4, 0, 4, 4, 0, 4], [0, 0, 4, 0, 5, 4, 0, 4]])
        >>> nms_quadri(boxes, torch.tensor([0.8, 0.9]), 0.5)
        tensor([1])
    """
    return _nms_quadri(boxes, scores, iou_threshold, labels)


def nms_quadri_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms_quadri` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 8), float16, bfloat16, float32 or float64; consecutive vertices.
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

    Note:
        Boxes, scores and ties as in `nms_quadri`.

    Source:
        Girshick et al., "Rich feature hierarchies for accurate object detection", 2014,
        section 2.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_quadri_padded
        >>> boxes = torch.tensor([[0.0, 0, 4, 0, 4, 4, 0, 4], [0, 0, 4, 0, 5, 4, 0, 4]])
        >>> nms_quadri_padded(boxes, torch.tensor([0.8, 0.9]), 0.5, 2)
        (tensor([ 1, -1]), tensor(1))
    """
    return _nms_quadri_padded(boxes, scores, iou_threshold, max_output, labels)
