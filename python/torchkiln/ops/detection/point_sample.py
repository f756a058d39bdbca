"""Samples of feature maps at points, and points from one frame of reference to another."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from torchkiln._frame import deterministic_default
from torchkiln.ops._arguments import (
    cast_for_autocast,
    is_integer,
    is_number,
    require_choice,
    require_count,
    require_device,
    require_floating,
    require_last,
    require_number,
    require_pair,
    shape,
    widened,
)

__all__ = [
    "abs_img_point_to_rel_img_point",
    "generate_grid",
    "point_sample",
    "rel_roi_point_to_abs_img_point",
    "rel_roi_point_to_rel_img_point",
]

_MODES = {"bilinear": 0, "nearest": 1, "bicubic": 2}
_PADDING = {"zeros": 0, "border": 1, "reflection": 2}


def point_sample(
    input: Tensor,
    points: Tensor,
    align_corners: bool = False,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    deterministic: bool | None = None,
) -> Tensor:
    """Samples feature maps at points that are given in shares of the image.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64.
        points: (N, P, 2) or (N, H', W', 2), any of these dtypes; x, y from 0 to 1 inside the image.
        align_corners: whether 0 and 1 are the centres of the outer pixels, else their outer edges.
        mode: "bilinear", "nearest" or "bicubic".
        padding_mode: what is outside the image: "zeros", "border" or "reflection".
        deterministic: whether gradients have the same bits every time on CUDA, at more time and
            memory; None: as `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (N, C, P) or (N, C, H', W'), dtype of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, mode or padding, or two different devices.

    Differentiable: input, points. Deterministic: yes, but for the gradient of `input` on CUDA,
    where `deterministic` decides. Autocast: as without; features stay in their dtype, as in
    `roi_align`.

    Note:
        Positions are computed in float32 for the half types. A point that is not finite gives 0.

    Source:
        Kirillov et al., "PointRend", 2020; `torch.nn.functional.grid_sample`.

    Example:
        >>> import torch
        >>> from torchkiln.ops import point_sample
        >>> image = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> point_sample(image, torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))
        tensor([[[1.5000, 2.0000]]])
    """
    _check_sample(input, points, mode, padding_mode)
    if not isinstance(align_corners, bool):
        raise TypeError(f"point_sample: align_corners must be a bool; got {align_corners!r}")
    is_list = points.dim() == 3
    places = points[:, :, None] if is_list else points
    if 0 in (input.shape[2], input.shape[3]) or input.shape[1] == 0:
        result = input.sum((2, 3))[:, :, None, None].expand(-1, -1, *places.shape[1:3])
        return result.squeeze(3) if is_list else result
    features = widened(input)
    places = places.to(features.dtype)
    is_finite = places.isfinite().all(-1, keepdim=True)
    places = torch.where(is_finite, places, 0.5)
    if features.is_cuda and deterministic_default(deterministic):
        result = _gathered(features, places, mode, padding_mode, align_corners)
    else:
        result = grid_sample(features, 2 * places - 1, mode, padding_mode, align_corners)
    result = torch.where(is_finite.movedim(-1, 1), result, 0.0).to(input.dtype)
    return result.squeeze(3) if is_list else result


def _check_sample(input: Tensor, points: Tensor, mode: str, padding_mode: str) -> None:
    op = "point_sample"
    require_choice(op, "mode", mode, _MODES)
    require_choice(op, "padding_mode", padding_mode, _PADDING)
    require_floating(op, input=input, points=points)
    if input.dim() != 4:
        raise ValueError(f"{op}: input must have shape (N, C, H, W); got {shape(input)}")
    if points.dim() not in (3, 4) or points.shape[-1] != 2:
        raise ValueError(
            f"{op}: points must have shape (N, P, 2) or (N, H, W, 2); got {shape(points)}"
        )
    if points.shape[0] != input.shape[0]:
        raise ValueError(
            f"{op}: points must have the batch size of input ({input.shape[0]}); "
            f"got {points.shape[0]}"
        )
    require_device(op, input=input, points=points)


def _gathered(
    features: Tensor, places: Tensor, mode: str, padding_mode: str, align_corners: bool
) -> Tensor:
    """`grid_sample` whose gradient torch sums in one order: that of indexing, which it sorts."""
    rows, columns = features.shape[2:]
    x, y = places.unbind(-1)
    along_x = _taps(x, columns, mode, padding_mode, align_corners)
    along_y = _taps(y, rows, mode, padding_mode, align_corners)
    image = torch.arange(features.shape[0], device=features.device)[:, None, None]
    cells = features.permute(0, 2, 3, 1)
    total = features.new_zeros((*x.shape, features.shape[1]))
    for (row, share_y), (column, share_x) in itertools.product(along_y, along_x):
        is_inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        y_cell, x_cell = row.clamp(0, rows - 1).long(), column.clamp(0, columns - 1).long()
        # Both, lest a NaN that is not taken spoils the gradient of its share.
        taken = torch.where(is_inside[..., None], cells[image, y_cell, x_cell], 0.0)
        share = torch.where(is_inside, share_y * share_x, 0.0)
        total = total + taken * share[..., None]
    return total.movedim(-1, 1)


def _taps(
    share: Tensor, count: int, mode: str, padding_mode: str, align_corners: bool
) -> list[tuple[Tensor, Tensor]]:
    """Numbers of the pixels of an axis that its points take, and weights."""
    place = share * (count - 1) if align_corners else share * count - 0.5
    if mode != "bicubic":
        place = _moved_inside(place, count, padding_mode, align_corners)
    if mode == "nearest":
        return [(place.detach().round(), 1 + 0 * place)]
    first = place.detach().floor()
    if mode == "bilinear":
        return [(first, first + 1 - place), (first + 1, place - first)]
    pixels = [first + i for i in (-1, 0, 1, 2)]
    return [
        (_moved_inside(pixel, count, padding_mode, align_corners), _cubic((place - pixel).abs()))
        for pixel in pixels
    ]


def _cubic(distance: Tensor) -> Tensor:
    """The weight of a pixel up to 2 away; torch has -0.75 for the free number."""
    free = -0.75
    near = ((free + 2) * distance - (free + 3)) * distance.square() + 1
    far = free * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance <= 1, near, far)


def _moved_inside(place: Tensor, count: int, padding_mode: str, align_corners: bool) -> Tensor:
    if padding_mode == "zeros":
        return place
    if padding_mode == "reflection":
        low, span = (0.0, count - 1) if align_corners else (-0.5, count)
        away = (place - low).abs()
        turns = (away / max(span, 1)).floor()
        rest = away - turns * span
        place = low + torch.where(turns % 2 == 0, rest, span - rest)
    return place.clamp(0, count - 1)


def generate_grid(
    num_grid: int, size: tuple[int, int], device: torch.device | str | None = None
) -> Tensor:
    """The centres of a grid's cells, in shares of the grid.

    Args:
        num_grid: how many times the grid is returned.
        size: (height, width), cells.
        device: of the result.

    Returns:
        (num_grid, height * width, 2), float32; x, y from 0 to 1, row by row. One grid in memory.

    Raises:
        ValueError: for a negative number or size.

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Source:
        Kirillov et al., "PointRend", 2020.

    Example:
        >>> from torchkiln.ops import generate_grid
        >>> generate_grid(1, (1, 2))
        tensor([[[0.2500, 0.5000],
                 [0.7500, 0.5000]]])
    """
    require_count("generate_grid", num_grid=num_grid)
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(is_integer(side) and side >= 0 for side in size)
    ):
        raise ValueError(f"generate_grid: size must be two integers, both at least 0; got {size!r}")
    height, width = size
    # Rounded once: on a GPU torch divides by a number by multiplying with its rounded inverse.
    y, x = (
        ((torch.arange(count, device=device, dtype=torch.float64) + 0.5) / max(count, 1)).float()
        for count in (height, width)
    )
    cells = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
    return cells.reshape(1, height * width, 2).expand(num_grid, -1, -1)


def rel_roi_point_to_abs_img_point(rois: Tensor, rel_roi_points: Tensor) -> Tensor:
    """Points in shares of their regions as positions in the image.

    Args:
        rois: (N, 4) x1, y1, x2, y2 or (N, 5) with a leading batch index; floating.
        rel_roi_points: (N, P, 2), dtype and device of `rois`; x, y from 0 to 1 inside the region.

    Returns:
        (N, P, 2), dtype of `rois`, in its unit.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: rois, rel_roi_points. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 for the half types. mmcv's has no gradient.

    Source:
        Kirillov et al., "PointRend", 2020.

    Example:
        >>> import torch
        >>> from torchkiln.ops import rel_roi_point_to_abs_img_point
        >>> rois = torch.tensor([[0.0, 10.0, 20.0, 14.0, 22.0]])
        >>> rel_roi_point_to_abs_img_point(rois, torch.tensor([[[0.5, 1.0]]]))
        tensor([[[12., 22.]]])
    """
    rois, rel_roi_points = cast_for_autocast(rois, rel_roi_points)
    return _in_image("rel_roi_point_to_abs_img_point", rois, rel_roi_points).to(rois.dtype)


def _in_image(op: str, rois: Tensor, points: Tensor) -> Tensor:
    require_floating(op, rois=rois)
    require_last(op, 2, rel_roi_points=points)
    if rois.dim() != 2 or rois.shape[1] not in (4, 5):
        raise ValueError(f"{op}: rois must have shape (N, 4) or (N, 5); got {shape(rois)}")
    if points.dim() != 3 or points.shape[0] != rois.shape[0]:
        raise ValueError(
            f"{op}: rel_roi_points must have shape ({rois.shape[0]}, P, 2); got {shape(points)}"
        )
    require_pair(op, rois=rois, rel_roi_points=points)
    first, last = widened(rois)[:, None, -4:].split(2, -1)
    result: Tensor = first + widened(points) * (last - first)
    return result


def abs_img_point_to_rel_img_point(
    abs_img_points: Tensor, img: tuple[int, int] | Tensor, spatial_scale: float = 1.0
) -> Tensor:
    """Positions in the image as shares of it.

    Args:
        abs_img_points: (N, P, 2), floating; x, y.
        img: (height, width), or a tensor (N, C, H, W) of which the size counts.
        spatial_scale: size of `img` over that of the image of the positions.

    Returns:
        (N, P, 2), dtype of `abs_img_points`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape.

    Differentiable: abs_img_points. Deterministic: yes. Autocast: float32.

    Source:
        Kirillov et al., "PointRend", 2020.

    Example:
        >>> import torch
        >>> from torchkiln.ops import abs_img_point_to_rel_img_point
        >>> abs_img_point_to_rel_img_point(torch.tensor([[[12.0, 22.0]]]), (40, 80))
        tensor([[[0.1500, 0.5500]]])
    """
    op = "abs_img_point_to_rel_img_point"
    require_last(op, 2, abs_img_points=abs_img_points)
    (abs_img_points,) = cast_for_autocast(abs_img_points)
    points = _to_shares(op, widened(abs_img_points), img, spatial_scale)
    return points.to(abs_img_points.dtype)


def _to_shares(
    op: str, points: Tensor, img: tuple[int, int] | Tensor, spatial_scale: float
) -> Tensor:
    if isinstance(img, Tensor):
        if img.dim() != 4:
            raise ValueError(f"{op}: img must have shape (N, C, H, W); got {shape(img)}")
        height, width = img.shape[2:]
    elif (
        isinstance(img, (tuple, list))
        and len(img) == 2
        and all(is_number(side) and side >= 0 for side in img)
    ):
        height, width = img
    else:
        raise ValueError(
            f"{op}: img must be (height, width), both at least 0, or a tensor; got {img!r}"
        )
    require_number(op, spatial_scale=spatial_scale)
    x, y = points.unbind(-1)
    return torch.stack([x * spatial_scale / width, y * spatial_scale / height], -1)


def rel_roi_point_to_rel_img_point(
    rois: Tensor,
    rel_roi_points: Tensor,
    img: tuple[int, int] | Tensor,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Points in shares of their regions as shares of the image.

    Args:
        rois: (N, 4) x1, y1, x2, y2 or (N, 5) with a leading batch index; floating.
        rel_roi_points: (N, P, 2), dtype and device of `rois`; x, y from 0 to 1 inside the region.
        img: (height, width), or a tensor (N, C, H, W) of which the size counts.
        spatial_scale: size of `img` over that of the image of the regions.

    Returns:
        (N, P, 2), dtype of `rois`.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: rois, rel_roi_points. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 for the half types. mmcv's has no gradient.

    Source:
        Kirillov et al., "PointRend", 2020.

    Example:
        >>> import torch
        >>> from torchkiln.ops import rel_roi_point_to_rel_img_point
        >>> rois = torch.tensor([[0.0, 10.0, 20.0, 14.0, 22.0]])
        >>> rel_roi_point_to_rel_img_point(rois, torch.tensor([[[0.5, 1.0]]]), (40, 80))
        tensor([[[0.1500, 0.5500]]])
    """
    op = "rel_roi_point_to_rel_img_point"
    rois, rel_roi_points = cast_for_autocast(rois, rel_roi_points)
    points = _to_shares(op, _in_image(op, rois, rel_roi_points), img, spatial_scale)
    return points.to(rois.dtype)
