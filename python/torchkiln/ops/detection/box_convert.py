"""Boxes from one notation to another."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln.ops._arguments import require_choice, require_last, widened

__all__ = ["box_convert"]

#: Numbers of a box in each notation.
COLUMNS = {"xyxy": 4, "xywh": 4, "cxcywh": 4, "xywhr": 5, "cxcywhr": 5, "xyxyxyxy": 8}
UPRIGHT = ("xyxy", "xywh", "cxcywh")


def _to_corners(boxes: Tensor, form: str) -> Tensor:
    """An upright notation as x1, y1, x2, y2."""
    if form == "xyxy":
        return boxes
    position, size = boxes.split(2, -1)
    first = position if form == "xywh" else position - size / 2
    return torch.cat([first, first + size], -1)


def _from_corners(corners: Tensor, form: str) -> Tensor:
    if form == "xyxy":
        return corners
    first, last = corners.split(2, -1)
    return torch.cat([first if form == "xywh" else (first + last) / 2, last - first], -1)


def _axes(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (..., 2) along the width and the height; y points down."""
    radians = angle * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    return torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)


def _length(vector: Tensor) -> Tensor:
    """Of (..., 2), as (..., 1); its gradient is 0 where the length is."""
    square = vector.square().sum(-1, keepdim=True)
    is_zero = square == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).sqrt())


def _to_rotated(boxes: Tensor, form: str) -> Tensor:
    """A rotated notation as the turned upper left corner, width, height and angle."""
    if form == "xywhr":
        return boxes
    if form == "cxcywhr":
        centre, width, height, angle = boxes.split((2, 1, 1, 1), -1)
        along, across = _axes(angle)
        first = centre - width / 2 * along - height / 2 * across
        return torch.cat([first, width, height, angle], -1)
    first, second, third, _ = boxes.split(2, -1)
    x, y = (second - first).split(1, -1)
    has_width = (x != 0) | (y != 0)
    angle = torch.where(has_width, torch.atan2(-y, torch.where(has_width, x, 1.0)), 0.0)
    return torch.cat(
        [first, _length(second - first), _length(third - second), angle * (180 / math.pi)], -1
    )


def _from_rotated(boxes: Tensor, form: str) -> Tensor:
    if form == "xywhr":
        return boxes
    first, width, height, angle = boxes.split((2, 1, 1, 1), -1)
    along, across = _axes(angle)
    if form == "cxcywhr":
        centre = first + width / 2 * along + height / 2 * across
        return torch.cat([centre, width, height, angle], -1)
    along, across = width * along, height * across
    return torch.cat([first, first + along, first + along + across, first + across], -1)


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Boxes in another notation.

    Upright: "xyxy" (two corners), "xywh" (upper left corner, size), "cxcywh" (centre, size).
    Rotated: "xywhr" (the turned upper left corner, size, angle), "cxcywhr" (centre, size, angle),
    "xyxyxyxy" (corners: upper left, upper right, lower right, lower left, before the turn). The
    angle is in degrees, counter-clockwise as an image is seen, its y axis pointing down.

    Args:
        boxes: (..., 4), (..., 5) or (..., 8) as `in_fmt` asks; float16, bfloat16, float32 or
            float64.
        in_fmt: notation of `boxes`.
        out_fmt: notation of the result; upright for an upright `in_fmt`, else rotated.

    Returns:
        (..., 4), (..., 5) or (..., 8), dtype of `boxes`; never `boxes` itself.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or notation, or an upright and a rotated one.

    Differentiable: boxes. Deterministic: yes. Autocast: as without.

    Note:
        Computed in float32 for the half types. From "xyxyxyxy" the angle is from -180 to 180, and
        0 where the width is 0; three corners are read, the fourth follows from them.

    Source:
        Definitions of torchvision's function of this name.

    Example:
        >>> import torch
        >>> from torchkiln.ops import box_convert
        >>> box_convert(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), "xyxy", "cxcywh")
        tensor([[2.5000, 5.0000, 3.0000, 6.0000]])
    """
    require_choice("box_convert", "in_fmt", in_fmt, COLUMNS)
    require_choice("box_convert", "out_fmt", out_fmt, COLUMNS)
    require_last("box_convert", COLUMNS[in_fmt], boxes=boxes)
    upright = in_fmt in UPRIGHT
    if upright != (out_fmt in UPRIGHT):
        kind = "upright" if upright else "rotated"
        raise ValueError(
            f'box_convert: out_fmt must be {kind}, as in_fmt "{in_fmt}" is; got {out_fmt!r}'
        )
    if in_fmt == out_fmt:
        return boxes.clone()
    if upright:
        result = _from_corners(_to_corners(widened(boxes), in_fmt), out_fmt)
    else:
        result = _from_rotated(_to_rotated(widened(boxes), in_fmt), out_fmt)
    return result.to(boxes.dtype)
