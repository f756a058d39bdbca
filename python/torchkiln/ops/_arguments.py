"""Checks of arguments for compositions, and of what public functions look at themselves.

Those of kernels stand in C++. The sentences are the same:
`<op>: <argument> must <rule>; got <value>. <way out>`.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import autocast_mode

from torchkiln._frame import unfit

_INT64_END = 2**63
_CLASS_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def dtype_name(tensor: Tensor) -> str:
    """Such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def require_tensor(op: str, **tensors: Tensor) -> None:
    """Raises a TypeError for what is no tensor, or a sparse one."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise unfit(op, name, value)


def require_optional_tensor(op: str, **tensors: Tensor | None) -> None:
    """Raises a TypeError for what is neither a tensor nor None."""
    require_tensor(op, **{name: value for name, value in tensors.items() if value is not None})


def require_floating(op: str, **tensors: Tensor) -> None:
    """Raises a TypeError for what is no tensor, or one of integers, bools or complex numbers."""
    require_tensor(op, **tensors)
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise TypeError(
                f"{op}: {name} must be a floating-point tensor; got {dtype_name(value)}. "
                f"Convert it with {name}.float()"
            )


def require_integers(op: str, **tensors: Tensor) -> None:
    """Raises a TypeError for what is no tensor of classes."""
    require_tensor(op, **tensors)
    for name, value in tensors.items():
        if value.dtype not in _CLASS_DTYPES:
            raise TypeError(
                f"{op}: {name} must be an integer tensor; got {dtype_name(value)}. "
                f"Convert it with {name}.long()"
            )


def require_last(op: str, columns: int, **tensors: Tensor) -> None:
    """Raises for what is no floating-point tensor of rows of so many numbers."""
    require_floating(op, **tensors)
    for name, value in tensors.items():
        if value.dim() == 0 or value.shape[-1] != columns:
            raise ValueError(f"{op}: {name} must have shape (..., {columns}); got {shape(value)}")


def require_shape(op: str, wanted: tuple[int | str, ...], **tensors: Tensor) -> None:
    """Raises where a tensor has other sizes; words stand for any size."""
    require_tensor(op, **tensors)
    for name, value in tensors.items():
        pairs = zip(wanted, value.shape, strict=False)
        if value.dim() != len(wanted) or any(
            isinstance(size, int) and size != got for size, got in pairs
        ):
            sizes = ", ".join(str(size) for size in wanted)
            raise ValueError(f"{op}: {name} must have shape ({sizes}); got {shape(value)}")


def require_pair(op: str, **tensors: Tensor) -> None:
    """Raises where two tensors differ in dtype or device."""
    (first, a), (second, b) = tensors.items()
    if b.dtype != a.dtype:
        raise TypeError(
            f"{op}: {second} must have the dtype of {first} ({dtype_name(a)}); got {dtype_name(b)}"
        )
    require_device(op, **tensors)


def require_device(op: str, **tensors: Tensor) -> None:
    """Raises where two tensors are on different devices."""
    (first, a), (second, b) = tensors.items()
    if b.device != a.device:
        raise ValueError(
            f"{op}: {second} must be on the device of {first} ({a.device}); got {b.device}"
        )


def require_choice(op: str, name: str, value: object, choices: Mapping[str, object]) -> None:
    """Raises a ValueError for a word that is not among the choices."""
    if not isinstance(value, str) or value not in choices:
        *most, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"{op}: {name} must be {', '.join(most)} or {last}; got {value!r}")


def is_number(value: object) -> bool:
    """Whether it is a number of Python, numpy or torch, or a tensor of one; not beyond int64."""
    # First, because torch.compile cannot ask a symbolic number for its attributes.
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return not isinstance(value, int) or -_INT64_END <= value < _INT64_END
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return hasattr(value, "__float__")


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python, numpy or torch, or a tensor of one."""
    if isinstance(value, (int, torch.SymInt)):
        return True
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype in _CLASS_DTYPES
    return hasattr(value, "__index__")


def require_number(op: str, **numbers: Any) -> None:
    """Raises a TypeError for what is no number, a ValueError for NaN."""
    for name, value in numbers.items():
        if not is_number(value):
            raise TypeError(f"{op}: {name} must be a number; got {value!r}")
        if value != value:
            raise ValueError(f"{op}: {name} must be a number; got {value}")


def require_count(op: str, **counts: Any) -> None:
    """Raises a TypeError for what is no integer, a ValueError for one below 0; None will do."""
    for name, value in counts.items():
        if value is None:
            continue
        if not is_integer(value):
            raise TypeError(f"{op}: {name} must be an integer; got {value!r}")
        if value < 0:
            raise ValueError(f"{op}: {name} must be at least 0; got {value}")


def require_output_size(op: str, max_output: Any) -> None:
    """Raises what `require_count` does, and a ValueError for more rows than boxes can be."""
    require_count(op, max_output=max_output)
    if max_output is not None and max_output > 2**30:
        raise ValueError(
            f"{op}: max_output must be at most 2^30; got {max_output}. "
            "No more rows can be kept than there are boxes"
        )


def shape(tensor: Tensor) -> str:
    """Such as "(64, 3)"."""
    return str(tuple(tensor.shape))


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; torch refuses to say it of others."""
    device = tensor.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def cast_for_autocast(*values: Any) -> tuple[Any, ...]:
    """Under autocast, float32 in place of the half types: the rule that kernels register.

    What is no tensor stays as it is. The first tensor says which device's autocast counts.
    """
    first = next((value for value in values if isinstance(value, Tensor)), None)
    if first is None or not under_autocast(first):
        return values
    cast: tuple[Any, ...] = autocast_mode._cast(values, first.device.type, torch.float32)
    return cast


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which kernels add up what has a dtype; weights beside half types have it, too."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The half types in float32, in which they are computed; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
