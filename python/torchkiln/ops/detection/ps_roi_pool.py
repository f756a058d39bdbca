"""Position-sensitive pooling: each bin of a region pools channels of its own."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._regions import as_rows, bins_of, is_channels_last, like

__all__ = ["ps_roi_align", "ps_roi_pool"]

# Values of `pooling` in the internal schemas.
_SAMPLES, _CELLS = 0, 1


def _fake_align(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    channels = input.shape[1] // (pooled_height * pooled_width)
    return like(input, (boxes.shape[0], channels, pooled_height, pooled_width))


def _fake_pool(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
) -> Tensor:
    return _fake_align(input, boxes, pooled_height, pooled_width)


def _fake_mapped(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pooling: int,
    as_torchvision: bool,
) -> tuple[Tensor, Tensor]:
    output = _fake_align(input, boxes, pooled_height, pooled_width)
    return output, like(input, output.shape, torch.int32)


def _fake_backward(
    grad_output: Tensor,
    boxes: Tensor,
    n: int,
    c: int,
    h: int,
    w: int,
    spatial_scale: float,
    sampling_ratio: int,
    pooling: int,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (n, c, h, w), dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )


def _setup_context(pooling: int) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, boxes, _, _, spatial_scale, *ratio = inputs
        ctx.shape, ctx.channels_last = input.shape, is_channels_last(input)
        ctx.options = (spatial_scale, ratio[0] if ratio else -1, pooling)
        ctx.save_for_backward(boxes)

    return setup_context


def _backward(ctx: Any, grad_output: Tensor) -> Tensor:
    (boxes,) = ctx.saved_tensors
    return _ps_roi_pool_backward(grad_output, boxes, *ctx.shape, *ctx.options, ctx.channels_last)


_ps_roi_pool_backward = operator("_ps_roi_pool_backward", fake=_fake_backward)
_ps_roi_pool_mapped = operator("_ps_roi_pool_mapped", fake=_fake_mapped)
_ps_roi_align = operator(
    "ps_roi_align", fake=_fake_align, setup_context=_setup_context(_SAMPLES), backward=_backward
)
_ps_roi_pool = operator(
    "ps_roi_pool", fake=_fake_pool, setup_context=_setup_context(_CELLS), backward=_backward
)


def ps_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """Averages bilinear samples in each bin of each region, each bin of channels of its own.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            other layouts are copied. Output channel c takes bin (i, j) from channel
            (c height + i) width + j.
        boxes: (K, 5), any of these dtypes; batch index, x1, y1, x2, y2 in image pixels. Or one
            (L, 4) tensor for each image.
        output_size: bins, (height, width) or one number for both; 1 to 4096. C is a multiple of
            their number.
        spatial_scale: input pixels per image pixel, above 0.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.

    Returns:
        (K, C / (height width), height, width), dtype and layout of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: input. Deterministic: yes, gradients too.
    Autocast: as without.

    Note:
        Samples lie as those of an aligned `roi_align`; a region without samples gives 0.

    Source:
        Dai et al., "R-FCN", 2016, section 2, with the samples of He et al., "Mask R-CNN", 2017.

    Example:
        >>> import torch
        >>> from torchkiln.ops import ps_roi_align
        >>> input = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 6, 6)
        >>> ps_roi_align(input, torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]]), 2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    height, width = bins_of("ps_roi_align", output_size)
    rows = as_rows("ps_roi_align", boxes)
    return _ps_roi_align(input, rows, height, width, spatial_scale, sampling_ratio)


def ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """Averages the cells of each bin of each region, each bin of channels of its own.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            other layouts are copied. Output channel c takes bin (i, j) from channel
            (c height + i) width + j.
        boxes: (K, 5), any of these dtypes; batch index, x1, y1, x2, y2 in image pixels. Or one
            (L, 4) tensor for each image.
        output_size: bins, (height, width) or one number for both; 1 to 1024. C is a multiple of
            their number.
        spatial_scale: input cells per image pixel, above 0.

    Returns:
        (K, C / (height width), height, width), dtype and layout of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: input. Deterministic: yes, gradients too.
    Autocast: as without.

    Note:
        Corners are rounded, half away from zero; a region has the cells from x1 to before x2, at
        least one. Bins begin at the cell that they cut and end behind it, so neighbours may share
        one. Cells outside do not count, and a bin without cells, or of a region that is not
        finite, gives 0.

    Source:
        Dai et al., "R-FCN", 2016, section 2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import ps_roi_pool
        >>> input = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 6, 6)
        >>> ps_roi_pool(input, torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]]), 2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    height, width = bins_of("ps_roi_pool", output_size)
    return _ps_roi_pool(input, as_rows("ps_roi_pool", boxes), height, width, spatial_scale)
