"""What Python adds to our `torchvision::` operators.

`implement`: operators whose arguments or results are not those of ours.
`register`: gradients and autocast, for a torchvision that keeps them in C++ and whose own library
cannot load. Newer ones register them in Python (`torchvision/_autograd_registrations.py`), and need
nothing from there.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []  # a registration lives as long as its library
_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU")


calls: Counter[str] = Counter()  # how often each kernel written here answered


def implement(names: Iterable[str]) -> torch.library.Library:
    """Registers the kernels among these that are written here; the schemas must exist.

    Returns:
        What the registrations live in.
    """
    library = torch.library.Library("torchvision", "IMPL")
    for name in KERNELS.keys() & set(names):
        for key in ("CPU", "CUDA"):
            library.impl(name, functools.partial(_counted, name), key)
    return library


def _counted(name: str, *arguments: Any) -> Any:
    calls[name] += 1
    return KERNELS[name](*arguments)


def _box_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """In degrees, counter-clockwise where y points down."""
    from torchkiln import ops

    unit = boxes1.new_tensor([1, 1, 1, 1, math.pi / 180])
    return ops.box_iou_rotated(boxes1 * unit, boxes2 * unit, clockwise=False)


# Where both sides of a map fit into a byte our cells have two bytes, else four: y and x, half each,
# and all ones for an empty bin.
_MAX_NARROW_SIDE = 254


def _roi_pool(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    """Torchvision numbers the cells of a map from 0, row by row, and has -1 for an empty bin."""
    output, code = torch.ops.torchkiln.roi_pool(
        input, rois, pooled_height, pooled_width, spatial_scale
    )
    bits = 4 * code.element_size()
    mask = (1 << bits) - 1
    wide = code.int()
    cells = (wide >> bits).bitwise_and_(mask).mul_(input.shape[3]).add_(wide & mask)
    return output, cells.masked_fill_(wide == -1, -1)


def _roi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    is_narrow = max(height, width) <= _MAX_NARROW_SIDE
    row = argmax.div(max(width, 1), rounding_mode="floor")
    code = (row << (8 if is_narrow else 16)).add_(argmax - row * width)
    code = code.masked_fill_(argmax < 0, -1).to(torch.int16 if is_narrow else torch.int32)
    image, deterministic = (batch_size, height, width), torch.are_deterministic_algorithms_enabled()
    backward = torch.ops.torchkiln._roi_pool_backward
    result: Tensor = backward(grad, code, rois, *image, spatial_scale, True, deterministic)
    return result


KERNELS: dict[str, Callable[..., Any]] = {
    "box_iou_rotated": _box_iou_rotated,
    "roi_pool": _roi_pool,
    "_roi_pool_backward": _roi_pool_backward,
}


def register() -> None:
    """Registers everything once; the schemas must exist."""
    torch.library.register_autograd(
        "torchvision::roi_align", _roi_align_backward, setup_context=_roi_align_context
    )
    for name in ("roi_pool", "ps_roi_align", "ps_roi_pool"):
        torch.library.register_autograd(
            f"torchvision::{name}",
            functools.partial(
                _mapped_backward, getattr(torch.ops.torchvision, f"_{name}_backward")
            ),
            setup_context=_mapped_context,
        )
    library = torch.library.Library("torchvision", "IMPL")
    _libraries.append(library)
    for key in _AUTOCAST_KEYS:
        for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
            op = getattr(torch.ops.torchvision, name)
            library.impl(name, functools.partial(_in_float32, op), key)


def _roi_align_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, rois, scale, height, width, sampling_ratio, aligned = inputs
    ctx.save_for_backward(rois)
    ctx.arguments = (scale, height, width, *image.shape, sampling_ratio, aligned)


def _roi_align_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    grad_input = torch.ops.torchvision._roi_align_backward(grad, rois, *ctx.arguments)
    return (grad_input, *[None] * 6)


def _mapped_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, rois, *options = inputs
    ctx.save_for_backward(rois, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.arguments = (*options, *image.shape)


def _mapped_backward(op: Callable[..., Tensor], ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    options = len(ctx.arguments) - 4
    return (op(grad, *ctx.saved_tensors, *ctx.arguments), *[None] * (options + 1))


def _in_float32(op: Callable[..., Any], first: Tensor, *arguments: Any) -> Any:
    """Runs an operator in float32, as torchvision does, and casts floating results back."""
    keys = functools.reduce(
        lambda a, b: a | b,
        (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _AUTOCAST_KEYS),
    )
    with torch._C._ExcludeDispatchKeyGuard(keys):
        result = op(*map(_float32, (first, *arguments)))
    if isinstance(result, tuple):
        return tuple(_as(first.dtype, value) for value in result)
    return _as(first.dtype, result)


def _as(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.float()
    return value
