"""Fakes of suppression operators: boxes, scores, a threshold of overlap and perhaps labels."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor


def fake_sized(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> Tensor:
    """Rows of the kept ones."""
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)


def fake_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Those in a result of fixed size, and how many they are."""
    indices = boxes.new_empty((max_output,), dtype=torch.int64)
    return indices, boxes.new_empty((), dtype=torch.int64)


def fake_groups(
    boxes: Tensor, scores: Tensor, iou_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows in order, the kept one of each, and how many are kept."""
    rows, groups = (scores.new_empty((scores.shape[0],), dtype=torch.int64) for _ in range(2))
    return rows, groups, scores.new_empty((), dtype=torch.int64)
