"""Overlap of rotated boxes, row by row, in plain PyTorch: autograd gives its gradient."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from torchkiln.reference.detection.box_iou_rotated import (
    common_area,
    common_height,
    facing,
    ratio,
    rectangles,
    uprights,
)
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["diff_iou_rotated"]


def diff_iou_rotated(boxes1: Tensor, boxes2: Tensor, space: bool = False) -> Tensor:
    """Intersection over union of each row with its partner.

    Args:
        boxes1: (..., 5) x, y, w, h, angle; in space (..., 7) x, y, z, w, h, l, angle.
        boxes2: (..., same).
        space: whether the rows are boxes in space.

    Returns:
        (...), dtype of `boxes1`.
    """
    wide = torch.promote_types(boxes1.dtype, torch.float32)
    a, b = boxes1.to(wide), boxes2.to(wide)
    width = 3 if space else 2

    def size(boxes: Tensor) -> Tensor:
        sides = boxes[..., width : 6 if space else 4].clamp(min=0)
        return torch.stack(sides.unbind(-1)).prod(0)

    columns = [0, 1, 3, 4, 6] if space else [0, 1, 2, 3, 4]
    common = common_area(*facing(a[..., columns], b[..., columns]))
    if space:
        common = common * common_height(a, b)
    finite = a.isfinite().all(-1) & b.isfinite().all(-1)
    value = ratio(common, size(a) + size(b) - common)
    return torch.where(finite, value, math.nan).to(boxes1.dtype)


_FLAT, _SPACE = ("diff_iou_rotated_2d",), ("diff_iou_rotated_3d",)


def _pair(boxes1: Tensor, boxes2: Tensor) -> dict[str, Tensor]:
    return {"boxes1": boxes1, "boxes2": boxes2}


def _near(boxes: Tensor, new: Inputs) -> Tensor:
    """Boxes a little off: what a loss compares."""
    return boxes * new.uniform(*boxes.shape, low=0.9, high=1.1)


def _matched(new: Inputs, *shape: int, space: bool = False) -> dict[str, Tensor]:
    rows = (uprights if space else rectangles)(new, math.prod(shape))
    boxes = rows.reshape(*shape, rows.shape[-1])
    return _pair(boxes, _near(boxes, new))


def _degenerate() -> Tensor:
    """A square, a point, a line, negative sides, a square that touches the first."""
    rows = [[0, 0, 4, 4], [2, 2, 0, 0], [0, 0, 4, 0], [0, 0, -4, 4], [4, 0, 4, 4]]
    return torch.cat([torch.tensor(rows, dtype=torch.float64), torch.zeros(5, 1)], 1)


def _against_a_square(rows: Tensor) -> dict[str, Tensor]:
    square = torch.tensor([0, 0, 4, 4, 0], dtype=torch.float64)
    return _pair(rows, square.expand(rows.shape).clone())


def _not_finite() -> Tensor:
    nan, inf = math.nan, math.inf
    rows = [[nan, 0, 5, 5, 0], [0, 0, 5, nan, 0], [0, 0, inf, 5, 0], [0, 0, 5, 5, inf]]
    return torch.tensor(rows, dtype=torch.float64)


def parity() -> Parity:
    """What the differentiable overlaps are tried on."""
    flat, space = partial(Case, functions=_FLAT), partial(Case, functions=_SPACE)
    return Parity(
        op="diff_iou_rotated",
        functions=_FLAT + _SPACE,
        tier="B",
        fuzz=_fuzz,
        differentiable=("boxes1", "boxes2"),
        cases=(
            flat("typical", lambda new: _matched(new, 37)),
            flat("batched", lambda new: _matched(new, 3, 43)),
            flat("any_pairs", lambda new: _pair(rectangles(new, 129), rectangles(new, 129))),
            flat("single", lambda new: _matched(new, 1)),
            flat("empty", lambda new: _matched(new, 2, 0)),
            flat("degenerate", lambda new: _against_a_square(_degenerate()), gradient=False),
            flat("not_finite", lambda new: _against_a_square(_not_finite()), gradient=False),
            space("typical_in_space", lambda new: _matched(new, 37, space=True)),
            space("batched_in_space", lambda new: _matched(new, 3, 43, space=True)),
            space("any_pairs_in_space", lambda new: _pair(uprights(new, 65), uprights(new, 65))),
            space("empty_in_space", lambda new: _matched(new, 0, space=True)),
        ),
        workloads=(
            # The loss of an oriented detector on the positive anchors of two images.
            Workload("aerial_loss", {"n": 512}, _aerial, _FLAT),
            Workload("street_loss", {"n": 512}, _street, _SPACE),
            Workload("dense_loss", {"n": 20_000}, _street, _SPACE),
        ),
    )


def _noisy(boxes: Tensor) -> dict[str, Tensor]:
    noise = scenes.normal(tuple(boxes.shape), scenes.SEED + 1)
    return _pair(boxes[None], (boxes * (1 + 0.05 * noise))[None])


def _aerial(sizes: Sizes) -> dict[str, Tensor]:
    return _noisy(scenes.rotated_boxes(sizes["n"], scenes.SEED))


def _street(sizes: Sizes) -> dict[str, Tensor]:
    return _noisy(scenes.cars(sizes["n"], scenes.SEED))


def _fuzz(draw: Draw) -> dict[str, Tensor]:
    count = draw.size(20)
    boxes1, boxes2 = (
        (draw.rotated if draw.function in _FLAT else draw.upright)(count) for _ in "12"
    )
    # Equal boxes have a kink.
    return _pair(boxes1, boxes2 if draw.kind == "plain" else draw.repeated(boxes2, boxes1))
