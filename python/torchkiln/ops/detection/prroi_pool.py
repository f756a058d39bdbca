"""Precise pooling of regions: each bin is the integral of the interpolated map over its area."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._regions import as_rows, bins_of, is_channels_last, like

__all__ = ["prroi_pool"]


def _fake(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
) -> Tensor:
    return like(input, (boxes.shape[0], input.shape[1], pooled_height, pooled_width))


def _fake_backward(
    grad_output: Tensor,
    boxes: Tensor,
    n: int,
    c: int,
    h: int,
    w: int,
    spatial_scale: float,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (n, c, h, w), dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )


def _fake_box_backward(
    grad_output: Tensor, input: Tensor, boxes: Tensor, spatial_scale: float
) -> Tensor:
    return boxes.new_empty(boxes.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, boxes, _, _, ctx.scale = inputs
    ctx.shape, ctx.channels_last = input.shape, is_channels_last(input)
    # Only the gradient of boxes looks at the input again.
    ctx.save_for_backward(boxes, *([input] if ctx.needs_input_grad[1] else []))


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    boxes, *input = ctx.saved_tensors
    of_input = of_boxes = None
    if ctx.needs_input_grad[0]:
        of_input = _prroi_pool_backward(
            grad_output, boxes, *ctx.shape, ctx.scale, ctx.channels_last
        )
    if input:
        of_boxes = _prroi_pool_box_backward(grad_output, input[0], boxes, ctx.scale)
    return of_input, of_boxes


_prroi_pool_backward = operator("_prroi_pool_backward", fake=_fake_backward)
_prroi_pool_box_backward = operator("_prroi_pool_box_backward", fake=_fake_box_backward)
_prroi_pool = operator("prroi_pool", fake=_fake, setup_context=_setup_context, backward=_backward)


def prroi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """Averages the map over each bin of each region exactly, with a gradient of the boxes too.

    Between pixels the map is interpolated, and beyond the outer ones it falls to 0 within a pixel;
    the average is the integral over the bin by its area.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            other layouts are copied.
        boxes: (K, 5), any of these dtypes; batch index, x1, y1, x2, y2 in image pixels, pixel
            centres at whole numbers. Or one (L, 4) tensor for each image.
        output_size: bins, (height, width) or one number for both; 1 to 4096.
        spatial_scale: input pixels per image pixel, above 0.

    Returns:
        (K, C, height, width), dtype and layout of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: input, boxes. Deterministic: yes, gradients too.
    Autocast: as without.

    Note:
        Positions are computed in float32, in float64 for a float64 input. A region without area,
        or one that is not finite, gives 0 and has the gradient 0. The batch index has none.

    Source:
        Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection", 2018,
        section 3.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import prroi_pool
        >>> input = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> prroi_pool(input, torch.tensor([[0.0, 1.0, 1.0, 2.0, 2.0]]), 1)
        tensor([[[[7.5000]]]])
    """
    height, width = bins_of("prroi_pool", output_size)
    return _prroi_pool(input, as_rows("prroi_pool", boxes), height, width, spatial_scale)
