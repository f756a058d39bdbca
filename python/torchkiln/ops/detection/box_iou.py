"""Overlap of boxes, pair by pair or row by row: IoU and its other forms, one schema."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import (
    cast_for_autocast,
    require_choice,
    require_last,
    require_pair,
    widened,
)
from torchkiln.ops.detection.box_convert import COLUMNS, UPRIGHT, box_convert
from torchkiln.ops.detection.box_iou_rotated import box_iou_quadri, box_iou_rotated

__all__ = ["box_iou", "complete_box_iou", "distance_box_iou", "generalized_box_iou"]

# Values of the schema's `mode`; 5 and 6 are IoU and IoF as mmcv computes them.
_MODES = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3, "iof": 4}


def _fake(
    boxes1: Tensor,
    boxes2: Tensor,
    mode: int = 0,
    eps: float = 1e-7,
    aligned: bool = False,
    offset: float = 0.0,
) -> Tensor:
    rows = boxes1.shape[0]
    return boxes1.new_empty((rows,) if aligned else (rows, boxes2.shape[0]))


def _fake_backward(
    grad_output: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    mode: int,
    eps: float,
    aligned: bool,
    offset: float,
) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape), boxes2.new_empty(boxes2.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes1, boxes2, *ctx.options = inputs
    ctx.save_for_backward(boxes1, boxes2)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    boxes1, boxes2 = ctx.saved_tensors
    return _box_iou_backward(grad_output, boxes1, boxes2, *ctx.options)


_box_iou_backward = operator("_box_iou_backward", fake=_fake_backward)
# float32: a coordinate of 2000 has no fraction left in float16, nor a difference of two of them.
_box_iou = operator(
    "box_iou",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)


def _in_radians(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :4], boxes[..., 4:] * (math.pi / 180)], -1)


def _of_form(
    boxes1: Tensor, boxes2: Tensor, fmt: str, mode: str, aligned: bool, offset: float
) -> Tensor:
    """`box_iou` of boxes that are not in "xyxy": converted in float32 at least."""
    boxes1, boxes2 = cast_for_autocast(boxes1, boxes2)
    require_last("box_iou", COLUMNS[fmt], boxes1=boxes1, boxes2=boxes2)
    require_pair("box_iou", boxes1=boxes1, boxes2=boxes2)
    a, b = widened(boxes1), widened(boxes2)
    if fmt in UPRIGHT:
        a, b = (box_convert(boxes, fmt, "xyxy") for boxes in (a, b))
        return _box_iou(a, b, _MODES[mode], 1e-7, aligned, offset).to(boxes1.dtype)
    require_choice("box_iou", f'mode for "{fmt}"', mode, {"iou": 0, "iof": 4})
    if offset != 0:
        raise ValueError(f'box_iou: offset must be 0 for "{fmt}"; got {offset}')
    if fmt == "xyxyxyxy":
        return box_iou_quadri(a, b, mode, aligned).to(boxes1.dtype)
    a, b = (_in_radians(box_convert(boxes, fmt, "cxcywhr")) for boxes in (a, b))
    return box_iou_rotated(a, b, mode, aligned, clockwise=False).to(boxes1.dtype)


def box_iou(
    boxes1: Tensor,
    boxes2: Tensor,
    fmt: str = "xyxy",
    *,
    mode: str = "iou",
    aligned: bool = False,
    offset: float = 0.0,
) -> Tensor:
    """Intersection over union of boxes: of every pair or, with `aligned`, of equal rows.

    Args:
        boxes1: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit. In
            another `fmt`: (N, 4), (N, 5) or (N, 8).
        boxes2: as `boxes1`, M rows, its dtype and device; M = N with `aligned`.
        fmt: notation of the boxes, as in `box_convert`: "xyxy", "xywh", "cxcywh" or the rotated
            ones "xywhr", "cxcywhr", "xyxyxyxy".
        mode: "iou"; "iof", over the area of the first box; or "giou", "diou", "ciou", which are
            the functions `generalized_box_iou`, `distance_box_iou` and `complete_box_iou`. Of
            rotated boxes "iou" and "iof" only.
        aligned: compares row i with row i.
        offset: added to x2 and y2: 1 for boxes whose last pixel belongs to them. Not of rotated
            boxes.

    Returns:
        (N, M), or (N,) with `aligned`; dtype of `boxes1`; from 0 to 1 for "iou" and "iof".

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, notation or mode, two different devices, or an offset below
            0.

    Differentiable: boxes1, boxes2, unless they are rotated. Deterministic: yes. Autocast: float32.

    Note:
        A box with x2 < x1 or y2 < y1 is empty, and a pair with an empty union has IoU 0, where
        torchvision gives NaN; likewise IoF for an empty first box. NaN coordinates give NaN.
        Integer boxes are refused. Rotated boxes as in `box_iou_rotated` and `box_iou_quadri`.

    Source:
        Everingham et al., "The PASCAL Visual Object Classes Challenge", 2010, for the measure.

    Example:
        >>> import torch
        >>> from torchkiln.ops import box_iou
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
        >>> box_iou(boxes[:1], boxes)
        tensor([[1.0000, 0.3333]])
    """
    require_choice("box_iou", "mode", mode, _MODES)
    require_choice("box_iou", "fmt", fmt, COLUMNS)
    if fmt != "xyxy":
        return _of_form(boxes1, boxes2, fmt, mode, aligned, offset)
    return _box_iou(boxes1, boxes2, _MODES[mode], 1e-7, aligned, offset)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of every pair of boxes: less the empty share of the smallest box around both.

    Args:
        boxes1: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        boxes2: (M, 4), dtype and device of `boxes1`.

    Returns:
        (N, M), dtype of `boxes1`; from -1 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: boxes1, boxes2. Deterministic: yes. Autocast: float32.

    Note:
        Degenerate boxes as in `box_iou`.

    Source:
        Rezatofighi et al., "Generalized Intersection over Union", 2019, algorithm 1.

    Example:
        >>> import torch
        >>> from torchkiln.ops import generalized_box_iou
        >>> boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
        >>> generalized_box_iou(boxes[:1], boxes)
        tensor([[ 1.0000, -0.5000]])
    """
    return _box_iou(boxes1, boxes2, _MODES["giou"], 0.0, False, 0.0)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """Distance IoU of every pair of boxes: less the normalised squared distance of the centres.

    Args:
        boxes1: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        boxes2: (M, 4), dtype and device of `boxes1`.
        eps: added to the squared diagonal of the box around both.

    Returns:
        (N, M), dtype of `boxes1`; from -1 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: boxes1, boxes2. Deterministic: yes. Autocast: float32.

    Note:
        Degenerate boxes as in `box_iou`.

    Source:
        Zheng et al., "Distance-IoU Loss", 2020, equation 7.

    Example:
        >>> import torch
        >>> from torchkiln.ops import distance_box_iou
        >>> boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
        >>> distance_box_iou(boxes[:1], boxes)
        tensor([[ 1.0000, -0.5294]])
    """
    return _box_iou(boxes1, boxes2, _MODES["diou"], eps, False, 0.0)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of every pair of boxes: distance IoU less a term for different aspect ratios.

    Args:
        boxes1: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        boxes2: (M, 4), dtype and device of `boxes1`.
        eps: added to the squared diagonal and to the denominator of the aspect term's weight.

    Returns:
        (N, M), dtype of `boxes1`; from -2 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: boxes1, boxes2; the weight of the aspect term is a constant, as in the paper.
    Deterministic: yes. Autocast: float32.

    Note:
        Degenerate boxes as in `box_iou`; a box of size 0 has the aspect angle 0.

    Source:
        Zheng et al., "Distance-IoU Loss", 2020, equations 8 to 11.

    Example:
        >>> import torch
        >>> from torchkiln.ops import complete_box_iou
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 2.0]])
        >>> complete_box_iou(boxes[:1], boxes)
        tensor([[1.0000, 0.2371]])
    """
    return _box_iou(boxes1, boxes2, _MODES["ciou"], eps, False, 0.0)
