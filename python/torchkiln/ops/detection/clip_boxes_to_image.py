"""Boxes cut off at the border of their image."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln.ops._arguments import is_number, require_last, widened

__all__ = ["clip_boxes_to_image"]


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Moves coordinates outside an image to its border.

    Args:
        boxes: (..., 4), float16, bfloat16, float32 or float64; x1, y1, x2, y2 in pixels.
        size: (height, width) of the image, both at least 0.

    Returns:
        (..., 4), dtype of `boxes`; x from 0 to the width, y from 0 to the height.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or size.

    Differentiable: boxes; coordinates that were moved get no gradient. Deterministic: yes.
    Autocast: as without.

    Note:
        NaN stays NaN.

    Source:
        Definitions of torchvision's function of this name.

    Example:
        >>> import torch
        >>> from torchkiln.ops import clip_boxes_to_image
        >>> clip_boxes_to_image(torch.tensor([[-1.0, 2.0, 9.0, 3.0]]), (4, 6))
        tensor([[0., 2., 6., 3.]])
    """
    require_last("clip_boxes_to_image", 4, boxes=boxes)
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(is_number(side) and side >= 0 for side in size)
    ):
        raise ValueError(
            f"clip_boxes_to_image: size must be (height, width), both at least 0; got {size!r}"
        )
    # A side beyond the dtype, such as 70000 pixels for float16, is none to it.
    most = torch.finfo(boxes.dtype).max
    height, width = (side if side <= most else math.inf for side in size)
    # In float32 at least: autocast to the other half type refuses to stack half ones.
    wide = widened(boxes)
    x, y = wide[..., 0::2].clamp(0, width), wide[..., 1::2].clamp(0, height)
    return torch.stack([x, y], -1).flatten(-2).to(boxes.dtype)
