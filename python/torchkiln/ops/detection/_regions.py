"""What the operators that pool regions share: their boxes, sizes and layouts."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_rows", "bins_of", "is_channels_last", "like"]


def is_channels_last(input: Tensor) -> bool:
    """The layout that output and gradient take; the same rule as in C++."""
    return not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)


def like(input: Tensor, shape: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the layout of `input`."""
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or input.dtype, device=input.device, memory_format=layout)


def as_rows(op: str, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """(K, 5) of one (L, 4) tensor for each image; one tensor as it is."""
    if not isinstance(boxes, (list, tuple)):
        return boxes  # type: ignore[return-value]
    for i, rows in enumerate(boxes):
        if rows.dim() != 2 or rows.shape[1] != 4:
            raise ValueError(f"{op}: boxes[{i}] must have shape (L, 4); got {tuple(rows.shape)}")
    if not boxes:
        raise ValueError(f"{op}: boxes must have a tensor for each image; got an empty list")
    images = [torch.full_like(rows[:, :1], i) for i, rows in enumerate(boxes)]
    return torch.cat([torch.cat(images), torch.cat(list(boxes))], dim=1)


def bins_of(op: str, output_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a grid of bins; one number for both."""
    if isinstance(output_size, int):
        return output_size, output_size
    if not isinstance(output_size, (tuple, list)) or len(output_size) != 2:
        raise ValueError(f"{op}: output_size must be one number or two; got {output_size!r}")
    height, width = output_size
    return height, width
