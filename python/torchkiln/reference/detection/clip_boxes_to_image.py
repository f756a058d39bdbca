"""clip_boxes_to_image in plain PyTorch: coordinate by coordinate, the border where it is beyond."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = ["clip_boxes_to_image"]


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Moves coordinates outside an image to its border.

    Args:
        boxes: (..., 4) x1, y1, x2, y2.
        size: (height, width).

    Returns:
        (..., 4).
    """
    height, width = size
    columns = []
    for value, most in zip(boxes.unbind(-1), (width, height, width, height), strict=True):
        value = torch.where(value < 0, 0.0, value)
        columns.append(torch.where(value > most, float(most), value))
    return torch.stack(columns, -1)


def parity() -> Parity:
    """What clip_boxes_to_image is tried on."""
    return Parity(
        op="clip_boxes_to_image",
        tier="X",
        differentiable=("boxes",),
        function="clip_boxes_to_image",
        reference=clip_boxes_to_image,
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _problem(2 * new.boxes(33) - 40, (48, 64))),
            Case("inside", lambda new: _problem(new.boxes(9), (200, 100))),
            Case("single", lambda new: _problem(new.boxes(1), (20, 30))),
            Case("no_boxes", lambda new: _problem(new.boxes(0), (20, 30))),
            Case("no_image", lambda new: _problem(new.boxes(3) + 1, (0, 0))),
            Case("images", lambda new: _problem(new.boxes(6).reshape(2, 3, 4), (20, 30))),
            Case("not_finite", _not_finite, gradient=False),
        ),
    )


def _problem(boxes: Tensor, size: tuple[int, int]) -> dict[str, object]:
    return {"boxes": boxes, "size": size}


def _not_finite(new: Inputs) -> dict[str, object]:
    boxes = new.boxes(4)
    boxes[0, 1], boxes[1, 2], boxes[2, 0] = math.nan, math.inf, -math.inf
    return _problem(boxes, (20, 30))


def _fuzz(draw: Draw) -> dict[str, object]:
    return _problem(draw.boxes(draw.size()) - 20, (draw.size(60), draw.size(60)))
