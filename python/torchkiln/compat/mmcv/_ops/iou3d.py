"""`mmcv.ops.iou3d`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings

from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import listed_errors, promoted
from torchkiln.ops.detection.box_iou_rotated import PEER_GROUND, PEER_PRISM, by_peer
from torchkiln.ops.detection.nms_rotated import PEER_UPRIGHT, suppress_by_peer

__all__ = [
    "boxes_iou3d",
    "boxes_iou_bev",
    "boxes_overlap_bev",
    "nms3d",
    "nms3d_normal",
    "nms_bev",
    "nms_normal_bev",
]


@listed_errors
def boxes_overlap_bev(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Area seen from above that boxes share, which reach a centimetre too far, as in mmcv.

    Args:
        boxes_a: (M, 7), any floating dtype; x, y, z, dx, dy, dz, heading. Computed in float32.
        boxes_b: (N, 7), alike.

    Returns:
        (M, N), dtype of `boxes_a`.
    """
    return by_peer(boxes_a, boxes_b, PEER_GROUND, "area")


@listed_errors
def boxes_iou3d(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union by volume, on the areas of `boxes_overlap_bev`.

    Args:
        boxes_a: (M, 7), any floating dtype; z is that of the centre. Computed in float32.
        boxes_b: (N, 7), alike.

    Returns:
        (M, N), dtype of `boxes_a`.

    Raises:
        AssertionError: for another number of columns.
    """
    for boxes in (boxes_a, boxes_b):
        shape = tuple(boxes.shape)
        assert len(shape) == 2, f"boxes must have shape (N, 7); got {shape}"
        assert shape[1] == 7, f"boxes must have shape (N, 7); got {shape}"
    return by_peer(boxes_a, boxes_b, PEER_PRISM, "iou")


@listed_errors
def boxes_iou_bev(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """`torchkiln.ops.boxes_iou_bev` of (M, 5) and (N, 5) x1, y1, x2, y2, ry; deprecated."""
    warnings.warn(
        "mmcv.ops.boxes_iou_bev: is deprecated; use mmcv.ops.box_iou_rotated",
        DeprecationWarning,
        stacklevel=3,
    )
    return ops.boxes_iou_bev(boxes_a.detach(), boxes_b.detach())


@listed_errors
def nms3d(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps the best boxes in space, by the areas of `boxes_overlap_bev`.

    Args:
        boxes: (N, 7), any floating dtype; x, y, z, dx, dy, dz, heading. Computed in float32.
        scores: (N,).
        iou_threshold: a box goes when its IoU from above with a kept one is greater.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        AssertionError: for another number of columns.
    """
    _check_columns(boxes, 7)
    return suppress_by_peer(boxes, scores, iou_threshold, PEER_UPRIGHT)


@listed_errors
def nms3d_normal(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`nms3d` of (N, 7) boxes whose headings do not count."""
    _check_columns(boxes, 7)
    return ops.nms3d_normal(*promoted(boxes, scores), float(iou_threshold))


@listed_errors
def nms_bev(
    boxes: Tensor,
    scores: Tensor,
    thresh: float,
    pre_max_size: int | None = None,
    post_max_size: int | None = None,
) -> Tensor:
    """Rows that `nms_rotated` keeps of (N, 5) x1, y1, x2, y2, ry; deprecated.

    Args:
        boxes: (N, 5).
        scores: (N,).
        thresh: a box goes when its IoU with a kept one is greater.
        pre_max_size: how many of the best boxes are looked at; None for all.
        post_max_size: how many are returned; None for all.

    Returns:
        (K,), int64; rows by descending score.

    Raises:
        AssertionError: for another number of columns.
    """
    _deprecated("nms_bev", "nms_rotated")
    _check_columns(boxes, 5)
    rows = ops.nms_bev(*promoted(boxes, scores), float(thresh), pre_max_size)
    return rows[:post_max_size]


@listed_errors
def nms_normal_bev(boxes: Tensor, scores: Tensor, thresh: float) -> Tensor:
    """Rows that `nms` keeps of the first four of (N, 5) x1, y1, x2, y2, ry; deprecated."""
    _deprecated("nms_normal_bev", "nms")
    _check_columns(boxes, 5)
    return ops.nms_normal_bev(*promoted(boxes, scores), float(thresh))


def _check_columns(boxes: Tensor, columns: int) -> None:
    is_right = boxes.dim() == 2 and boxes.shape[1] == columns
    assert is_right, f"boxes must have shape (N, {columns}); got {tuple(boxes.shape)}"


def _deprecated(name: str, instead: str) -> None:
    warnings.warn(
        f"mmcv.ops.{name}: is deprecated; use mmcv.ops.{instead}", DeprecationWarning, stacklevel=4
    )
