"""What stands for names of `mmcv.ops` without an operator: it imports, and raises when used."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, NoReturn

from torch import nn
from torch.autograd import Function

from torchkiln.compat.mmcv._names import MODULES, Name

__all__ = ["stand_in"]


def stand_in(row: Name, resolve: Callable[[Name], Any]) -> Any:
    """Returns a class or function with the peer's signature that raises when it is used.

    Args:
        row: what is not there.
        resolve: returns the object of another row, for the base of a class.
    """

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{row.path}: is not in torchkiln yet. `torchkiln compat mmcv --check` lists what is"
        )

    module = f"mmcv.ops.{row.module}"
    body: dict[str, Any] = {"__module__": module}
    if row.kind == "class":
        body["__init__"] = _constructor(refuse, row.signature)
        return type(row.name, (_base(row, resolve),), body)
    refuse.__signature__ = row.signature  # type: ignore[attr-defined]
    if row.kind == "function":
        body |= {"forward": staticmethod(refuse), "apply": staticmethod(refuse)}
        return type(row.name, (Function,), body)
    refuse.__name__ = refuse.__qualname__ = row.name
    refuse.__module__ = module
    return refuse


def _constructor(refuse: Callable[..., NoReturn], signature: Signature) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse()

    # On the constructor, not on the class: subclasses have constructors of their own.
    own = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[own, *signature.parameters.values()]
    )
    return __init__


def _base(row: Name, resolve: Callable[[Name], Any]) -> type:
    if row.base in ("", "object"):
        return object if row.base else nn.Module
    if row.base not in _classes():
        base: type = getattr(nn, row.base)
        return base
    return resolve(_classes()[row.base])  # type: ignore[no-any-return]


@functools.cache
def _classes() -> dict[str, Name]:
    # The deprecated wrappers are called as the classes of torch.nn that they wrap.
    return {
        row.name: row
        for rows in MODULES.values()
        for row in rows.values()
        if row.kind == "class" and row.module != "deprecated_wrappers"
    }
