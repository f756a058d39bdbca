"""The same values, lying differently in memory: what a kernel that counts on layouts gets wrong."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchkiln.testing._cases import Arguments

# By the number of dimensions.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _filled(tensor: Tensor, shape: list[int]) -> Tensor:
    """A larger tensor of values that would be noticed."""
    if tensor.dtype == torch.bool:
        return tensor.new_ones(shape)
    noticed = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return tensor.new_full(shape, noticed)


def contiguous(tensor: Tensor) -> Tensor:
    """The same values, the last dimension innermost."""
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    """The same values, dimension 1 innermost, where there are 4 or 5 dimensions."""
    layout = _CHANNELS_LAST.get(tensor.dim())
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def permuted(tensor: Tensor) -> Tensor:
    """The same values, the first dimension innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() > 1 else tensor


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second element of a larger tensor along each dimension."""
    wide = _filled(tensor, [2 * size + 1 for size in tensor.shape])
    return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


def offset(tensor: Tensor) -> Tensor:
    """The same values, one element into a larger tensor: no vector load is aligned."""
    wide = _filled(tensor, [tensor.numel() + 2])
    return wide[1:-1].view(tensor.shape).copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """Other values: all rows are the first one, with stride 0."""
    return tensor[:1].expand_as(tensor) if tensor.dim() else tensor


#: The layouts by name.
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout
    for layout in (contiguous, channels_last, permuted, strided, offset, expanded)
}


def map_tensors(change: Callable[[Tensor], Tensor], arguments: Arguments) -> dict[str, Any]:
    """Returns the arguments with each tensor replaced, also those inside lists."""
    return pytree.tree_map_only(Tensor, change, dict(arguments))  # type: ignore[no-any-return]


def lay_out(arguments: Arguments, layout: str) -> dict[str, Any]:
    """Returns the arguments with every tensor in another layout.

    Args:
        arguments: by name; tensors may stand in lists.
        layout: a key of LAYOUTS. All but "expanded" keep the values.

    Example:
        >>> import torch
        >>> from torchkiln import testing
        >>> arguments = {"input": torch.ones(2, 3), "scale": 2.0}
        >>> testing.lay_out(arguments, "strided")["input"].stride()
        (14, 2)
    """
    return map_tensors(LAYOUTS[layout], arguments)


def emptied(arguments: Arguments, dims: Mapping[str, int]) -> dict[str, Any]:
    """Returns the arguments without elements along some dimensions.

    Args:
        arguments: by name.
        dims: the dimension of each tensor that gets the size 0.

    Example:
        >>> import torch
        >>> from torchkiln import testing
        >>> testing.emptied({"input": torch.ones(2, 3)}, {"input": 0})["input"].shape
        torch.Size([0, 3])
    """
    return {**arguments, **{name: arguments[name].narrow(dim, 0, 0) for name, dim in dims.items()}}


def resized(arguments: Arguments, dims: Mapping[str, int], size: int) -> dict[str, Any]:
    """Returns the arguments with other sizes: elements along dimensions are repeated or left out.

    Args:
        arguments: by name.
        dims: the dimension of each tensor that gets another size.
        size: the size it gets.
    """

    def of_size(tensor: Tensor, dim: int) -> Tensor:
        places = torch.arange(size, device=tensor.device) % max(tensor.shape[dim], 1)
        return tensor.index_select(dim, places)

    return {**arguments, **{name: of_size(arguments[name], dim) for name, dim in dims.items()}}
