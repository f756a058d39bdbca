"""Max pooling of regions of interest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops.detection._regions import as_rows, bins_of, keeps_winners

__all__ = ["roi_pool"]

# Up to this side, a cell fits into two bytes.
_MAX_NARROW_SIDE = 254


def _empty(like: Tensor, layout: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the device of `like`, in the memory format of `layout`."""
    last = not layout.is_contiguous() and layout.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _fake(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    rounding: bool = True,
    deterministic: bool = False,
    with_argmax: bool = True,
) -> tuple[Tensor, Tensor]:
    shape = (boxes.shape[0], input.shape[1], pooled_height, pooled_width)
    narrow = max(input.shape[2:]) <= _MAX_NARROW_SIDE
    code = torch.int16 if narrow else torch.int32
    output = _empty(input, input, shape, input.dtype)
    return output, _empty(input, input, shape, code) if with_argmax else input.new_empty(
        0, dtype=code
    )


def _fake_backward(
    grad_output: Tensor,
    argmax: Tensor,
    boxes: Tensor,
    images: int,
    height: int,
    width: int,
    spatial_scale: float,
    rounding: bool,
    deterministic: bool,
) -> Tensor:
    shape = (images, grad_output.shape[1], height, width)
    return _empty(grad_output, argmax, shape, grad_output.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, boxes, _, _, *ctx.settings, with_argmax = inputs
    if not with_argmax and ctx.needs_input_grad[0]:
        raise RuntimeError("roi_pool: with_argmax must be True for a gradient; got False")
    ctx.image_shape = (input.shape[0], *input.shape[2:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(
        False
    )  # zeros for the cells, which nobody reads, are as large as they
    ctx.save_for_backward(output[1], boxes)


def _backward(ctx: Any, grad_output: Tensor | None, _: None = None) -> Tensor | None:
    if grad_output is None or not ctx.needs_input_grad[0]:  # boxes may need one that is None
        return None
    argmax, boxes = ctx.saved_tensors
    grad: Tensor = _roi_pool_backward(grad_output, argmax, boxes, *ctx.image_shape, *ctx.settings)
    return grad


_roi_pool_backward = operator("_roi_pool_backward", fake=_fake_backward)
# Features stay in their dtype: a maximum loses nothing. Coordinates are computed in float32 anyway.
_roi_pool = operator("roi_pool", fake=_fake, setup_context=_setup_context, backward=_backward)


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    rounding: bool = True,
    deterministic: bool | None = None,
) -> Tensor:
    """Pools each region of interest to a fixed grid by the maximum of each bin.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels last. H
            and W up to 65534.
        boxes: (K, 5), any of these dtypes; batch index, x1, y1, x2, y2 in pixels of the image. Or
            one (L, 4) tensor for each image.
        output_size: bins (height, width), or one number for both; from 1 to 1024.
        spatial_scale: cells of `input` per pixel of the image, above 0.
        rounding: True: corners are rounded to cells, half away from zero, and belong to the region,
            which has at least one cell (torchvision's rule). False: corners are not rounded, x2 and
            y2 lie one pixel further, and a region without area is empty (mmcv's rule).
        deterministic: whether the gradient of contiguous input has the same bits every time on
            CUDA, at two to four times the cost; None: as
            `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (K, C, height, width), dtype and layout of `input`; 0 for an empty bin.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, an output_size or spatial_scale out of range, or two
            different devices.
        IndexError: on the CPU, for a batch index out of range. On CUDA its bins are 0.

    Differentiable: input. Deterministic: yes, but for the gradient of contiguous input on CUDA,
    where `deterministic` decides. Autocast: as without.

    Note:
        Of equal values the first one wins, row by row. NaN wins over any number. A region with a
        coordinate that is not finite is empty. Bins are cut in exact integers, where torchvision's
        float32 sometimes takes one more row or column.

    Source:
        Girshick, "Fast R-CNN", 2015, section 2.1.

    Example:
        >>> import torch
        >>> from torchkiln.ops import roi_pool
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> roi_pool(image, torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]]), 2)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """
    height, width = bins_of("roi_pool", output_size)
    rows = as_rows("roi_pool", boxes)
    output, _ = _roi_pool(
        input,
        rows,
        height,
        width,
        spatial_scale,
        rounding,
        deterministic_default(deterministic),
        keeps_winners(input),
    )
    return output
