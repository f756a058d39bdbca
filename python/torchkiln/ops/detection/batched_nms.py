"""Non-maximum suppression inside classes, of every kind of boxes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchkiln.ops._arguments import require_choice
from torchkiln.ops.detection.nms import batched_nms_op, nms, nms_padded
from torchkiln.ops.detection.nms3d import (
    nms3d,
    nms3d_normal,
    nms3d_normal_padded,
    nms3d_padded,
)
from torchkiln.ops.detection.nms_rotated import (
    nms_quadri,
    nms_quadri_padded,
    nms_rotated,
    nms_rotated_padded,
)

__all__ = ["batched_nms", "batched_nms_padded"]

_SIZED = {
    "nms_rotated": nms_rotated,
    "nms_quadri": nms_quadri,
    "nms3d": nms3d,
    "nms3d_normal": nms3d_normal,
}
_PADDED = {
    "nms_rotated": nms_rotated_padded,
    "nms_quadri": nms_quadri_padded,
    "nms3d": nms3d_padded,
    "nms3d_normal": nms3d_normal_padded,
}


def _require_type(op: str, type: str) -> None:
    if type == "soft_nms":
        raise ValueError(
            f"{op}: type must be one whose scores stay as they are; got 'soft_nms'. "
            "soft_nms and soft_nms_padded take idxs, and return the scores too"
        )
    require_choice(op, "type", type, {"nms": None, **_SIZED})


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    type: str = "nms",
    class_agnostic: bool = False,
    max_output: int | None = None,
    **options: Any,
) -> Tensor:
    """Keeps the best boxes of each class; boxes of different classes never meet.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit. Of another
            type: what its function takes.
        scores: (N,), dtype and device of `boxes`.
        idxs: (N,), any integer dtype and values; the class of each box.
        iou_threshold: a box goes when its IoU with a kept one of its class is greater.
        type: "nms", "nms_rotated", "nms_quadri", "nms3d" or "nms3d_normal": the function of
            `torchkiln.ops` that is used inside classes. (`soft_nms` takes `idxs` itself.)
        class_agnostic: boxes of different classes meet; `idxs` is not looked at.
        max_output: the most boxes to return, at least 0. None: all.
        options: further arguments of the function: `offset` and `score_threshold` of `nms`,
            `clockwise` of `nms_rotated`.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or an option that the function does not have.
        ValueError: for another shape or type, two different devices, a threshold that is NaN, or a
            negative `max_output`.
        CaptureError: while a CUDA graph is captured; `batched_nms_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        As the function of the type. Classes are compared: coordinates are not shifted and keep all
        their digits, and however many boxes there are, they need no splitting.

    Example:
        >>> import torch
        >>> from torchkiln.ops import batched_nms
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)
        >>> batched_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 1, 1]), 0.5)
        tensor([1, 0])
    """
    if type == "nms":
        if class_agnostic:
            return nms(boxes, scores, iou_threshold, max_output=max_output, **options)
        return _among_classes(boxes, scores, idxs, iou_threshold, max_output, **options)
    _require_type("batched_nms", type)
    if max_output is not None and max_output < 0:
        raise ValueError(f"batched_nms: max_output must be at least 0; got {max_output}")
    labels = None if class_agnostic else idxs
    kept = _SIZED[type](boxes, scores, iou_threshold, labels, **options)
    return kept[:max_output]


def _among_classes(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    max_output: int | None,
    offset: float = 0.0,
    score_threshold: float | None = None,
) -> Tensor:
    return batched_nms_op(boxes, scores, idxs, iou_threshold, offset, score_threshold, max_output)


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    max_output: int,
    *,
    type: str = "nms",
    class_agnostic: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`batched_nms` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit. Of another
            type: what its function takes.
        scores: (N,), dtype and device of `boxes`.
        idxs: (N,), any integer dtype and values; the class of each box.
        iou_threshold: a box goes when its IoU with a kept one of its class is greater.
        max_output: length of the result, at least 0; the best boxes fill it.
        type: as in `batched_nms`.
        class_agnostic: boxes of different classes meet; `idxs` is not looked at.
        options: further arguments of the function, as in `batched_nms`.

    Returns:
        indices: (max_output,), int64; rows of the kept boxes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or an option that the function does not have.
        ValueError: for another shape or type, two different devices, a negative `max_output`, or a
            threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Boxes, scores and ties as in the function of the type.

    Example:
        >>> import torch
        >>> from torchkiln.ops import batched_nms_padded
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)
        >>> idxs = torch.tensor([0, 1, 1])
        >>> batched_nms_padded(boxes, torch.tensor([0.5, 0.9, 0.7]), idxs, 0.5, 3)
        (tensor([ 1,  0, -1]), tensor(2))
    """
    labels = None if class_agnostic else idxs
    if type == "nms":
        return nms_padded(boxes, scores, iou_threshold, max_output, labels, **options)
    _require_type("batched_nms_padded", type)
    return _PADDED[type](boxes, scores, iou_threshold, max_output, labels, **options)
