"""Rows of the boxes that are large enough."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln.ops._arguments import require_last, require_number, shape, widened

__all__ = ["remove_small_boxes"]


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Finds the boxes whose sides both have a minimum length.

    Args:
        boxes: (N, 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in any unit.
        min_size: what both sides must have at least; any number but NaN.

    Returns:
        (K,), int64; rows of such boxes in ascending order.

    Raises:
        TypeError: for another dtype, or a minimum that is no number.
        ValueError: for another shape, or a minimum that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Note:
        A box with a NaN coordinate is small. On CUDA the call waits for the size of its result.

    Source:
        Definitions of torchvision's function of this name.

    Example:
        >>> import torch
        >>> from torchkiln.ops import remove_small_boxes
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 1.0], [5.0, 0.0, 9.0, 4.0]])
        >>> remove_small_boxes(boxes, 2)
        tensor([0, 2])
    """
    require_last("remove_small_boxes", 4, boxes=boxes)
    if boxes.dim() != 2:
        raise ValueError(f"remove_small_boxes: boxes must have shape (N, 4); got {shape(boxes)}")
    require_number("remove_small_boxes", min_size=min_size)
    first, last = widened(boxes.detach()).split(2, 1)
    is_large: Tensor = (last - first >= min_size).all(1)
    return is_large.nonzero().squeeze(1)
