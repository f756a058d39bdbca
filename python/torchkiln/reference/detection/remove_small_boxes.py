"""remove_small_boxes in plain PyTorch: box by box."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = ["remove_small_boxes"]


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Finds the boxes whose sides both have a minimum length.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        min_size: what both sides must have at least.

    Returns:
        (K,) int64, ascending.
    """
    rows = [
        row
        for row, (x1, y1, x2, y2) in enumerate(boxes.tolist())
        if x2 - x1 >= min_size and y2 - y1 >= min_size  # never of a side that is NaN
    ]
    return torch.tensor(rows, dtype=torch.int64, device=boxes.device)


def parity() -> Parity:
    """What remove_small_boxes is tried on."""
    return Parity(
        op="remove_small_boxes",
        tier="X",
        function="remove_small_boxes",
        reference=remove_small_boxes,
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _problem(new, 65, 6.0)),
            Case("all", lambda new: _problem(new, 9, 0)),
            Case("none", lambda new: _problem(new, 9, math.inf)),
            Case("single", lambda new: _problem(new, 1, 1.0)),
            Case("no_boxes", lambda new: _problem(new, 0, 1.0)),
            Case("nan", _nan),
        ),
    )


def _problem(new: Inputs, count: int, min_size: float) -> dict[str, object]:
    """On quarters below 24, which every dtype holds exactly."""
    corner = new.integers(count, 2, high=32)
    size = new.integers(count, 2, high=64)
    return {"boxes": torch.cat([corner, corner + size], 1).double() / 4, "min_size": min_size}


def _nan(new: Inputs) -> dict[str, object]:
    problem = _problem(new, 9, -100.0)
    boxes = problem["boxes"]
    assert isinstance(boxes, Tensor)
    boxes[2, 1], boxes[5, 2], boxes[6, 0] = math.nan, math.nan, 20
    return problem


def _fuzz(draw: Draw) -> dict[str, object]:
    sizes = (0.0, -1.0, 12.5, 25.0, draw.number(0, 60))
    return {"boxes": draw.boxes(draw.size(40)), "min_size": draw.pick(*sizes)}
