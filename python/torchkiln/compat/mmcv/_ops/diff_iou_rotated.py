"""`mmcv.ops.diff_iou_rotated`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln import ops

__all__ = ["diff_iou_rotated_2d", "diff_iou_rotated_3d"]


def diff_iou_rotated_2d(box1: Tensor, box2: Tensor) -> Tensor:
    """`torchkiln.ops.diff_iou_rotated_2d` of (B, N, 5)."""
    return ops.diff_iou_rotated_2d(box1, box2)


def diff_iou_rotated_3d(box3d1: Tensor, box3d2: Tensor) -> Tensor:
    """`torchkiln.ops.diff_iou_rotated_3d` of (B, N, 7)."""
    return ops.diff_iou_rotated_3d(box3d1, box3d2)
