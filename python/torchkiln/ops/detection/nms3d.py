"""Non-maximum suppression of boxes in space, seen from above."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._nms_fakes import fake_padded, fake_sized

__all__ = ["nms3d", "nms3d_normal", "nms3d_normal_padded", "nms3d_padded"]


_nms3d = operator("nms3d", fake=fake_sized, autocast=torch.float32)
_nms3d_padded = operator("nms3d_padded", fake=fake_padded, autocast=torch.float32)
_nms3d_normal = operator("nms3d_normal", fake=fake_sized, autocast=torch.float32)
_nms3d_normal_padded = operator("nms3d_normal_padded", fake=fake_padded, autocast=torch.float32)


def nms3d(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """Keeps the best boxes in space: each suppresses the lower ones that overlap it from above.

    Args:
        boxes: (N, 7), float16, bfloat16, float32 or float64; centre x, y, z, sizes dx, dy, dz, and
            the heading in radians, which turns from x towards y. Heights play no part.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU from above with a kept one is greater. Any number.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a threshold that is NaN.
        CaptureError: while a CUDA graph is captured; `nms3d_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        As `nms_rotated` of the columns x, y, dx, dy, heading.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms3d
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0, 0, 9, 4, 2, 1, 0.1]])
        >>> nms3d(boxes, torch.tensor([0.8, 0.9]), 0.5)
        tensor([1])
    """
    return _nms3d(boxes, scores, iou_threshold, labels)


def nms3d_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms3d` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 7), float16, bfloat16, float32 or float64; x, y, z, dx, dy, dz, heading.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU from above with a kept one is greater.
        max_output: length of the result, 0 to 2^30; the best boxes fill it.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        indices: (max_output,), int64; rows of the kept boxes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a negative `max_output`, or a
            threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Boxes, scores and ties as in `nms3d`.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms3d_padded
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0, 0, 9, 4, 2, 1, 0.1]])
        >>> nms3d_padded(boxes, torch.tensor([0.8, 0.9]), 0.5, 2)
        (tensor([ 1, -1]), tensor(1))
    """
    return _nms3d_padded(boxes, scores, iou_threshold, max_output, labels)


def nms3d_normal(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """`nms3d` of boxes that are taken as if they were not turned.

    Args:
        boxes: (N, 7), float16, bfloat16, float32 or float64; centre x, y, z, sizes dx, dy, dz,
            heading. Heights and headings play no part.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU from above with a kept one is greater. Any number.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        (K,), int64; rows of the kept boxes by descending score, the lower row first among equals.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a threshold that is NaN.
        CaptureError: while a CUDA graph is captured; `nms3d_normal_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        As `nms` of the corners.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms3d_normal
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0, 0, 9, 4, 2, 1, 1.5]])
        >>> nms3d_normal(boxes, torch.tensor([0.8, 0.9]), 0.5)
        tensor([1])
    """
    return _nms3d_normal(boxes, scores, iou_threshold, labels)


def nms3d_normal_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nms3d_normal` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 7), float16, bfloat16, float32 or float64; x, y, z, dx, dy, dz, heading.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box goes when its IoU from above with a kept one is greater.
        max_output: length of the result, 0 to 2^30; the best boxes fill it.
        labels: (N,), uint8 or signed integers; boxes of different labels do not meet. None: all do.

    Returns:
        indices: (max_output,), int64; rows of the kept boxes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a negative `max_output`, or a
            threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Boxes, scores and ties as in `nms3d_normal`.

    Source:
        Shi et al., "PointRCNN", 2019, where boxes are suppressed by their overlap from above.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms3d_normal_padded
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0, 0, 9, 4, 2, 1, 1.5]])
        >>> nms3d_normal_padded(boxes, torch.tensor([0.8, 0.9]), 0.5, 2)
        (tensor([ 1, -1]), tensor(1))
    """
    return _nms3d_normal_padded(boxes, scores, iou_threshold, max_output, labels)
