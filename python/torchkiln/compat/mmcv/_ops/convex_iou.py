"""`mmcv.ops.convex_iou`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import listed_errors
from torchkiln.compat.mmcv._ops._giou_ties import giou_gradient, has_tie
from torchkiln.ops.detection.convex_iou import _convex_giou

__all__ = ["convex_giou", "convex_iou"]


@listed_errors
def convex_giou(pointsets: Tensor, polygons: Tensor) -> tuple[Tensor, Tensor]:
    """`torchkiln.ops.convex_giou` with its gradient as a second result, and without autograd.

    Args:
        pointsets: (N, 18).
        polygons: (N, 8).

    Returns:
        (N,), and (N, 18): the gradient of each value with respect to its points. Where there is
        none, because points or corners are equal or three of them are on a line, what mmcv gives;
        but in a compiled or captured graph, which cannot look for such rows, the operator's choice.

    Differentiable: no. Waits for the device.
    """
    with torch.no_grad():
        giou, gradient = _convex_giou(pointsets, polygons)
        is_graph = torch.compiler.is_compiling() or (
            pointsets.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        if is_graph or len(pointsets) == 0:
            return giou, gradient
        for rows in has_tie(pointsets, polygons).nonzero().flatten().split(1024):
            if len(rows) > 0:
                peers = giou_gradient(pointsets[rows], polygons[rows])
                # Not what it makes of areas that are 0.
                gradient[rows] = torch.where(peers.isfinite(), peers, gradient[rows])
    return giou, gradient


@listed_errors
def convex_iou(pointsets: Tensor, polygons: Tensor) -> Tensor:
    """`torchkiln.ops.convex_iou`: (N, M) of pointsets (N, 18) and polygons (M, 8).

    Unknown to autograd.
    """
    return ops.convex_iou(pointsets.detach(), polygons.detach())
