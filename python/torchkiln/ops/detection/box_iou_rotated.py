"""Overlaps of rotated rectangles, quadrilaterals and upright boxes in space: one schema."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import require_choice

__all__ = [
    "box_iou_quadri",
    "box_iou_rotated",
    "boxes_iou3d",
    "boxes_iou_bev",
    "boxes_overlap_bev",
]

# Values of the schema's `form` and `mode`; the last forms follow mmcv's rules, for its drop-in.
_RECTANGLE, _QUAD, _CORNERS, _GROUND, _PRISM = range(5)
PEER_QUAD, PEER_GROUND, PEER_PRISM = range(5, 8)
_MODES = {"iou": 0, "iof": 1}
_IOU, _AREA = 0, 2


def _fake(
    boxes1: Tensor,
    boxes2: Tensor,
    form: int = 0,
    mode: int = 0,
    aligned: bool = False,
    clockwise: bool = True,
) -> Tensor:
    shape = (boxes1.shape[0],) if aligned else (boxes1.shape[0], boxes2.shape[0])
    return boxes1.new_empty(shape)


# float32: of a float16 angle of 3, the next one moves the end of a side of 500 by a pixel.
_box_iou_rotated = operator("box_iou_rotated", fake=_fake, autocast=torch.float32)


def box_iou_rotated(
    boxes1: Tensor,
    boxes2: Tensor,
    mode: str = "iou",
    aligned: bool = False,
    clockwise: bool = True,
) -> Tensor:
    """Overlap of rotated rectangles, pair by pair or row by row.

    Args:
        boxes1: (N, 5), float16, bfloat16, float32 or float64; centre x and y, width, height, angle
            in radians.
        boxes2: (M, 5), dtype and device of `boxes1`.
        mode: "iou", intersection over union, or "iof", intersection over the box of `boxes1`.
        aligned: compares row with row; M must equal N.
        clockwise: positive angles turn x towards y, which is clockwise on a screen, where y points
            down; False turns them the other way.

    Returns:
        (N, M), or (N,) with `aligned`; dtype of `boxes1`; from 0 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape or mode, or two different devices.

    Differentiable: no; `diff_iou_rotated_2d` is. Deterministic: yes. Autocast: float32.

    Note:
        A box with a width or height of 0 or less is empty, and where the denominator is 0, so is
        the result. A box with a number that is not finite gives NaN. The area is a sum of
        integrals along edges, in float32 for the half types: it is as exact far from the origin,
        for equal boxes and for those that only touch.

    Source:
        Ma et al., "Arbitrary-Oriented Scene Text Detection via Rotation Proposals", 2018.

    Example:
        >>> import torch
        >>> from torchkiln.ops import box_iou_rotated
        >>> square = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]])
        >>> turned = torch.tensor([[0.0, 0.0, 2.0, 2.0, torch.pi / 4], [1.0, 0.0, 2.0, 2.0, 0.0]])
        >>> box_iou_rotated(square, turned)
        tensor([[0.7071, 0.3333]])
    """
    require_choice("box_iou_rotated", "mode", mode, _MODES)
    return _box_iou_rotated(boxes1, boxes2, _RECTANGLE, _MODES[mode], aligned, clockwise)


def box_iou_quadri(
    boxes1: Tensor, boxes2: Tensor, mode: str = "iou", aligned: bool = False
) -> Tensor:
    """Overlap of quadrilaterals, pair by pair or row by row.

    Args:
        boxes1: (N, 8), float16, bfloat16, float32 or float64; x and y of four vertices in order, in
            either sense. Convex or not, but no side may cross another.
        boxes2: (M, 8), dtype and device of `boxes1`.
        mode: "iou", intersection over union, or "iof", intersection over the one of `boxes1`.
        aligned: compares row with row; M must equal N.

    Returns:
        (N, M), or (N,) with `aligned`; dtype of `boxes1`; from 0 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape or mode, or two different devices.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Where the denominator is 0, so is the result. A vertex that is not finite gives NaN.

    Source:
        Everingham et al., "The PASCAL Visual Object Classes Challenge", 2010, for the measure.

    Example:
        >>> import torch
        >>> from torchkiln.ops import box_iou_quadri
        >>> square = torch.tensor([[0.0, 0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 2.0]])
        >>> kite = torch.tensor([[1.0, 0.0, 2.0, 1.0, 1.0, 2.0, 0.0, 1.0]])
        >>> box_iou_quadri(square, kite)
        tensor([[0.5000]])
    """
    require_choice("box_iou_quadri", "mode", mode, _MODES)
    return _box_iou_rotated(boxes1, boxes2, _QUAD, _MODES[mode], aligned, True)


def boxes_iou_bev(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes seen from above, given by their corners.

    Args:
        boxes1: (N, 5), float16, bfloat16, float32 or float64; x1, y1, x2, y2 of the box before it
            is turned around its centre, and the angle in radians, from x towards y.
        boxes2: (M, 5), dtype and device of `boxes1`.

    Returns:
        (N, M), dtype of `boxes1`; from 0 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Degenerate boxes as in `box_iou_rotated`.

    Source:
        Geiger et al., "Are we ready for autonomous driving? The KITTI vision benchmark suite",
        2012, for the measure.

    Example:
        >>> import torch
        >>> from torchkiln.ops import boxes_iou_bev
        >>> a = torch.tensor([[0.0, 0.0, 4.0, 2.0, 0.0]])
        >>> b = torch.tensor([[0.0, 0.0, 4.0, 2.0, torch.pi / 2]])
        >>> boxes_iou_bev(a, b)
        tensor([[0.3333]])
    """
    return _box_iou_rotated(boxes1, boxes2, _CORNERS, _IOU, False, True)


