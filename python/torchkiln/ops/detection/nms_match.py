"""Suppression that tells which kept box each of the others went with."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._nms_fakes import fake_groups

__all__ = ["nms_groups", "nms_match"]


_nms_groups = operator("nms_groups", fake=fake_groups, autocast=torch.float32)


def nms_groups(
    boxes: Tensor, scores: Tensor, iou_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`nms_match` in tensors of fixed size: the number of every box's group.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box joins the group of a better one from this IoU on.

    Returns:
        rows: (N,), int64; all rows by descending score, the lower row first among equals.
        groups: (N,), int64; the number of the group of each of `rows`. Groups are numbered by
            descending score of their best boxes.
        count: (), int64, on the device of `boxes`; how many groups there are.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Boxes and scores as in `nms`, but for the overlap equal to the threshold.

    Source:
        Cao et al., "Prime Sample Attention in Object Detection", 2020, for which mmcv has it.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_groups
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [5.0, 0.0, 9.0, 4.0]])
        >>> nms_groups(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5)
        (tensor([1, 2, 0]), tensor([0, 1, 0]), tensor(2))
    """
    return _nms_groups(boxes, scores, iou_threshold)


def nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[Tensor]:
    """Groups boxes: each one that `nms` would keep, and then those that it suppresses.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        scores: (N,), dtype and device of `boxes`.
        iou_threshold: a box joins the group of a better one from this IoU on; `nms` suppresses
            above it only. The best one takes it.

    Returns:
        Groups, each (M,), int64, the rows of its boxes by descending score; groups by descending
        score of their first boxes.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a threshold that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        The number of groups is known to the host only when the GPU is done: the call waits for it.
        `nms_groups` does not.

    Source:
        Cao et al., "Prime Sample Attention in Object Detection", 2020, for which mmcv has it.

    Example:
        >>> import torch
        >>> from torchkiln.ops import nms_match
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [5.0, 0.0, 9.0, 4.0]])
        >>> nms_match(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5)
        [tensor([1, 0]), tensor([2])]
    """
    rows, groups, _ = nms_groups(boxes, scores, iou_threshold)
    groups, order = groups.sort(stable=True)
    sizes = groups.unique_consecutive(return_counts=True)[1].tolist()
    return list(rows[order].split(sizes)) if sizes else []
