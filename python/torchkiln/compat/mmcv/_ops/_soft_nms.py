"""The loops of `soft_nms` and `nms_match`, on the CPU as in mmcv."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["match", "soften"]


def _overlaps(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    sides = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset
    intersection = sides.clamp(min=0).prod(1)
    area = (box[2:] - box[:2] + offset).prod()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    return intersection / (area + areas - intersection)


def _factors(overlaps: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == 2:
        return torch.exp(-(overlaps * overlaps) / sigma)
    lowered = torch.zeros_like(overlaps) if method == 0 else 1 - overlaps
    return torch.where(overlaps >= iou_threshold, lowered, 1.0)


def _survivors(alive: Tensor) -> Tensor:
    """Positions that stay, in the order in which the last one always fills the first hole."""
    count = int(alive.sum())
    order = torch.arange(count)
    holes = (~alive[:count]).nonzero().squeeze(1)
    order[holes] = count + alive[count:].nonzero().squeeze(1).flip(0)
    return order


def soften(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """See `soft_nms`; method is 0, 1 or 2 for naive, linear and gaussian."""
    wide = torch.promote_types(boxes.dtype, torch.float32)
    left = torch.cat([boxes.detach(), scores.detach()[:, None]], 1).to("cpu", wide)
    rows = torch.arange(left.size(0))
    dets, inds = [], []
    while left.size(0):
        ranks = left[:, 4].nan_to_num(nan=-torch.inf)
        best = int((ranks == ranks.max()).nonzero()[0])
        dets.append(left[best])
        inds.append(rows[best])
        # The first one moves to the place of the best, and the rest is looked at in that order.
        order = torch.arange(left.size(0))
        order[best] = 0
        left, rows = left[order[1:]], rows[order[1:]]
        overlaps = _overlaps(dets[-1][:4], left[:, :4], offset)
        lowered = left[:, 4] * _factors(overlaps, iou_threshold, sigma, method)
        left = torch.cat([left[:, :4], lowered[:, None]], 1)
        order = _survivors(~(lowered < min_score))
        left, rows = left[order], rows[order]
    kept = torch.stack(inds) if inds else rows
    result = torch.stack(dets) if dets else left
    return result.to(boxes), kept.to(boxes.device)


def match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """See `nms_match`."""
    wide = torch.promote_types(dets.dtype, torch.float32)
    boxes = dets.detach().to("cpu", wide)
    left = boxes[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(left):
        best, others = left[0], left[1:]
        joins = _overlaps(boxes[best, :4], boxes[others, :4], 0) >= iou_threshold
        groups.append([int(best), *others[joins].tolist()])
        left = others[~joins]
    return groups
