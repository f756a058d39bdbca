"""The gradient that operators which pool bilinear samples share."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._regions import is_channels_last, like

__all__ = ["BEZIER", "BORDER", "FEATURE", "ORIENTED", "ROTATED", "fake_rois", "gradient"]

# Values of the schema's `kind`.
ROTATED, ORIENTED, BEZIER, BORDER, FEATURE = range(5)


def fake_rois(input: Tensor, boxes: Tensor, pooled_height: int, pooled_width: int) -> Tensor:
    """The output of a region a row."""
    return like(input, (boxes.shape[0], input.shape[1], pooled_height, pooled_width))


def _fake_backward(
    grad_output: Tensor,
    boxes: Tensor,
    argmax: Tensor | None,
    kind: int,
    n: int,
    c: int,
    h: int,
    w: int,
    spatial_scale: float,
    samples: int,
    aligned: bool,
    clockwise: bool,
    orientations: int,
    channels_last: bool,
    deterministic: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (n, c, h, w), dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )


_sampled_roi_backward = operator("_sampled_roi_backward", fake=_fake_backward)


def gradient(
    kind: int, settings: Callable[..., tuple[Any, ...]]
) -> tuple[Callable[..., None], Callable[..., Tensor | None]]:
    """`setup_context` and `backward`, as `operator` takes them.

    Args:
        kind: of the operator.
        settings: makes (spatial_scale, samples, aligned, clockwise, orientations, deterministic)
            of the arguments after the first two.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, boxes, *others = inputs
        ctx.settings = settings(*others)
        ctx.shape, ctx.channels_last = input.shape, is_channels_last(input)
        if kind != BORDER:
            ctx.save_for_backward(boxes)
            return
        if not others[-1] and ctx.needs_input_grad[0]:
            raise RuntimeError("border_align: with_argmax must be True for a gradient; got False")
        ctx.mark_non_differentiable(output[1])
        # Zeros for the winners, which nobody reads, are as large as they.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(boxes, output[1])

    def backward(ctx: Any, grad_output: Tensor | None, _: None = None) -> Tensor | None:
        if grad_output is None or not ctx.needs_input_grad[0]:  # boxes may need one that is None
            return None
        boxes, *argmax = ctx.saved_tensors
        *numbers, deterministic = ctx.settings
        winners = argmax[0] if argmax else None
        layout = (ctx.channels_last, deterministic)
        own = (grad_output, boxes, winners, kind, *ctx.shape, *numbers, *layout)
        grad: Tensor = _sampled_roi_backward(*own)
        return grad

    return setup_context, backward
