"""`mmcv.ops.diff_iou_rotated`: the overlaps, and the steps that users of mmcv take one by one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors

__all__ = [
    "SortVertices",
    "box1_in_box2",
    "box2corners",
    "box_in_box",
    "box_intersection",
    "build_vertices",
    "calculate_area",
    "diff_iou_rotated_2d",
    "diff_iou_rotated_3d",
    "oriented_box_intersection_2d",
    "sort_indices",
]

_CORNERS = 4
_PLACES = 9  # vertices of what two rectangles share, and the first one again


@listed_errors
def diff_iou_rotated_2d(box1: Tensor, box2: Tensor) -> Tensor:
    """`torchkiln.ops.diff_iou_rotated_2d` of (B, N, 5)."""
    return ops.diff_iou_rotated_2d(box1, box2)


@listed_errors
def diff_iou_rotated_3d(box3d1: Tensor, box3d2: Tensor) -> Tensor:
    """`torchkiln.ops.diff_iou_rotated_3d` of (B, N, 7)."""
    return ops.diff_iou_rotated_3d(box3d1, box3d2)


def box2corners(box: Tensor) -> Tensor:
    """Corners (B, N, 4, 2) of boxes (B, N, 5), from the one at (w / 2, h / 2) on."""
    center, size, angle = box.split([2, 2, 1], -1)
    signs = box.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    x, y = (size[..., None, :] / 2 * signs).unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    turned = torch.stack([x * cosine - y * sine, x * sine + y * cosine], -1)
    corners: Tensor = center[..., None, :] + turned
    return corners


def _cross(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return product


def box_intersection(corners1: Tensor, corners2: Tensor) -> tuple[Tensor, Tensor]:
    """Where each side of one box crosses each of the other, ends left out.

    Args:
        corners1: (B, N, 4, 2).
        corners2: alike.

    Returns:
        (B, N, 4, 4, 2), 0 where they do not cross, and (B, N, 4, 4): where they do.
    """
    start1, start2 = corners1[..., :, None, :], corners2[..., None, :, :]
    along1 = corners1.roll(-1, -2)[..., :, None, :] - start1
    along2 = corners2.roll(-1, -2)[..., None, :, :] - start2
    base, apart = _cross(along1, along2), start2 - start1
    is_parallel = base == 0
    safe = torch.where(is_parallel, torch.ones_like(base), base)
    share1, share2 = _cross(apart, along2) / safe, _cross(apart, along1) / safe
    crosses = ~is_parallel & (share1 > 0) & (share1 < 1) & (share2 > 0) & (share2 < 1)
    points = start1 + share1[..., None] * along1
    return torch.where(crosses[..., None], points, torch.zeros_like(points)), crosses


def box1_in_box2(corners1: Tensor, corners2: Tensor) -> Tensor:
    """Which corners (B, N, 4) of the first box are in the second one, or on its border."""
    origin = corners2[..., :1, :]
    inside = torch.ones_like(corners1[..., 0], dtype=torch.bool)
    for neighbour in (1, _CORNERS - 1):
        side = corners2[..., neighbour : neighbour + 1, :] - origin
        share = ((corners1 - origin) * side).sum(-1) / side.square().sum(-1)
        inside = inside & (share > -1e-6) & (share < 1 + 1e-6)
    return inside


def box_in_box(corners1: Tensor, corners2: Tensor) -> tuple[Tensor, Tensor]:
    """`box1_in_box2`, and the other way around."""
    return box1_in_box2(corners1, corners2), box1_in_box2(corners2, corners1)


def build_vertices(
    corners1: Tensor,
    corners2: Tensor,
    c1_in_2: Tensor,
    c2_in_1: Tensor,
    intersections: Tensor,
    valid_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """All candidates for vertices (B, N, 24, 2), and which of them are some (B, N, 24)."""
    vertices = torch.cat([corners1, corners2, intersections.flatten(2, 3)], 2)
    return vertices, torch.cat([c1_in_2, c2_in_1, valid_mask.flatten(2)], 2)


def _sort(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """Rows of the vertices by their angle around 0, the first one again, and then padding.

    Args:
        vertices: (B, N, 24, 2).
        mask: (B, N, 24).
        num_valid: (B, N), how many are set.

    Returns:
        (B, N, 9) int32. Padding is the first crossing that is none; with fewer than three
        vertices there is nothing else.
    """
    mask = mask.bool()
    angle = torch.atan2(vertices[..., 1], vertices[..., 0])
    angle = torch.where(angle < 0, angle + 2 * math.pi, angle)
    order = angle.masked_fill(~mask, math.inf).argsort(dim=-1, stable=True)[..., :_PLACES]
    free = mask[..., 2 * _CORNERS :].long().argmin(-1, keepdim=True) + 2 * _CORNERS
    count = num_valid.long().clamp(max=_PLACES - 1)[..., None]
    place = torch.arange(_PLACES, device=vertices.device)
    closed = torch.where(place == count, order[..., :1], order)
    rows = torch.where((place <= count) & (count >= 3), closed, free)
    return rows.to(torch.int32)


SortVertices = function_class("SortVertices", _sort)


def sort_indices(vertices: Tensor, mask: Tensor) -> Tensor:
    """`SortVertices` around the mean of those that are set: (B, N, 9) int64."""
    count = mask.sum(2)
    middle = (vertices * mask[..., None]).sum(2, keepdim=True) / count[..., None, None]
    return _sort((vertices - middle).detach(), mask, count).long()


def calculate_area(idx_sorted: Tensor, vertices: Tensor) -> tuple[Tensor, Tensor]:
    """Area (B, N) of the polygon whose vertices (B, N, 9, 2) the rows name, and these."""
    chosen = vertices.gather(2, idx_sorted[..., None].expand(-1, -1, -1, 2))
    return _cross(chosen[:, :, :-1], chosen[:, :, 1:]).sum(2).abs() / 2, chosen


def oriented_box_intersection_2d(corners1: Tensor, corners2: Tensor) -> tuple[Tensor, Tensor]:
    """The area that boxes share (B, N), and the vertices of it (B, N, 9, 2), padded with 0.

    Args:
        corners1: (B, N, 4, 2).
        corners2: alike.

    Note:
        `diff_iou_rotated_2d` does not go this way: it is one kernel.
    """
    points, crosses = box_intersection(corners1, corners2)
    inside = box_in_box(corners1, corners2)
    vertices, mask = build_vertices(corners1, corners2, *inside, points, crosses)
    return calculate_area(sort_indices(vertices, mask), vertices)
