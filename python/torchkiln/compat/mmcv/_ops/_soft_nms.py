"""The loop of `nms_match`, on the CPU as in mmcv."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["match"]


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    sides = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])
    intersection = sides.clamp(min=0).prod(1)
    area = (box[2:] - box[:2]).prod()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return intersection / (area + areas - intersection)


def match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """See `nms_match`."""
    wide = torch.promote_types(dets.dtype, torch.float32)
    boxes = dets.detach().to("cpu", wide)
    left = boxes[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(left):
        best, others = left[0], left[1:]
        joins = _overlaps(boxes[best, :4], boxes[others, :4]) >= iou_threshold
        groups.append([int(best), *others[joins].tolist()])
        left = others[~joins]
    return groups
