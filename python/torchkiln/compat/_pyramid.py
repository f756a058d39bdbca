"""A whole pyramid of feature maps in one launch, inside other libraries' modules.

Their classes, states and signatures stay; only the function that goes level by level is ours, and
what it does not do goes theirs.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchkiln.compat._imports import AfterImport

__all__ = ["Replacement", "suits"]

_MOST_LEVELS = 8


def suits(maps: Sequence[Tensor]) -> bool:
    """Whether our operator takes these levels, and would give the same dtype."""
    first = maps[0]
    return (
        1 < len(maps) <= _MOST_LEVELS
        and first.device.type in ("cpu", "cuda", "meta")
        and all(map.dtype == first.dtype and map.device == first.device for map in maps)
        and torch._C._get_tracing_state() is None
    )


class Replacement:
    """One function of a module or class of a library, ours while it is installed.

    Args:
        module: full name of the module.
        path: of the function in it, such as "Class.forward".
        make: gets the module and the library's function, and returns ours.
    """

    def __init__(
        self,
        module: str,
        path: str,
        make: Callable[[ModuleType, Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        *self._holders, self._name = path.split(".")
        self._make = make
        self._import = AfterImport(module, self._replace)
        self._former: tuple[Any, Callable[..., Any]] | None = None

    def install(self) -> None:
        """Ours from now on, or from the import of the module on."""
        self._import.enter()

    def uninstall(self) -> None:
        """Theirs again."""
        self._import.leave()
        if self._former is not None:
            holder, theirs = self._former
            setattr(holder, self._name, theirs)
            self._former = None

    def _replace(self, module: ModuleType) -> None:
        if self._former is not None:
            return
        holder: Any = functools.reduce(getattr, self._holders, module)
        theirs = getattr(holder, self._name, None)
        if theirs is None:  # an older library, which goes its own way
            return
        ours = functools.wraps(theirs)(self._make(module, theirs))
        # torch.jit.script compiles theirs: it takes this attribute for that of script_if_tracing.
        setattr(ours, "__script_if_tracing_wrapper", True)
        setattr(ours, "__original_fn", theirs)
        self._former = holder, theirs
        setattr(holder, self._name, ours)
