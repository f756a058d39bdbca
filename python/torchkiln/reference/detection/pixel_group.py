"""pixel_group in plain Python: a queue of pixels."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchkiln.reference.detection.contour_expand import as_labels, flood, labelled, text_maps
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["pixel_group"]


def _mean_of(values: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """(num_labels + 1, C) means of (H, W, C) over the pixels of each label; 0 without any."""
    rows = [values[labels == label].double() for label in range(1, num_labels + 1)]
    means = [row.mean(0) if len(row) else row.new_zeros(row.shape[1]) for row in rows]
    background = values.new_zeros(values.shape[2], dtype=torch.float64)
    return torch.stack([background, *means])


def pixel_group(
    scores: Tensor,
    mask: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    contour: Tensor,
    num_labels: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lets labels grow over near embeddings.

    Args:
        scores: (H, W).
        mask: (H, W).
        embeddings: (H, W, C).
        labels: (H, W).
        contour: (H, W).
        num_labels: the largest label; larger ones are background.
        threshold: distance from which on a pixel does not join.

    Returns:
        (H, W) int32 labels, (num_labels + 1,) mean scores, (num_labels + 1,) numbers of pixels.
    """
    labels = torch.where((labels > 0) & (labels <= num_labels), labels, 0)
    means = _mean_of(embeddings, labels, num_labels)
    squares = (embeddings.double()[None] - means[:, None, None]).square().sum(3).tolist()
    may, rows = mask.tolist(), labels.tolist()
    sources = [(y, x) for y, x in labelled(rows) if contour[y, x]]

    def may_join(label: int, y: int, x: int) -> bool:
        return bool(may[y][x]) and squares[label][y][x] < threshold**2

    flood(rows, sources, may_join)
    groups = as_labels(rows, labels)
    confidence = _mean_of(scores[..., None], groups, num_labels)[:, 0].to(scores.dtype)
    counts = [int((groups == label).sum()) for label in range(1, num_labels + 1)]
    return groups, confidence, torch.tensor([0, *counts], device=labels.device)


def parity() -> Parity:
    """What pixel_group is tried on."""
    return Parity(
        op="pixel_group",
        tier="A",
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_problem, 23, 31, 4)),
            # More channels than one chunk of the GPU's means.
            Case("many_channels", functools.partial(_problem, 11, 12, 6)),
            Case("large", functools.partial(_problem, 60, 70, 2)),
            Case("no_labels", functools.partial(_problem, 9, 9, 4, labels=0)),
            Case("passes_by", _passes_by),
            Case("single", functools.partial(_problem, 1, 1, 1)),
            Case("no_channels", functools.partial(_problem, 5, 6, 0)),
            Case("empty", functools.partial(_problem, 0, 5, 4)),
        ),
        workloads=(
            # PAN's maps of an image of 736 x 736, at a quarter of its size.
            Workload(
                "pan",
                {"height": 184, "width": 184, "channels": 4, "texts": 30},
                _texts,
                gradient=False,
            ),
        ),
    )


def _problem(
    height: int, width: int, channels: int, new: Inputs, labels: int = 6
) -> dict[str, object]:
    numbers = new.integers(height, width, high=labels + 1)
    numbers = numbers.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
    # The embedding tells the kernel, more or less: halves, so that no dtype rounds a distance.
    own = new.integers(labels + 1, channels, low=-2, high=3)
    noise = new.integers(height, width, channels, low=-1, high=2)
    kernels = torch.where(new.uniform(height, width) < 0.3, numbers, 0)
    return {
        "scores": new.uniform(height, width),
        "mask": new.uniform(height, width) < 0.85,
        "embeddings": own[numbers] + noise / 2.0,
        "labels": kernels.int(),
        "contour": (new.uniform(height, width) < 0.8).to(torch.uint8),
        "num_labels": labels,
        "threshold": 1.53,
    }


def _passes_by(new: Inputs) -> dict[str, object]:
    """What is nearer may not join: the pixel waits for the other label, and blocks the first."""
    embeddings = torch.tensor([[0.0, 0, 5, 5, 5, 5, 0, 0], [0, 0, 0, 0, 0, 5, 5, 5]])
    labels = torch.tensor([[1, 0, 0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    return {
        "scores": new.uniform(2, 8),
        "mask": torch.ones(2, 8, dtype=torch.bool),
        "embeddings": embeddings[..., None].double(),
        "labels": labels.int(),
        "contour": labels > 0,
        "num_labels": 3,
        "threshold": 2.0,
    }


def _texts(sizes: Sizes) -> dict[str, object]:
    masks, labels = text_maps(sizes, 2)
    own = scenes.normal((sizes["texts"] + 1, sizes["channels"]), scenes.SEED)
    shape = (sizes["height"], sizes["width"])
    noise = scenes.normal((*shape, sizes["channels"]), scenes.SEED + 1)
    return {
        "scores": scenes.normal(shape, scenes.SEED + 2).sigmoid(),
        "mask": masks[0].bool(),
        "embeddings": own[labels.long()] + 0.1 * noise,
        "labels": labels,
        "contour": (labels > 0).to(torch.uint8),
        "num_labels": sizes["texts"],
        "threshold": 0.8,
    }


def _fuzz(draw: Draw) -> dict[str, object]:
    channels, labels = draw.option("channels", 0, 1, 4), draw.size(6)
    return _problem(draw.size(16), draw.size(16), channels, draw, labels=labels)
