"""box_convert in plain PyTorch: every notation is four corners, complex numbers, and an angle."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = ["box_convert"]

_UPRIGHT = ("xyxy", "xywh", "cxcywh")
_ROTATED = ("xywhr", "cxcywhr", "xyxyxyxy")


def _read(boxes: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Corners (..., 4) in the order of "xyxyxyxy", and the angle in degrees."""
    if form == "xyxyxyxy":
        # Rounded corners make no rectangle: the upper edge and the length of the right one count.
        x, y = boxes[..., :2].unbind(-1)
        upper, right = torch.complex(boxes[..., 0::2], boxes[..., 1::2]).diff()[..., :2].unbind(-1)
        width, height, angle = upper.abs(), right.abs(), -torch.rad2deg(upper.angle())
    else:
        x, y, width, height = boxes[..., :4].unbind(-1)
        angle = boxes[..., 4] if form.endswith("r") else torch.zeros_like(x)
    if form == "xyxy":
        width, height = width - x, height - y
    turn = torch.polar(torch.ones_like(angle), -torch.deg2rad(angle))
    shift = 0.5 if form.startswith("c") else 0.0
    horizontal, vertical = (torch.tensor(row).to(x) - shift for row in ([0, 1, 1, 0], [0, 0, 1, 1]))
    offset = torch.complex(width[..., None] * horizontal, height[..., None] * vertical)
    return torch.complex(x, y)[..., None] + turn[..., None] * offset, angle


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Boxes in another notation.

    Args:
        boxes: (..., 4), (..., 5) or (..., 8).
        in_fmt: "xyxy", "xywh", "cxcywh", "xywhr", "cxcywhr" or "xyxyxyxy".
        out_fmt: one of the first three for one of them, else one of the last three.

    Returns:
        (..., 4), (..., 5) or (..., 8).
    """
    if in_fmt == out_fmt:
        return boxes.clone()
    corners, angle = _read(boxes, in_fmt)
    if out_fmt == "xyxyxyxy":
        return torch.view_as_real(corners).flatten(-2)
    first, third = corners[..., 0], corners[..., 2]
    place = corners[..., 0::2].mean(-1) if out_fmt.startswith("c") else first
    if out_fmt == "xyxy":
        return torch.stack([first.real, first.imag, third.real, third.imag], -1)
    turn = torch.polar(torch.ones_like(angle), torch.deg2rad(angle))
    size = (third - first) * turn
    columns = [place.real, place.imag, size.real, size.imag]
    return torch.stack([*columns, angle] if out_fmt.endswith("r") else columns, -1)


def parity() -> Parity:
    """What box_convert is tried on."""
    pairs = [(a, b) for forms in (_UPRIGHT, _ROTATED) for a in forms for b in forms]
    return Parity(
        op="box_convert",
        tier="A",
        differentiable=("boxes",),
        function="box_convert",
        reference=box_convert,
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _problem("xywhr", "xyxyxyxy", 9, new)),
            *(Case(f"{a}_to_{b}", functools.partial(_problem, a, b, 7)) for a, b in pairs),
            Case("single", lambda new: _problem("xyxyxyxy", "cxcywhr", 1, new)),
            Case("no_boxes", lambda new: _problem("xyxy", "cxcywh", 0, new)),
            Case("beyond_a_turn", lambda new: _turned(new, 400.0)),
            Case("grid", lambda new: {**_problem("xyxy", "xywh", 0, new), "boxes": _grid(new)}),
            Case("points", _points, gradient=False),
        ),
    )


def _problem(in_fmt: str, out_fmt: str, count: int, new: Inputs) -> dict[str, object]:
    boxes = new.boxes(count)
    if in_fmt in _ROTATED:
        size = new.uniform(count, 2, low=1.0, high=50.0)
        angle = new.uniform(count, 1, low=-170.0, high=170.0)
        boxes = torch.cat([boxes[:, :2], size, angle], 1)
        boxes = box_convert(boxes, "xywhr", "xyxyxyxy") if in_fmt == "xyxyxyxy" else boxes
    return {"boxes": boxes, "in_fmt": in_fmt, "out_fmt": out_fmt}


def _turned(new: Inputs, angle: float) -> dict[str, object]:
    problem = _problem("cxcywhr", "xywhr", 4, new)
    boxes = torch.cat([new.boxes(4), torch.full((4, 1), angle, dtype=torch.float64)], 1)
    return {**problem, "boxes": boxes}


def _grid(new: Inputs) -> Tensor:
    return new.boxes(6).reshape(2, 3, 4)


def _points(new: Inputs) -> dict[str, object]:
    """Boxes of no size."""
    boxes = new.uniform(3, 1, high=9).expand(3, 8)
    return {"boxes": boxes, "in_fmt": "xyxyxyxy", "out_fmt": "xywhr"}


def _fuzz(draw: Draw) -> dict[str, object]:
    draw.undefined("special")  # complex corners mix x and y
    forms = draw.option("kind of boxes", _UPRIGHT, _ROTATED)
    in_fmt, out_fmt = draw.option("in_fmt", *forms), draw.option("out_fmt", *forms)
    columns = {"xyxyxyxy": 8, "xywhr": 5, "cxcywhr": 5}.get(in_fmt, 4)
    boxes = draw.boxes(draw.size())
    rest = draw.values(boxes.shape[0], columns - 4) * 30
    return {"boxes": torch.cat([boxes, rest], 1), "in_fmt": in_fmt, "out_fmt": out_fmt}
