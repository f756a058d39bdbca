"""Areas of boxes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln.ops._arguments import require_choice, require_last, widened

__all__ = ["box_area"]

_FORMS = {"xyxy": 4, "xywh": 4, "cxcywh": 4}


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """Area of each box.

    Args:
        boxes: (..., 4), float16, bfloat16, float32 or float64.
        fmt: notation of `boxes`, "xyxy", "xywh" or "cxcywh"; see `box_convert`.

    Returns:
        (...), dtype of `boxes`, but float32 for the half types: float16 ends at a side of 256.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or notation.

    Differentiable: boxes. Deterministic: yes. Autocast: as without.

    Note:
        A box with x2 < x1 or y2 < y1, or with a negative size, is empty and has area 0, as in
        `box_iou`.

    Source:
        Definitions of torchvision's function of this name.

    Example:
        >>> import torch
        >>> from torchkiln.ops import box_area
        >>> box_area(torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, 3.0, 2.0, 2.0]]))
        tensor([18.,  0.])
    """
    require_choice("box_area", "fmt", fmt, _FORMS)
    require_last("box_area", 4, boxes=boxes)
    first, last = widened(boxes).split(2, -1)
    size = last - first if fmt == "xyxy" else last
    width, height = size.clamp(min=0).unbind(-1)  # the gradient of prod waits for the GPU
    area: Tensor = width * height
    return area
