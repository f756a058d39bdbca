"""`mmcv.ops.box_iou_quadri`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln.compat.mmcv._common import listed_errors
from torchkiln.ops.detection.box_iou_rotated import PEER_QUAD, by_peer

__all__ = ["box_iou_quadri"]


@listed_errors
def box_iou_quadri(
    bboxes1: Tensor, bboxes2: Tensor, mode: str = "iou", aligned: bool = False
) -> Tensor:
    """Overlap of quadrilaterals, whose corners are looked for as if the others were rectangles.

    Args:
        bboxes1: (N, 8), any floating dtype; four vertices in order. Computed in float32.
        bboxes2: (M, 8), alike.
        mode: "iou", or "iof": the share of the first one.
        aligned: compares row by row; M must equal N.

    Returns:
        (N, M), or (N,) with `aligned`; dtype of `bboxes1`.

    Raises:
        AssertionError: for another mode.
    """
    assert mode in ("iou", "iof"), f"mode must be 'iou' or 'iof'; got {mode!r}"
    return by_peer(bboxes1, bboxes2, PEER_QUAD, mode, aligned)
