"""`mmcv.ops.iou3d`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings

from torch import Tensor

from torchkiln import ops
from torchkiln.ops.detection.box_iou_rotated import PEER_GROUND, PEER_PRISM, by_peer

__all__ = ["boxes_iou3d", "boxes_iou_bev", "boxes_overlap_bev"]


def boxes_overlap_bev(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Area seen from above that boxes share, which reach a centimetre too far, as in mmcv.

    Args:
        boxes_a: (M, 7), any floating dtype; x, y, z, dx, dy, dz, heading. Computed in float32.
        boxes_b: (N, 7), alike.

    Returns:
        (M, N), dtype of `boxes_a`.
    """
    return by_peer(boxes_a, boxes_b, PEER_GROUND, "area")


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


def boxes_iou_bev(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """`torchkiln.ops.boxes_iou_bev` of (M, 5) and (N, 5) x1, y1, x2, y2, ry; deprecated."""
    warnings.warn(
        "mmcv.ops.boxes_iou_bev: is deprecated; use mmcv.ops.box_iou_rotated",
        DeprecationWarning,
        stacklevel=2,
    )
    return ops.boxes_iou_bev(boxes_a.detach(), boxes_b.detach())
