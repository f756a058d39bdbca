"""Gradients and autocast of `torchvision::` operators, for a torchvision that keeps them in C++.

Newer ones register them in Python (`torchvision/_autograd_registrations.py`), and need nothing
from here.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []  # a registration lives as long as its library
_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU")


def register() -> None:
    """Registers everything once; the schemas must exist."""
    torch.library.register_autograd(
        "torchvision::roi_align", _roi_align_backward, setup_context=_roi_align_context
    )
    library = torch.library.Library("torchvision", "IMPL")
    _libraries.append(library)
    for key in _AUTOCAST_KEYS:
        library.impl("nms", functools.partial(_in_float32, torch.ops.torchvision.nms), key)
        library.impl(
            "roi_align", functools.partial(_in_float32, torch.ops.torchvision.roi_align), key
        )


def _roi_align_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, rois, scale, height, width, sampling_ratio, aligned = inputs
    ctx.save_for_backward(rois)
    ctx.arguments = (scale, height, width, *image.shape, sampling_ratio, aligned)


def _roi_align_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    grad_input = torch.ops.torchvision._roi_align_backward(grad, rois, *ctx.arguments)
    return (grad_input, *[None] * 6)


def _in_float32(op: Callable[..., Tensor], first: Tensor, *arguments: Any) -> Tensor:
    """Runs an operator in float32, as torchvision does, and casts floating results back."""
    keys = functools.reduce(
        lambda a, b: a | b,
        (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _AUTOCAST_KEYS),
    )
    with torch._C._ExcludeDispatchKeyGuard(keys):
        result = op(*map(_float32, (first, *arguments)))
    return result.to(first.dtype) if result.is_floating_point() else result


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.float()
    return value
