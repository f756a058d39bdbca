"""What the implementations of several names share: keywords, errors, Function classes, pairs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["function_class", "listed_errors", "pair", "promoted", "renamed"]

_F = TypeVar("_F", bound=Callable[..., Any])


def renamed(**keywords: str) -> Callable[[_F], _F]:
    """Accepts old keywords, with a DeprecationWarning, for those that took their place.

    Args:
        keywords: the new name of each old one. Giving both is an AssertionError, as in mmengine.
    """

    def decorate(function: _F) -> _F:
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in keywords.items():
                if old not in kwargs:
                    continue
                assert new not in kwargs, f"{name}: {new} must be given once; got {old} too"
                warnings.warn(
                    f"{name}: {old} is deprecated; use {new}", DeprecationWarning, stacklevel=2
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


# As torch's C++ says it.
_SCALARS = {
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float32": "Float",
    "float64": "Double",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
_OTHER_DTYPE = re.compile(r"must have the dtype of \w+ \((\w+)\).*; got (\w+)")
_NO_FLOAT = re.compile(r"must be a floating-point tensor; got (\w+)")
_NOT_THIS = re.compile(rf"must be an? (?:bool or )?({'|'.join(_SCALARS)}) tensor; got (\w+)")
_OTHER_DEVICE = re.compile(r"must be on the device of \w+ \(\S+\); got \S+")


def listed_errors(function: _F) -> _F:
    """Gives errors about dtypes and devices the type and the words that mmcv's users look for."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            words = _listed_words(str(error), (*args, *kwargs.values()))
            if not words:
                raise
            raise RuntimeError(f"{words}: {error}") from None

    return call  # type: ignore[return-value]


def _listed_words(sentence: str, values: tuple[Any, ...]) -> str:
    if match := _OTHER_DTYPE.search(sentence) or _NOT_THIS.search(sentence):
        expected, found = match.groups()
    elif match := _NO_FLOAT.search(sentence):
        dtypes = [str(v.dtype) for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        expected, found = (dtypes or ["float32"])[0].removeprefix("torch."), match[1]
    else:
        return "inconsistent device" if _OTHER_DEVICE.search(sentence) else ""
    return f"expected scalar type {_SCALARS[expected]} but found {_SCALARS.get(found, found)}"


def function_class(name: str, apply: Callable[..., Any]) -> type[Function]:
    """The autograd Function that users know, around a function that has its gradient already."""

    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        return apply(*args, **kwargs)

    body = {"__module__": apply.__module__, "apply": staticmethod(apply)}
    return type(name, (Function,), {**body, "forward": staticmethod(forward)})


def pair(size: SupportsIndex | tuple[int, int]) -> tuple[int, int]:
    """Height and width, for one number both the same."""
    if not isinstance(size, Iterable):
        return operator.index(size), operator.index(size)  # one of NumPy's integers too
    height, width = size
    return int(height), int(width)


def promoted(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Both without a gradient and in one dtype: mmcv only sorts the scores, whatever they are."""
    dtype = torch.promote_types(boxes.dtype, scores.dtype)
    return boxes.detach().to(dtype), scores.detach().to(dtype)
