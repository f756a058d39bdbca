"""`mmcv.ops.convex_iou`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import listed_errors
from torchkiln.ops.detection.convex_iou import _convex_giou

__all__ = ["convex_giou", "convex_iou"]


@listed_errors
def convex_giou(pointsets: Tensor, polygons: Tensor) -> tuple[Tensor, Tensor]:
    """`torchkiln.ops.convex_giou` with its gradient as a second result, and without autograd.

    Args:
        pointsets: (N, 18).
        polygons: (N, 8).

    Returns:
        (N,), and (N, 18): the gradient of each value with respect to its points.
    """
    with torch.no_grad():
        return _convex_giou(pointsets, polygons)


@listed_errors
def convex_iou(pointsets: Tensor, polygons: Tensor) -> Tensor:
    """`torchkiln.ops.convex_iou`: (N, M) of pointsets (N, 18) and polygons (M, 8).

    Unknown to autograd.
    """
    return ops.convex_iou(pointsets.detach(), polygons.detach())
