"""The greatest sample along each of the four borders of a box."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops.detection._regions import keeps_winners, like
from torchkiln.ops.detection._sampled_roi import BORDER, gradient

__all__ = ["border_align"]


def _fake(
    input: Tensor,
    boxes: Tensor,
    pool_size: int,
    deterministic: bool = False,
    with_argmax: bool = True,
) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], input.shape[1] // 4, boxes.shape[1], 4)
    winners = like(input, shape, torch.int32) if with_argmax else None
    return like(input, shape), input.new_empty(0, dtype=torch.int32) if winners is None else winners


def _settings(pool_size: int, deterministic: bool, with_argmax: bool) -> tuple[Any, ...]:
    return 1.0, pool_size, False, False, 1, deterministic


_setup_context, _backward = gradient(BORDER, _settings)
_border_align = operator(
    "border_align", fake=_fake, setup_context=_setup_context, backward=_backward
)


def border_align(
    input: Tensor, boxes: Tensor, pool_size: int, *, deterministic: bool | None = None
) -> Tensor:
    """Takes, for each border of each box, the greatest of samples along it.

    Args:
        input: (N, 4 * C, H, W), blocks of C channels for the top, left, bottom and right border;
            float16, bfloat16, float32 or float64; contiguous or channels_last, other layouts are
            copied.
        boxes: (N, B, 4), any of these dtypes; x1, y1, x2, y2 in pixels of `input`, whose centres
            lie at whole numbers.
        pool_size: parts of a border, 1 to 1024; samples lie at their pool_size + 1 ends.
        deterministic: whether the gradient has the same bits every time on CUDA, where it is
            slower; None: as `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (N, C, B, 4), dtype of `input`; top, left, bottom and right of each box.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or pool_size, or channels that 4 does not divide.

    Differentiable: input. Deterministic: yes, but for the gradient on CUDA, where `deterministic`
    decides. Autocast: as without.

    Note:
        A sample up to a pixel outside takes the border's value; further out, or at a place that is
        not a number, it is 0 and gets no gradient. The first of several equal samples gets the
        gradient; NaN is greater than all.

    Source:
        Qiu et al., "BorderDet: Border Feature for Dense Object Detection", 2020, section 3.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import border_align
        >>> input = torch.arange(9.0).reshape(1, 1, 3, 3).expand(1, 4, 3, 3)
        >>> border_align(input, torch.tensor([[[0.0, 0.0, 2.0, 1.0]]]), 2)
        tensor([[[[2., 3., 5., 5.]]]])
    """
    output, _ = _border_align(
        input, boxes, pool_size, deterministic_default(deterministic), keeps_winners(input)
    )
    return output
