"""What the operators that pool regions share: their boxes, sizes and layouts."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln.ops._arguments import (
    is_integer,
    require_device,
    require_floating,
    shape,
    widened,
)

__all__ = ["as_rows", "bins_of", "is_channels_last", "keeps_winners", "like"]


def is_channels_last(input: Tensor) -> bool:
    """The layout that output and gradient take; the same rule as in C++.

    torch.func shows nobody a layout, and inside of vmap torch refuses to tell it.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(input):
        return False
    return not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)


def keeps_winners(input: Tensor) -> bool:
    """Whether the places of maxima are wanted: a gradient goes there.

    Inside of torch.func, an outer transform may want one without `requires_grad`.
    """
    wants = getattr(input, "requires_grad", False) or torch._C._are_functorch_transforms_active()
    return wants and torch.is_grad_enabled()


def like(input: Tensor, size: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the layout of `input`."""
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return torch.empty(size, dtype=dtype or input.dtype, device=input.device, memory_format=layout)


def as_rows(op: str, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """(K, 5) of one (L, 4) tensor for each image; one tensor as it is."""
    if not isinstance(boxes, (list, tuple)):
        return boxes  # type: ignore[return-value]
    if not boxes:
        raise ValueError(f"{op}: boxes must have a tensor for each image; got an empty list")
    for i, rows in enumerate(boxes):
        require_floating(op, **{f"boxes[{i}]": rows})
        if rows.dim() != 2 or rows.shape[1] != 4:
            raise ValueError(f"{op}: boxes[{i}] must have shape (L, 4); got {shape(rows)}")
        if i > 0:
            require_device(op, **{"boxes[0]": boxes[0], f"boxes[{i}]": rows})
    # In float32 at least: of the numbers of images, bfloat16 has those up to 256.
    # And autocast to the other half type refuses to put half ones together.
    wide = [widened(rows) for rows in boxes]
    images = [torch.full_like(rows[:, :1], i) for i, rows in enumerate(wide)]
    return torch.cat([torch.cat(images), torch.cat(wide)], dim=1)


def bins_of(op: str, output_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a grid of bins; one number for both. Any type of integers will do."""
    sides = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * 2
    if len(sides) == 2 and all(map(is_integer, sides)):
        height, width = map(_plain, sides)
        return height, width
    raise ValueError(f"{op}: output_size must be one integer or two; got {output_size!r}")


def _plain(number: Any) -> Any:
    return number if isinstance(number, torch.SymInt) else operator.index(number)
