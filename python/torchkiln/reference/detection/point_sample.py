"""point_sample and the frames of points in plain PyTorch: a tent around every pixel."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = [
    "abs_img_point_to_rel_img_point",
    "generate_grid",
    "point_sample",
    "rel_roi_point_to_abs_img_point",
    "rel_roi_point_to_rel_img_point",
]


def _weights(share: Tensor, count: int, align_corners: bool, mode: str, padding: str) -> Tensor:
    """(..., count): weight of each pixel of an axis at these shares of it."""
    place = share * (count - 1) if align_corners else share * count - 0.5
    if padding == "border":
        place = torch.where(place < 0, 0.0, torch.where(place > count - 1, count - 1.0, place))
    pixels = torch.arange(count, device=share.device, dtype=share.dtype)
    if mode == "nearest":
        return (place.round()[..., None] == pixels).to(share)
    distance = (place[..., None] - pixels).abs()
    return torch.where(distance < 1, 1 - distance, 0.0)


def point_sample(
    input: Tensor,
    points: Tensor,
    align_corners: bool = False,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> Tensor:
    """Samples feature maps at points.

    Args:
        input: (N, C, H, W).
        points: (N, P, 2) or (N, H', W', 2), shares of the image.
        align_corners: whether 0 and 1 are the centres of the outer pixels.
        mode: "bilinear" or "nearest".
        padding_mode: "zeros" or "border".

    Returns:
        (N, C, P) or (N, C, H', W').
    """
    flat = points.flatten(1, -2).to(input)
    is_finite = flat.isfinite().all(-1, keepdim=True)
    x, y = torch.where(is_finite, flat, 0.0).unbind(-1)
    height, width = input.shape[2:]
    along_y = _weights(y, height, align_corners, mode, padding_mode) * is_finite
    along_x = _weights(x, width, align_corners, mode, padding_mode)
    sampled: Tensor = torch.einsum("nchw,nph,npw->ncp", input, along_y, along_x)
    return sampled.reshape(*input.shape[:2], *points.shape[1:-1])


def generate_grid(
    num_grid: int, size: tuple[int, int], device: torch.device | str | None = None
) -> Tensor:
    """The centres of a grid's cells: (num_grid, height * width, 2) float32, row by row."""
    height, width = size
    cells = [[(j + 0.5) / width, (i + 0.5) / height] for i in range(height) for j in range(width)]
    grid = torch.tensor(cells, dtype=torch.float32, device=device).reshape(1, height * width, 2)
    return grid.repeat(num_grid, 1, 1)


def rel_roi_point_to_abs_img_point(rois: Tensor, rel_roi_points: Tensor) -> Tensor:
    """Points (N, P, 2) in shares of regions (N, 4) or (N, 5) as positions in the image."""
    x1, y1, x2, y2 = rois[:, -4:, None].unbind(1)
    x, y = rel_roi_points.unbind(2)
    return torch.stack([x1 * (1 - x) + x2 * x, y1 * (1 - y) + y2 * y], 2)


def abs_img_point_to_rel_img_point(
    abs_img_points: Tensor, img: tuple[int, int] | Tensor, spatial_scale: float = 1.0
) -> Tensor:
    """Positions (N, P, 2) as shares of an image, a size or a tensor."""
    height, width = img.shape[2:] if isinstance(img, Tensor) else img
    sides = torch.tensor([width, height]).to(abs_img_points)
    return abs_img_points / (sides / spatial_scale)


