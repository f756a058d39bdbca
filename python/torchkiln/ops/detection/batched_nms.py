"""Non-maximum suppression inside classes, of every kind of boxes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from torchkiln.ops._arguments import (
    require_choice,
    require_count,
    require_output_size,
    require_tensor,
)
from torchkiln.ops.detection.line_nms import line_nms, line_nms_padded
from torchkiln.ops.detection.nms import batched_nms_op, nms, nms_padded
from torchkiln.ops.detection.nms3d import (
    nms3d,
    nms3d_normal,
    nms3d_normal_padded,
    nms3d_padded,
)
from torchkiln.ops.detection.nms_bev import (
    nms_bev,
    nms_bev_padded,
    nms_normal_bev,
    nms_normal_bev_padded,
)
from torchkiln.ops.detection.nms_rotated import (
    nms_quadri,
    nms_quadri_padded,
    nms_rotated,
    nms_rotated_padded,
)
from torchkiln.ops.detection.soft_nms import soft_nms, soft_nms_padded

__all__ = ["batched_nms", "batched_nms_padded"]


def _nms(
    boxes: Tensor,
    scores: Tensor,
    threshold: float,
    labels: Tensor | None,
    offset: float = 0.0,
    score_threshold: float | None = None,
) -> Tensor:
    if labels is None:
        return nms(boxes, scores, threshold, offset=offset, score_threshold=score_threshold)
    return batched_nms_op(boxes, scores, labels, threshold, offset, score_threshold, None)


def _soft_nms(
    boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None, **options: Any
) -> Tensor:
    return soft_nms(boxes, scores, threshold, idxs=labels, **options)[0]


def _soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    threshold: float,
    most: int,
    labels: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    rows, _, count = soft_nms_padded(boxes, scores, most, threshold, idxs=labels, **options)
    return rows, count


def _line_nms(boxes: Tensor, scores: Tensor, distance: float, labels: Tensor | None) -> Tensor:
    return line_nms(boxes, scores, distance, labels=labels)


def _nms_bev(
    boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None, **options: Any
) -> Tensor:
    return nms_bev(boxes, scores, threshold, labels=labels, **options)


def _nms_bev_padded(
    boxes: Tensor,
    scores: Tensor,
    threshold: float,
    most: int,
    labels: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return nms_bev_padded(boxes, scores, threshold, most, labels=labels, **options)


class _Type(NamedTuple):
    """Takes boxes, scores, threshold, labels; with `padded`, the length before the labels."""

    sized: Callable[..., Tensor]
    padded: Callable[..., tuple[Tensor, Tensor]]
    options: tuple[str, ...] = ()


_TYPES = {
    "nms": _Type(_nms, nms_padded, ("offset", "score_threshold")),
    "soft_nms": _Type(_soft_nms, _soft_nms_padded, ("sigma", "min_score", "method", "offset")),
    "nms_rotated": _Type(nms_rotated, nms_rotated_padded, ("clockwise",)),
    "nms_quadri": _Type(nms_quadri, nms_quadri_padded),
    "nms_bev": _Type(_nms_bev, _nms_bev_padded, ("pre_max_size",)),
    "nms_normal_bev": _Type(nms_normal_bev, nms_normal_bev_padded),
    "nms3d": _Type(nms3d, nms3d_padded),
    "nms3d_normal": _Type(nms3d_normal, nms3d_normal_padded),
    "line_nms": _Type(_line_nms, line_nms_padded),
}


def _type(op: str, type: str, options: dict[str, Any]) -> _Type:
    require_choice(op, "type", type, _TYPES)
    known = _TYPES[type].options
    for name in options:
        if name not in known:
            listed = " and ".join(known) if known else "none"
            raise TypeError(f"{op}: options of type {type!r} must be {listed}; got {name}")
    return _TYPES[type]


def _classes(op: str, idxs: Tensor) -> Tensor:
    # To the functions None means one class.
    require_tensor(op, idxs=idxs)
    return idxs


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    type: str = "nms",
    class_agnostic: bool = False,
    max_output: int | None = None,
    split_thr: int | None = None,
    **options: Any,
) -> Tensor:
    """Keeps the best boxes of each class; boxes of different classes never meet.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit. Of another
            type: what its function takes.
        scores: (N,), dtype and device of `boxes`.
        idxs: (N,), uint8 or signed integers, any values; the class of each box.
        iou_threshold: a box goes when its IoU with a kept one of its class is greater.
        type: the function of `torchkiln.ops` that is used inside classes: "nms", "soft_nms" (whose
            new scores only that function returns), "nms_rotated", "nms_quadri", "nms_bev",
            "nms_normal_bev", "nms3d", "nms3d_normal" or "line_nms".
        class_agnostic: boxes of different classes meet; `idxs` is not looked at.
        max_output: the most boxes to return, at least 0. None: all.
        split_thr: from how many boxes on classes may be taken one by one, at least 0. For calls in
            mmcv's form: classes are never mixed here and memory does not grow with the square of
            the boxes, so it changes nothing.
        options: further arguments of the function: `offset` and `score_threshold` of `nms`;
            `sigma`, `min_score`, `method` and `offset` of `soft_nms`; `clockwise` of `nms_rotated`;
            `pre_max_size` of `nms_bev`, which counts the boxes of all classes.

    Returns:
        (K,), int64; rows of the kept boxes by descending score (of "soft_nms", by the new one), the
        lower row first among equals.

    Raises:
        TypeError: for another dtype, or an option that the function does not have.
        ValueError: for another shape or type, two different devices, a threshold that is NaN, or a
            negative `max_output` or `split_thr`.
        CaptureError: while a CUDA graph is captured; `batched_nms_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        As the function of the type. Classes are compared: coordinates are not shifted and keep all
        their digits, and however many boxes there are, they need no splitting.

    Source:
        Girshick et al., "Rich feature hierarchies for accurate object detection", 2014,
        section 2.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import batched_nms
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)
        >>> batched_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 1, 1]), 0.5)
        tensor([1, 0])
    """
    function = _type("batched_nms", type, options).sized
    require_count("batched_nms", max_output=max_output, split_thr=split_thr)
    labels = None if class_agnostic else _classes("batched_nms", idxs)
    return function(boxes, scores, iou_threshold, labels, **options)[:max_output]


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
        idxs: (N,), uint8 or signed integers, any values; the class of each box.
        iou_threshold: a box goes when its IoU with a kept one of its class is greater.
        max_output: length of the result, 0 to 2^30; the best boxes fill it.
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

    Source:
        Girshick et al., "Rich feature hierarchies for accurate object detection", 2014,
        section 2.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import batched_nms_padded
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)
        >>> idxs = torch.tensor([0, 1, 1])
        >>> batched_nms_padded(boxes, torch.tensor([0.5, 0.9, 0.7]), idxs, 0.5, 3)
        (tensor([ 1,  0, -1]), tensor(2))
    """
    function = _type("batched_nms_padded", type, options).padded
    require_output_size("batched_nms_padded", max_output)
    labels = None if class_agnostic else _classes("batched_nms_padded", idxs)
    return function(boxes, scores, iou_threshold, max_output, labels, **options)
