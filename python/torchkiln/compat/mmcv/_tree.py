"""The modules `mmcv.ops` and `mmcv.ops.*`, whose names come into being when they are asked for."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torchkiln.compat.mmcv import _names
from torchkiln.compat.mmcv._missing import stand_in
from torchkiln.compat.mmcv._names import MODULES, Name

__all__ = ["Finder", "modules", "ops"]


class _Submodule(ModuleType):
    """`mmcv.ops.<module>`."""

    def __getattr__(self, name: str) -> Any:
        row = MODULES[self.__name__.rpartition(".")[2]].get(name)
        if row is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = _make(row)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES[self.__name__.rpartition(".")[2]]})


class _Ops(ModuleType):
    """`mmcv.ops`. A function hides the submodule of its name, as in the peer."""

    def __getattr__(self, name: str) -> Any:
        row = _names.public().get(name) or _names.of_fork().get(name)
        if row is not None:
            value = getattr(_tree[row.module], name)
        elif name in _tree:
            value = _tree[name]
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_names.public(), *_tree})


class _Loader(Loader):
    """Gives the import system a module that exists already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        if module is not ops:
            return
        # Not left to the import system, which would set them over the functions of their names.
        sys.modules.update(modules())
        if find_spec("mmengine") is not None:
            _registry.enter()


class Finder(MetaPathFinder):
    """Finds `mmcv.ops`, and a minimal `mmcv` where none is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "mmcv.ops":
            return ops.__spec__
        if fullname == "mmcv" and PathFinder.find_spec(fullname, path) is None:
            return ModuleSpec(fullname, _Loader(_mmcv()), is_package=True)
        return None


class _Registry:
    """Our classes in mmengine's MODELS, and what they took the place of."""

    def __init__(self) -> None:
        self._former: dict[str, Any] | None = None

    @staticmethod
    def _models() -> Any:
        return importlib.import_module("mmengine.registry").MODELS

    def enter(self) -> None:
        if self._former is not None:
            return
        models = self._models()
        self._former = {}
        for row in _names.registered():
            self._former[row.registry] = models.module_dict.get(row.registry)
            value = getattr(_tree[row.module], row.name)
            models.register_module(name=row.registry, force=True, module=value)

    def leave(self) -> None:
        if self._former is None:
            return
        models = self._models()
        for name, value in self._former.items():
            models.module_dict.pop(name, None)
            if value is not None:
                models.register_module(name=name, force=True, module=value)
        self._former = None


def modules() -> dict[str, ModuleType]:
    """The modules below `mmcv.ops`, by their full names."""
    return {module.__name__: module for module in _tree.values()}


def leave_registry() -> None:
    """Takes our classes out of mmengine's registry."""
    _registry.leave()


def _make(row: Name) -> Any:
    if not row.operator:
        return stand_in(row, lambda other: getattr(_tree[other.module], other.name))
    module = importlib.import_module(f"torchkiln.compat.mmcv._ops.{row.module}")
    return getattr(module, row.name)


def _mmcv() -> ModuleType:
    module = ModuleType("mmcv", "What torchkiln puts in place of an mmcv that is not installed.")
    module.__dict__["__version__"] = "2.2.0"  # the version whose names these are
    return module


def _specified(module: ModuleType, is_package: bool) -> ModuleType:
    module.__spec__ = ModuleSpec(module.__name__, _Loader(module), is_package=is_package)
    module.__loader__ = module.__spec__.loader
    module.__package__ = "mmcv.ops"
    return module


_registry = _Registry()
_tree = {name: _specified(_Submodule(f"mmcv.ops.{name}"), False) for name in MODULES}
ops = _specified(_Ops("mmcv.ops", "torchkiln in place of `mmcv.ops`."), True)
ops.__dict__.update(__path__=[], __all__=list(_names.public()))
