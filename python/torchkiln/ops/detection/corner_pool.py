"""Running maxima along one side of a feature map."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import require_choice
from torchkiln.ops.detection._regions import is_channels_last, like

__all__ = ["corner_pool"]

# Values of the schema's `mode`.
_MODES = {"top": 0, "bottom": 1, "left": 2, "right": 3}


# Places of a line whose maxima share a number; kWord of corner_pool.cpp.
_WORD = 32


def _fake(input: Tensor, mode: int, with_maxima: bool = False) -> tuple[Tensor, Tensor]:
    if not (with_maxima and input.is_cpu):  # only loops on the CPU keep any
        return like(input, input.shape), input.new_empty(0, dtype=torch.int32)
    n, c, h, w = input.shape
    words = (_words(h), w) if mode in (_MODES["top"], _MODES["bottom"]) else (h, _words(w))
    return like(input, input.shape), like(input, (n, c, *words), torch.int32)


def _words(length: int) -> int:
    return (length + _WORD - 1) // _WORD


def _fake_backward(grad_output: Tensor, input: Tensor, pooled: Tensor, mode: int) -> Tensor:
    return like(input, input.shape)


def _fake_backward_maxima(
    grad_output: Tensor, maxima: Tensor, mode: int, channels_last: bool
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        grad_output.shape,
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=layout,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, ctx.mode, with_maxima = inputs
    pooled, maxima = output
    ctx.mark_non_differentiable(maxima)
    # Nobody reads zeros for the maxima.
    ctx.set_materialize_grads(False)
    ctx.has_maxima = with_maxima and input.is_cpu
    if ctx.has_maxima:
        ctx.channels_last = is_channels_last(input)
        ctx.save_for_backward(maxima)
    else:
        ctx.save_for_backward(input, pooled)


def _backward(ctx: Any, grad_output: Tensor | None, _: None = None) -> Tensor | None:
    if grad_output is None:
        return None
    if ctx.has_maxima:
        (maxima,) = ctx.saved_tensors
        return _corner_pool_backward_maxima(grad_output, maxima, ctx.mode, ctx.channels_last)
    return _corner_pool_backward(grad_output, *ctx.saved_tensors, ctx.mode)


_corner_pool_backward = operator("_corner_pool_backward", fake=_fake_backward)
_corner_pool_backward_maxima = operator("_corner_pool_backward_maxima", fake=_fake_backward_maxima)
# Features stay in their dtype: a maximum loses nothing.
_corner_pool = operator("corner_pool", fake=_fake, setup_context=_setup_context, backward=_backward)


def corner_pool(input: Tensor, mode: str) -> Tensor:
    """The largest value from each cell on in one direction, to the border of the map.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            whatever else is copied.
        mode: "top" (of this cell and those below it: top corners see what lies under them),
            "bottom" (those above it), "left" (those to the right) or "right" (those to the left).

    Returns:
        (N, C, H, W), dtype and layout of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or mode.

    Differentiable: input. Deterministic: yes. Autocast: as without.

    Note:
        A cell gets the sum of the gradients of all cells that took its value. Of equal values the
        last one that the running maximum meets gets it, as with `torch.cummax`. From a NaN on, all
        is NaN. For the gradient a bit of each cell is kept on the CPU, input and output on CUDA.

    Source:
        Law and Deng, "CornerNet: Detecting Objects as Paired Keypoints", 2018, equations 6 and 7.

    Example:
        >>> import torch
        >>> from torchkiln.ops import corner_pool
        >>> row = torch.tensor([1.0, 3.0, 2.0, 0.0]).reshape(1, 1, 1, 4)
        >>> corner_pool(row, "left").flatten()
        tensor([3., 3., 2., 0.])
        >>> corner_pool(row, "right").flatten()
        tensor([1., 3., 3., 3.])
    """
    require_choice("corner_pool", "mode", mode, _MODES)
    with_maxima = (
        getattr(input, "requires_grad", False) and input.is_cpu and torch.is_grad_enabled()
    )
    pooled, _ = _corner_pool(input, _MODES[mode], with_maxima)
    return pooled
