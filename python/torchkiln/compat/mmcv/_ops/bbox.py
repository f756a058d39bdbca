"""`mmcv.ops.bbox`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.compat.mmcv._common import listed_errors

__all__ = ["bbox_overlaps"]


@listed_errors
def bbox_overlaps(
    bboxes1: Tensor,
    bboxes2: Tensor,
    mode: str = "iou",
    aligned: bool = False,
    offset: int = 0,
) -> Tensor:
    """Overlap of boxes, pair by pair or, with `aligned`, row by row.

    Args:
        bboxes1: (m, 4), any real dtype; x1, y1, x2, y2.
        bboxes2: (n, 4), alike.
        mode: "iou", or "iof": the share of the first box.
        aligned: compares row by row; m must equal n.
        offset: 0, or 1 for boxes whose last pixel belongs to them.

    Returns:
        (m, n), or (m,) with `aligned`; dtype of `bboxes1`, float32 for integers. An empty union
        gives NaN, as in mmcv.

    Raises:
        AssertionError: for another mode, offset or shape.
    """
    assert mode in ("iou", "iof"), f"mode must be 'iou' or 'iof'; got {mode!r}"
    assert offset in (0, 1), f"offset must be 0 or 1; got {offset}"
    for boxes in (bboxes1, bboxes2):
        assert boxes.size(-1) == 4 or boxes.size(0) == 0, "boxes must have 4 columns"
    # The quotient of integers is none; half types stay what they are.
    bboxes1, bboxes2 = (x if x.is_floating_point() else x.float() for x in (bboxes1, bboxes2))
    rows, columns = bboxes1.size(0), bboxes2.size(0)
    assert not aligned or rows == columns, f"aligned needs equally many; got {rows}, {columns}"
    if rows * columns == 0:
        return bboxes1.new_zeros((rows,) if aligned else (rows, columns))
    # mmcv has no gradient here, and divides by what comes out: modes 5 and 6.
    first, second = bboxes1.detach(), bboxes2.detach().to(bboxes1.dtype)
    overlap: Tensor = torch.ops.torchkiln.box_iou(
        first, second, 5 if mode == "iou" else 6, 0.0, aligned, float(offset)
    )
    return overlap.to(bboxes1.dtype)  # under autocast it is another one
