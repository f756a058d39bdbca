"""Boxes around masks."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.ops._arguments import require_tensor, shape

__all__ = ["masks_to_boxes"]


def _ends(is_set: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position that is set, of each row; 0 and 0 in a row without one."""
    count = is_set.shape[1]
    place = torch.arange(count, device=is_set.device)
    first = torch.where(is_set, place, count).amin(1)
    last = torch.where(is_set, place, -1).amax(1)
    return first.where(last >= 0, 0), last.clamp(min=0)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The smallest box around what is set in each mask.

    Args:
        masks: (N, H, W), any dtype; a pixel is set where it is not 0.

    Returns:
        (N, 4), float32; x1, y1, x2, y2, the first and last column and row with a set pixel: x2 and
        y2 belong to the mask, so that a single pixel has x1 == x2. An empty mask gives 0, 0, 0, 0.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another shape.

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Note:
        No loop over masks, and nothing waits for the device.

    Source:
        Definitions of torchvision's function of this name.

    Example:
        >>> import torch
        >>> from torchkiln.ops import masks_to_boxes
        >>> masks = torch.zeros(2, 4, 5)
        >>> masks[0, 1:3, 2:5] = 1
        >>> masks_to_boxes(masks)
        tensor([[2., 1., 4., 2.],
                [0., 0., 0., 0.]])
    """
    require_tensor("masks_to_boxes", masks=masks)
    if masks.dim() != 3:
        raise ValueError(f"masks_to_boxes: masks must have shape (N, H, W); got {shape(masks)}")
    if masks.shape[1] == 0 or masks.shape[2] == 0:
        return torch.zeros((masks.shape[0], 4), device=masks.device)
    x1, x2 = _ends(masks.any(1).bool())
    y1, y2 = _ends(masks.any(2).bool())
    return torch.stack([x1, y1, x2, y2], 1).float()
