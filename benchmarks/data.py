"""What only benchmarks ask of inputs; the inputs themselves are those of the workloads."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchkiln.testing import _scenes

# Kept because many rows want the same numbers; never write into them.
normal = functools.lru_cache(maxsize=4)(_scenes.normal)


def touched_share(rois: Tensor, scale: float, images: int, height: int, width: int) -> float:
    """The share of a feature map's pixels in or beside a region: only they must be read."""
    cover = torch.zeros(images, height + 1, width + 1, dtype=torch.int64)
    batch = rois[:, 0].long().cpu()
    box = rois[:, 1:].double().cpu() * scale
    x1, y1 = box[:, 0].floor().long().clamp(0, width), box[:, 1].floor().long().clamp(0, height)
    x2, y2 = box[:, 2].ceil().long() + 1, box[:, 3].ceil().long() + 1
    x2, y2 = x2.clamp(0, width), y2.clamp(0, height)
    one = torch.ones_like(batch)
    for y, x, sign in ((y1, x1, 1), (y1, x2, -1), (y2, x1, -1), (y2, x2, 1)):
        cover.index_put_((batch, y, x), sign * one, accumulate=True)
    inside = cover.cumsum(1).cumsum(2)[:, :height, :width] > 0
    return inside.double().mean().item()
