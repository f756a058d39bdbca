"""RoIAlign: pools regions of a feature map to a fixed grid, averaging or taking the maximum."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import require_choice
from torchkiln.ops.detection._regions import as_rows, bins_of, is_channels_last, like

__all__ = ["roi_align"]

# Values of the schema's `pooling`.
_POOLING = {"avg": 0, "max": 1}


def _fake(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    pooling: int = 0,
) -> Tensor:
    return like(input, (boxes.shape[0], input.shape[1], pooled_height, pooled_width))


def _fake_max(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    shape = (boxes.shape[0], input.shape[1], pooled_height, pooled_width)
    return like(input, shape), like(input, shape, torch.int32)


def _fake_backward(
    grad_output: Tensor,
    boxes: Tensor,
    argmax: Tensor | None,
    n: int,
    c: int,
    h: int,
    w: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (n, c, h, w), dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, boxes, *ctx.size_and_options, pooling = inputs
    ctx.shape, ctx.channels_last = input.shape, is_channels_last(input)
    # The winners of a maximum are found again: the input lives longer than this anyway, and a
    # winner's number takes as much memory as the output.
    ctx.save_for_backward(boxes, *([input] if pooling == _POOLING["max"] else []))


def _backward(ctx: Any, grad_output: Tensor) -> Tensor:
    boxes, *input = ctx.saved_tensors
    argmax = _roi_align_max(input[0], boxes, *ctx.size_and_options)[1] if input else None
    options = ctx.size_and_options[2:]
    return _roi_align_backward(grad_output, boxes, argmax, *ctx.shape, *options, ctx.channels_last)


_roi_align_backward = operator("_roi_align_backward", fake=_fake_backward)
_roi_align_max = operator("_roi_align_max", fake=_fake_max)
_roi_align = operator("roi_align", fake=_fake, setup_context=_setup_context, backward=_backward)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    pool_mode: str = "avg",
    deterministic: bool | None = None,
) -> Tensor:
    """Pools each region of interest to a grid of bins, each the average of bilinear samples.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            other layouts are copied.
        boxes: (K, 5), any of these dtypes; batch index, x1, y1, x2, y2 in image pixels. Or one
            (L, 4) tensor for each image.
        output_size: bins, (height, width) or one number for both; 1 to 4096.
        spatial_scale: input pixels per image pixel, above 0.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
        aligned: moves positions by half a pixel, so that pixel centres lie at half numbers, and
            lets regions be smaller than a pixel.
        pool_mode: "avg", or "max" for the greatest sample of each bin.
        deterministic: accepted as elsewhere; gradients always are, and at full speed.

    Returns:
        (K, C, height, width), dtype and layout of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: input. Deterministic: yes, gradients too.
    Autocast: as without.

    Note:
        Positions are computed in float32, in float64 for a float64 input. A sample up to a pixel
        outside takes the border's value, further out 0. A region that is not finite, or with
        aligned one with x2 < x1 or y2 < y1, has no samples and gives 0. The first of several
        equal maxima gets the gradient; NaN is greater than all.

    Source:
        He et al., "Mask R-CNN", 2017, section 3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import roi_align
        >>> input = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
        >>> roi_align(input, boxes, 2, aligned=True)
        tensor([[[[ 2.5000,  4.5000],
                  [10.5000, 12.5000]]]])
    """
    boxes = as_rows("roi_align", boxes)
    height, width = bins_of("roi_align", output_size)
    require_choice("roi_align", "pool_mode", pool_mode, _POOLING)
    pooling = _POOLING[pool_mode]
    return _roi_align(input, boxes, height, width, spatial_scale, sampling_ratio, aligned, pooling)