def rel_roi_point_to_rel_img_point(
    rois: Tensor,
    rel_roi_points: Tensor,
    img: tuple[int, int] | Tensor,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Points (N, P, 2) in shares of regions as shares of the image."""
    positions = rel_roi_point_to_abs_img_point(rois, rel_roi_points)
    return abs_img_point_to_rel_img_point(positions, img, spatial_scale)


def parities() -> tuple[Parity, ...]:
    """What they are tried on."""
    return (
        Parity(
            op="point_sample",
            tier="A",
            differentiable=("input", "points"),
            function="point_sample",
            reference=point_sample,
            fuzz=_fuzz_sample,
            cases=(
                Case("typical", functools.partial(_sample, 2, 3, 7, 9, 11)),
                Case("aligned", functools.partial(_sample, 2, 3, 7, 9, 11, align_corners=True)),
                Case("border", functools.partial(_sample, 1, 3, 7, 9, 11, padding_mode="border")),
                Case("nearest", functools.partial(_nearest, 11), gradient=False),
                Case("grid", _sample_grid),
                Case("single", functools.partial(_sample, 1, 1, 1, 1, 1)),
                Case("no_points", functools.partial(_sample, 2, 3, 4, 5, 0)),
                Case("no_images", functools.partial(_sample, 0, 3, 4, 5, 6)),
                Case("not_finite", _not_finite, gradient=False),
            ),
        ),
        Parity(
            op="rel_roi_point_to_abs_img_point",
            tier="A",
            differentiable=("rois", "rel_roi_points"),
            function="rel_roi_point_to_abs_img_point",
            reference=rel_roi_point_to_abs_img_point,
            fuzz=_fuzz_regions,
            cases=_region_cases(),
        ),
        Parity(
            op="abs_img_point_to_rel_img_point",
            tier="A",
            differentiable=("abs_img_points",),
            function="abs_img_point_to_rel_img_point",
            reference=abs_img_point_to_rel_img_point,
            fuzz=_fuzz_positions,
            cases=(
                Case("typical", lambda new: _positions(new, 5, (30, 40))),
                Case("tensor", lambda new: _positions(new, 5, new.normal(1, 1, 30, 40))),
                Case("none", lambda new: _positions(new, 0, (30, 40))),
            ),
        ),
        Parity(
            op="rel_roi_point_to_rel_img_point",
            tier="A",
            differentiable=("rois", "rel_roi_points"),
            function="rel_roi_point_to_rel_img_point",
            reference=rel_roi_point_to_rel_img_point,
            fuzz=lambda draw: {**_fuzz_regions(draw), "img": (60, 100), "spatial_scale": 0.25},
            cases=_region_cases(img=(60, 100), spatial_scale=0.25),
        ),
    )


def _sample(
    images: int, channels: int, height: int, width: int, count: int, new: Inputs, **settings: object
) -> dict[str, object]:
    """Points also outside; on odd 128ths, where no mode has a kink."""
    step = 2 * new.integers(images, count, 2, low=-16, high=80) + 1
    points = step.double() / 128
    return {"input": new.normal(images, channels, height, width), "points": points, **settings}


def _nearest(count: int, new: Inputs) -> dict[str, object]:
    return _sample(1, 3, 7, 9, count, new, mode="nearest")


def _sample_grid(new: Inputs) -> dict[str, object]:
    problem = _sample(2, 3, 7, 9, 12, new)
    points = problem["points"]
    assert isinstance(points, Tensor)
    return {**problem, "points": points.reshape(2, 3, 4, 2)}


def _not_finite(new: Inputs) -> dict[str, object]:
    problem = _sample(1, 2, 5, 6, 9, new, padding_mode="border")
    points = problem["points"]
    assert isinstance(points, Tensor)
    points[0, 0, 0], points[0, 1, 1], points[0, 2] = math.nan, math.inf, -math.inf
    return problem


def _region_cases(**settings: object) -> tuple[Case, ...]:
    def problem(columns: int, count: int, points: int, new: Inputs) -> dict[str, object]:
        rois = torch.cat([new.integers(count, 1, high=3), new.boxes(count)], 1)[:, -columns:]
        return {"rois": rois, "rel_roi_points": new.uniform(count, points, 2), **settings}

    return (
        Case("typical", functools.partial(problem, 5, 7, 9)),
        Case("four_columns", functools.partial(problem, 4, 7, 9)),
        Case("single", functools.partial(problem, 5, 1, 1)),
        Case("no_regions", functools.partial(problem, 5, 0, 9)),
    )


def _positions(new: Inputs, count: int, img: tuple[int, int] | Tensor) -> dict[str, object]:
    return {"abs_img_points": new.uniform(count, 1, 2, high=40), "img": img, "spatial_scale": 0.5}


def _fuzz_sample(draw: Draw) -> dict[str, object]:
    images, channels = draw.size(3), draw.option("channels", 0, 1, 3)
    mode = draw.option("mode", "bilinear", "nearest")
    return {
        "input": draw.values(images, channels, draw.size(), draw.size(), special=False),
        "points": draw.values(images, draw.size(20), 2) * 0.5 + 0.5,
        "align_corners": draw.option("align_corners", False, True),
        "mode": mode,
        "padding_mode": draw.option("padding_mode", "zeros", "border"),
    }


def _fuzz_regions(draw: Draw) -> dict[str, object]:
    draw.undefined("special")  # 0 times infinity
    count, columns = draw.size(), draw.option("columns", 4, 5)
    rois = torch.cat([draw.integers(count, 1, high=3), draw.boxes(count)], 1)[:, -columns:]
    return {"rois": rois, "rel_roi_points": draw.values(count, draw.size(), 2)}


def _fuzz_positions(draw: Draw) -> dict[str, object]:
    points = draw.values(draw.size(), draw.size(), 2) * 20
    sizes = (draw.size(60, 1), draw.size(60, 1))
    return {"abs_img_points": points, "img": sizes, "spatial_scale": draw.pick(0.5, 1.0, 2.0)}
