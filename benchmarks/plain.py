"""The operators as compositions of PyTorch's own: a peer, and in float64 the right answer.

Written from the definitions; shares no code with torchkiln.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PANEL = 1024


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair."""
    area1 = (boxes1[:, 2:] - boxes1[:, :2]).prod(1)
    area2 = (boxes2[:, 2:] - boxes2[:, :2]).prod(1)
    low = torch.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    high = torch.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(2)
    return overlap / (area1[:, None] + area2[None, :] - overlap)


def _first_of_panel(iou: Tensor, threshold: float) -> Tensor:
    """Greedy choice inside one panel, on the CPU."""
    hits = (iou > threshold).cpu().numpy()
    alive = torch.ones(len(hits), dtype=torch.bool).numpy()
    for i in range(len(hits)):
        if alive[i]:
            alive[i + 1 :] &= ~hits[i, i + 1 :]
    return torch.from_numpy(alive).to(iou.device)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the kept boxes by falling score; equal scores keep the order of the input."""
    rest = torch.sort(scores, descending=True, stable=True).indices
    kept = []
    while rest.numel():
        panel, rest = rest[:PANEL], rest[PANEL:]
        panel = panel[_first_of_panel(box_iou(boxes[panel], boxes[panel]), threshold)]
        kept.append(panel)
        # In parts: a panel against very many boxes is large in float64.
        parts = [
            part[~(box_iou(boxes[panel], boxes[part]) > threshold).any(0)]
            for part in rest.split(65_536)
        ]
        rest = torch.cat([rest[:0], *parts])
    return torch.cat([rest, *kept])


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float) -> Tensor:
    """The same for each class; in float64 an offset per class is harmless."""
    offset = idxs.to(boxes)[:, None] * (boxes.max() + 1)
    return nms(boxes + offset, scores, threshold)


def roi_align(
    input: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool = False
) -> Tensor:
    """RoIAlign by one grid_sample; every image has as many regions, together and inside it."""
    n, channels, height, width = input.shape
    shift = 0.5 if aligned else 0.0
    low = rois[:, 1:3] * scale - shift
    extent = rois[:, 3:5] * scale - shift - low
    if not aligned:
        extent = extent.clamp(min=1)
    places = (torch.arange(size * ratio, device=rois.device, dtype=rois.dtype) + 0.5) / ratio / size
    points = low[:, None] + places[None, :, None] * extent[:, None]  # (K, size * ratio, 2)
    limits = torch.tensor([width - 1, height - 1], device=rois.device, dtype=rois.dtype)
    points = points * 2 / limits - 1
    steps = size * ratio
    x = points[:, None, :, 0].expand(-1, steps, -1)
    y = points[:, :, None, 1].expand(-1, -1, steps)
    grid = torch.stack([x, y], 3).reshape(n, -1, steps, 2)
    samples = functional.grid_sample(
        input, grid.to(input.dtype), padding_mode="border", align_corners=True
    )
    pooled = functional.avg_pool2d(samples, ratio)
    bins = pooled.view(n, channels, -1, size, size)
    return bins.transpose(1, 2).reshape(-1, channels, size, size)


def roi_pool(input: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """The greatest value of each bin, one region after the other: slow, for the answer only."""
    _, channels, height, width = input.shape
    pooled = []
    for batch, *box in rois.tolist():
        # Half a pixel rounds away from zero, as C's round does; boxes are not negative here.
        x1, y1, x2, y2 = (int(edge * scale + 0.5) for edge in box)
        image = input[int(batch)]
        rows = _bins(image, 1, y1, max(y2 - y1 + 1, 1), size, height)
        pooled.append(_bins(rows, 2, x1, max(x2 - x1 + 1, 1), size, width))
    return torch.stack(pooled) if pooled else input.new_zeros(0, channels, size, size)


def _bins(values: Tensor, dim: int, first: int, extent: int, size: int, limit: int) -> Tensor:
    """The greatest value of each of `size` bins of one axis; 0 for an empty one."""
    results = []
    for i in range(size):
        begin = min(max(first + i * extent // size, 0), limit)
        end = min(max(first - (-(i + 1) * extent // size), 0), limit)
        if end > begin:
            results.append(values.narrow(dim, begin, end - begin).amax(dim))
        else:
            results.append(torch.zeros_like(values.select(dim, 0)))
    return torch.stack(results, dim)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str
) -> Tensor:
    """Focal loss; integer targets are labels, the number of classes meaning background."""
    if not targets.is_floating_point():
        classes = torch.arange(inputs.shape[1], device=inputs.device)
        targets = (targets[:, None] == classes).to(inputs.dtype)
    p = inputs.sigmoid()
    loss = functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    of_target = p * targets + (1 - p) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    loss = weight * loss * (1 - of_target) ** gamma
    return loss.sum() if reduction == "sum" else loss


def selective_scan(
    input: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Mamba's rule, with softplus and gate, one position after the other.

    B and C have one group. Nothing has more numbers than an input: a state for each position would
    have N times as many.
    """
    delta = functional.softplus(delta + delta_bias[:, None])
    along = (delta, delta * input, B[:, 0], C[:, 0])
    # A position's numbers lie next to each other; unbind, because each index has a gradient of
    # all positions.
    positions = zip(*(x.movedim(-1, 0).contiguous().unbind(0) for x in along), strict=True)
    state = input.new_zeros(*input.shape[:2], A.shape[1])
    outputs = []
    for step, held, b, c in positions:
        decay = torch.exp(step[..., None] * A)
        state = torch.addcmul(held[..., None] * b[:, None], decay, state)
        outputs.append((state @ c[..., None]).squeeze(-1))
    return (torch.stack(outputs, -1) + D[:, None] * input) * functional.silu(z)
