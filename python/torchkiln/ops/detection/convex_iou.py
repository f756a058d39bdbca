"""Overlaps of the convex hulls of points with quadrilaterals."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator

__all__ = ["convex_giou", "convex_iou"]


def _fake(pointsets: Tensor, polygons: Tensor) -> Tensor:
    return pointsets.new_empty((pointsets.shape[0], polygons.shape[0]))


def _fake_giou(pointsets: Tensor, polygons: Tensor) -> tuple[Tensor, Tensor]:
    return pointsets.new_empty((pointsets.shape[0],)), pointsets.new_empty(pointsets.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


class _Scaled(torch.autograd.Function):
    """The gradient of `convex_giou` along `grad_giou`, which is not differentiable itself.

    It depends on the points, so that a derivative of it is refused and not taken for 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_giou: Tensor, gradient: Tensor, pointsets: Tensor) -> Tensor:
        return grad_giou[:, None] * gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "convex_giou: second derivatives are not implemented. "
            'Use torchkiln.backend("reference"), which torch differentiates itself'
        )


def _backward(ctx: Any, grad_giou: Tensor, _: Tensor | None = None) -> Tensor:
    result: Tensor = _Scaled.apply(grad_giou, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
    return result


# float32: a coordinate of 2000 has no fraction left in float16.
_convex_iou = operator("convex_iou", fake=_fake, autocast=torch.float32)
_convex_giou = operator(
    "convex_giou",
    fake=_fake_giou,
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)


def convex_iou(pointsets: Tensor, polygons: Tensor) -> Tensor:
    """Intersection over union of the convex hulls of nine points each and quadrilaterals.

    Args:
        pointsets: (N, 18), float16, bfloat16, float32 or float64; x, y of nine points in any unit.
        polygons: (M, 8), dtype and device of `pointsets`; x, y of four vertices, either way around,
            convex or not; their sides must not cross.

    Returns:
        (N, M), dtype of `pointsets`; from 0 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float64. A pair with an empty union has IoU 0. What has a coordinate that is not
        finite gives NaN.

    Source:
        Guo et al., "Beyond Bounding-Box: Convex-hull Feature Adaptation", 2021, section 3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import convex_iou
        >>> corners = torch.tensor([0.0, 0, 2, 0, 2, 2, 0, 2])
        >>> points = torch.cat([corners, torch.ones(10)])
        >>> convex_iou(points[None], (corners + torch.tensor([1.0, 0.0]).repeat(4))[None])
        tensor([[0.3333]])
    """
    return _convex_iou(pointsets, polygons)


def convex_giou(pointsets: Tensor, polygons: Tensor) -> Tensor:
    """Generalized IoU of the convex hulls of nine points each and quadrilaterals, row by row.

    The IoU, less the share of the convex hull around both that neither covers.

    Args:
        pointsets: (N, 18), float16, bfloat16, float32 or float64; x, y of nine points in any unit.
        polygons: (N, 8), dtype and device of `pointsets`; x, y of four vertices, either way around,
            convex or not; their sides must not cross.

    Returns:
        (N,), dtype of `pointsets`; from -1 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: pointsets. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float64. Points inside the hull get no gradient; of equal points the first one
        gets all of it. At a kink, where a side lies on a side of the polygon, the gradient is one
        between those of both directions. The polygons get none. Degenerate and infinite inputs as
        in `convex_iou`.

    Source:
        Rezatofighi et al., "Generalized Intersection over Union", 2019, algorithm 1.

    Example:
        >>> import torch
        >>> from torchkiln.ops import convex_giou
        >>> corners = torch.tensor([0.0, 0, 1, 0, 1, 1, 0, 1])
        >>> points = torch.cat([corners, torch.full((10,), 0.5)])
        >>> convex_giou(points[None], (corners + torch.tensor([3.0, 0.0]).repeat(4))[None])
        tensor([-0.5000])
    """
    return _convex_giou(pointsets, polygons)[0]