def boxes_overlap_bev(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Area on the ground that every pair of upright boxes shares.

    Args:
        boxes1: (N, 7), float16, bfloat16, float32 or float64; x, y, z, dx, dy, dz, and the angle in
            radians, from x towards y.
        boxes2: (M, 7), dtype and device of `boxes1`.

    Returns:
        (N, M), dtype of `boxes1`; at least 0. z and dz only matter where they are not finite.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Degenerate boxes as in `box_iou_rotated`.

    Source:
        Geiger et al., "Are we ready for autonomous driving? The KITTI vision benchmark suite",
        2012, for the measure.

    Example:
        >>> import torch
        >>> from torchkiln.ops import boxes_overlap_bev
        >>> a = torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 1.0, 0.0]])
        >>> b = torch.tensor([[1.0, 0.0, 9.0, 4.0, 2.0, 1.0, 0.0]])
        >>> boxes_overlap_bev(a, b)
        tensor([[6.]])
    """
    return _box_iou_rotated(boxes1, boxes2, _GROUND, _AREA, False, True)


def boxes_iou3d(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair of upright boxes, by volume.

    Args:
        boxes1: (N, 7), float16, bfloat16, float32 or float64; x, y, z of the centre, dx, dy, dz,
            and the angle in radians, from x towards y.
        boxes2: (M, 7), dtype and device of `boxes1`.

    Returns:
        (N, M), dtype of `boxes1`; from 0 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: no; `diff_iou_rotated_3d` is. Deterministic: yes. Autocast: float32.

    Note:
        Degenerate boxes as in `box_iou_rotated`. z is that of the centre, not of the bottom.

    Source:
        Geiger et al., "Are we ready for autonomous driving? The KITTI vision benchmark suite",
        2012, for the measure.

    Example:
        >>> import torch
        >>> from torchkiln.ops import boxes_iou3d
        >>> a = torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 2.0, 0.0]])
        >>> b = torch.tensor([[0.0, 0.0, 1.0, 4.0, 2.0, 2.0, torch.pi]])
        >>> boxes_iou3d(a, b)
        tensor([[0.3333]])
    """
    return _box_iou_rotated(boxes1, boxes2, _PRISM, _IOU, False, True)


def by_peer(boxes1: Tensor, boxes2: Tensor, form: int, mode: str, aligned: bool = False) -> Tensor:
    """An overlap by mmcv's rules: in float32, without a gradient, in the dtype of `boxes1`."""
    number = _AREA if mode == "area" else _MODES[mode]
    a, b = boxes1.detach().float(), boxes2.detach().float()
    return _box_iou_rotated(a, b, form, number, aligned, True).to(boxes1.dtype)
