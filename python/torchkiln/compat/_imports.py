"""Changes of other libraries' modules, made when a program imports them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

__all__ = ["AfterImport"]

Change = Callable[[ModuleType], None]


class AfterImport(MetaPathFinder):
    """Calls `change` with a module, at once where it is imported already, else right after it is.

    Args:
        name: the module's full name.
        change: what is done to it.
    """

    def __init__(self, name: str, change: Change) -> None:
        self._name = name
        self._change = change

    def enter(self) -> None:
        """Begins."""
        if self._name in sys.modules:
            self._change(sys.modules[self._name])
        else:
            sys.meta_path.insert(0, self)

    def leave(self) -> None:
        """Later imports are no longer changed; what was, stays."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None:
            return spec
        loader = _Loader(fullname, spec.origin, self._change)
        return spec_from_file_location(fullname, spec.origin, loader=loader)


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, change: Change) -> None:
        super().__init__(name, path)
        self._change = change

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._change(module)
