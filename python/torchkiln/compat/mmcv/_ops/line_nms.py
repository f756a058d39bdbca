"""`mmcv.ops.line_nms`, which onedl-mmcv has."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy
import torch
from torch import Tensor

__all__ = ["line_nms"]

_HEAD = 5  # columns before the x of a lane; 2 is its start, 4 its length


def line_nms(
    boxes: Tensor, scores: Tensor, overlap: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the best lanes, by the rule of the operator in onedl-mmcv, whose rows do not fit.

    The i-th best lane suppresses the lower ones that are close to row i of `boxes`: close to itself
    where the rows are ordered by score already. `torchkiln.ops.line_nms` is right for any order.

    Args:
        boxes: (N, 5 + S), floating; lanes as in `torchkiln.ops.line_nms`. On the CPU too.
        scores: (N,).
        overlap: lanes whose mean distance is less are close.
        top_k: the most lanes to keep.

    Returns:
        keep: (N,), int64; rows of the kept lanes by descending score, then 0.
        num_to_keep: (), int64; how many they are.
        parent_object_index: (N,), int64; for each lane the place of the last one that suppressed it
            in `keep`, or its own there, counted from 1. 0 for a lane that was not reached.

    Raises:
        AssertionError: for another shape, or a negative `top_k`.

    Differentiable: no. Waits for the device.
    """
    assert boxes.dim() == 2, f"boxes must be (N, 5 + S); got {tuple(boxes.shape)}"
    assert boxes.size(1) > _HEAD, f"boxes must be (N, 5 + S); got {tuple(boxes.shape)}"
    assert scores.shape == boxes.shape[:1], "boxes and scores must be equally many"
    assert top_k >= 0, f"top_k must be at least 0; got {top_k}"
    order = scores.detach().argsort(descending=True, stable=True)
    lanes, rows = boxes.detach(), order.cpu().numpy()
    keep, parent = numpy.zeros((2, len(rows)), dtype=numpy.int64)
    is_gone, count = numpy.zeros(len(rows), dtype=bool), 0
    near = _close(lanes, lanes[order], float(overlap)).triu(1).cpu().numpy()
    for place, row in enumerate(rows):
        if is_gone[place]:
            continue
        keep[count] = row
        count += 1
        is_gone |= near[place]
        parent[rows[near[place]]] = parent[row] = count
        if count == top_k:
            break
    results = (keep, numpy.array(min(count, top_k)), parent)
    return tuple(torch.from_numpy(result).to(boxes.device) for result in results)  # type: ignore[return-value]


def _close(first: Tensor, second: Tensor, distance: float) -> Tensor:
    """(M, N): whether the mean distance of two lanes, where both run, is less."""
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(wide), second.to(wide)
    heights = first.size(1) - _HEAD
    starts, ends = zip(_run(first, heights), _run(second, heights), strict=True)
    start = torch.maximum(starts[0][:, None], starts[1])
    end = torch.minimum(ends[0][:, None], ends[1]).clamp(max=heights - 1)
    total = torch.zeros_like(start, dtype=wide)
    for height in range(heights):  # not (M, N, S) at once
        apart = (first[:, None, _HEAD + height] - second[:, _HEAD + height]).abs()
        total += torch.where((start <= height) & (height <= end), apart, 0)
    return (start >= 0) & (start <= end) & (total < distance * (end - start + 1))


def _run(lanes: Tensor, heights: int) -> tuple[Tensor, Tensor]:
    """The first and the last height (N,) of lanes."""
    start = (lanes[:, 2] * (heights - 1) + 0.5).trunc()
    return start, start + lanes[:, 4].trunc() - 1
