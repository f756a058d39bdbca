"""box_area in plain PyTorch: the corners' shoelace sum, nothing for corners in another order."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln.reference.detection.box_convert import box_convert
from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = ["box_area"]


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """Area of each box.

    Args:
        boxes: (..., 4).
        fmt: "xyxy", "xywh" or "cxcywh".

    Returns:
        (...); 0 for a box that ends before it begins.
    """
    x1, y1, x2, y2 = box_convert(boxes, fmt, "xyxy").unbind(-1)
    x, y = torch.stack([x1, x2, x2, x1], -1), torch.stack([y1, y1, y2, y2], -1)
    twice = (x * y.roll(-1, -1) - y * x.roll(-1, -1)).sum(-1)
    return torch.where((x2 < x1) | (y2 < y1), 0.0, twice / 2)


def parity() -> Parity:
    """What box_area is tried on."""
    return Parity(
        op="box_area",
        tier="A",
        differentiable=("boxes",),
        function="box_area",
        reference=box_area,
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: {"boxes": new.boxes(33)}),
            Case("xywh", lambda new: {"boxes": new.boxes(9), "fmt": "xywh"}),
            Case("cxcywh", lambda new: {"boxes": new.boxes(9), "fmt": "cxcywh"}),
            Case("single", lambda new: {"boxes": new.boxes(1)[0]}),
            Case("no_boxes", lambda new: {"boxes": new.boxes(0)}),
            Case("images", lambda new: {"boxes": new.boxes(8).reshape(1, 4, 2, 4)}),
            Case("exchanged", lambda new: {"boxes": -new.boxes(5)}),
            Case("large", lambda new: {"boxes": new.boxes(5, 2000.0)}),
            Case("nan", _nan, gradient=False),
        ),
    )


def _nan(new: Inputs) -> dict[str, object]:
    boxes = new.boxes(5)
    boxes[2, 1] = math.nan
    return {"boxes": boxes}


def _fuzz(draw: Draw) -> dict[str, object]:
    draw.undefined("special")  # corners bring NaN from the position into the size
    return {"boxes": draw.boxes(draw.size()), "fmt": draw.option("fmt", "xyxy", "xywh", "cxcywh")}
