"""What the implementations of several names share: old keywords, Function classes, pairs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch.autograd import Function

__all__ = ["function_class", "pair", "renamed"]

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


def function_class(name: str, apply: Callable[..., Any]) -> type[Function]:
    """The autograd Function that users know, around a function that has its gradient already."""

    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        return apply(*args, **kwargs)

    body = {"__module__": apply.__module__, "apply": staticmethod(apply)}
    return type(name, (Function,), {**body, "forward": staticmethod(forward)})


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, for one number both the same."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
