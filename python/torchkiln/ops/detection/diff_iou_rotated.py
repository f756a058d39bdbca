"""Differentiable overlap of rotated rectangles and of upright boxes in space: one schema."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator

__all__ = ["diff_iou_rotated_2d", "diff_iou_rotated_3d"]


def _fake(boxes1: Tensor, boxes2: Tensor, space: bool = False) -> Tensor:
    return boxes1.new_empty(boxes1.shape[:-1])


def _fake_backward(
    grad_output: Tensor, boxes1: Tensor, boxes2: Tensor, space: bool
) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape), boxes2.new_empty(boxes2.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes1, boxes2, ctx.space = inputs
    ctx.save_for_backward(boxes1, boxes2)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    boxes1, boxes2 = ctx.saved_tensors
    return _diff_iou_rotated_backward(grad_output, boxes1, boxes2, ctx.space)


_diff_iou_rotated_backward = operator("_diff_iou_rotated_backward", fake=_fake_backward)
# float32, as box_iou_rotated.
_diff_iou_rotated = operator(
    "diff_iou_rotated",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)


def diff_iou_rotated_2d(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of each rotated rectangle with its partner, with a gradient.

    Args:
        boxes1: (..., 5), float16, bfloat16, float32 or float64; centre x and y, width, height,
            angle in radians, from x towards y.
        boxes2: shape, dtype and device of `boxes1`.

    Returns:
        (...), dtype of `boxes1`; from 0 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: boxes1, boxes2. Deterministic: yes. Autocast: float32.

    Note:
        Boxes that do not touch have a gradient of 0. Where sides coincide, the overlap has a kink:
        each box has half of them, so that the gradient of two equal boxes is 0. Degenerate boxes as
        in `box_iou_rotated`; a side below 0 has a gradient of 0.

    Source:
        Zhou et al., "IoU Loss for 2D/3D Object Detection", 2019.

    Example:
        >>> import torch
        >>> from torchkiln.ops import diff_iou_rotated_2d
        >>> a = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]], requires_grad=True)
        >>> b = torch.tensor([[1.0, 1.0, 2.0, 2.0, 0.0]])
        >>> iou = diff_iou_rotated_2d(a, b)
        >>> torch.autograd.grad(iou.sum(), a)
        (tensor([[0.1633, 0.1633, 0.0408, 0.0408, 0.0000]]),)
    """
    return _diff_iou_rotated(boxes1, boxes2, False)


def diff_iou_rotated_3d(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of each upright box with its partner, by volume, with a gradient.

    Args:
        boxes1: (..., 7), float16, bfloat16, float32 or float64; x, y, z of the centre, sizes w, h
            and l along x, y and z, angle in radians, from x towards y.
        boxes2: shape, dtype and device of `boxes1`.

    Returns:
        (...), dtype of `boxes1`; from 0 to 1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, or two different devices.

    Differentiable: boxes1, boxes2. Deterministic: yes. Autocast: float32.

    Note:
        Kinks and degenerate boxes as in `diff_iou_rotated_2d`.

    Source:
        Zhou et al., "IoU Loss for 2D/3D Object Detection", 2019.

    Example:
        >>> import torch
        >>> from torchkiln.ops import diff_iou_rotated_3d
        >>> a = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0]])
        >>> b = torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
        >>> diff_iou_rotated_3d(a, b)
        tensor([0.0667])
    """
    return _diff_iou_rotated(boxes1, boxes2, True)
