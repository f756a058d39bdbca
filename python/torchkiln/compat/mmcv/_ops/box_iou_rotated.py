"""`mmcv.ops.box_iou_rotated`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import listed_errors

__all__ = ["box_iou_rotated"]


@listed_errors
def box_iou_rotated(
    bboxes1: Tensor,
    bboxes2: Tensor,
    mode: str = "iou",
    aligned: bool = False,
    clockwise: bool = True,
) -> Tensor:
    """`torchkiln.ops.box_iou_rotated`, which stays from 0 to 1 where mmcv does not.

    Raises:
        AssertionError: for another mode.
    """
    assert mode in ("iou", "iof"), f"mode must be 'iou' or 'iof'; got {mode!r}"
    return ops.box_iou_rotated(bboxes1.detach(), bboxes2.detach(), mode, aligned, clockwise)
