"""masks_to_boxes in plain PyTorch: mask by mask, from the list of its set pixels."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = ["masks_to_boxes"]


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The smallest box around what is set in each mask.

    Args:
        masks: (N, H, W).

    Returns:
        (N, 4) float32; 0, 0, 0, 0 for an empty mask.
    """
    boxes = torch.zeros((masks.shape[0], 4), device=masks.device)
    for box, mask in zip(boxes, masks, strict=True):
        pixels = mask.nonzero()
        if pixels.shape[0]:
            y, x = pixels.unbind(1)
            box.copy_(torch.stack([x.min(), y.min(), x.max(), y.max()]))
    return boxes


def parity() -> Parity:
    """What masks_to_boxes is tried on."""
    return Parity(
        op="masks_to_boxes",
        tier="X",
        function="masks_to_boxes",
        reference=masks_to_boxes,
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: {"masks": new.uniform(12, 9, 14) > 0.97}),
            Case("floating", lambda new: {"masks": new.uniform(3, 9, 14).sub(0.9).clamp(min=0)}),
            Case("integers", lambda new: {"masks": new.integers(4, 3, 5, low=-1, high=2)}),
            Case("bytes", lambda new: {"masks": new.integers(4, 3, 5, high=2).byte()}),
            Case("empty_masks", lambda new: {"masks": new.uniform(3, 4, 5) > 2}),
            Case("single", lambda new: {"masks": new.uniform(1, 1, 1) > -1}),
            Case("no_masks", lambda new: {"masks": new.uniform(0, 4, 5) > 0.5}),
            Case("no_rows", lambda new: {"masks": new.uniform(2, 0, 5) > 0.5}),
            Case("no_columns", lambda new: {"masks": new.uniform(2, 4, 0) > 0.5}),
            Case("nan", _nan),
        ),
    )


def _nan(new: Inputs) -> dict[str, object]:
    masks = torch.zeros(2, 6, 7, dtype=torch.float64)
    masks[1, 3, 4] = math.nan
    return {"masks": masks}


def _fuzz(draw: Draw) -> dict[str, object]:
    masks = draw.values(draw.size(6), draw.size(), draw.size())
    masks = torch.where(draw.uniform(*masks.shape) < draw.number(0.5, 1), 0.0, masks)
    return {"masks": masks.bool() if draw.option("bool", False, True) else masks}
