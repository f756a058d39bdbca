"""Modules of ours in place of another package's, for as long as they are installed."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torchkiln.compat._imports import AfterImport

__all__ = ["Replaced", "module"]


def module(name: str, names: Mapping[str, Any]) -> ModuleType:
    """A module that holds these names."""
    made = ModuleType(name, "In its place by torchkiln.")
    made.__dict__.update(names)
    made.__dict__["__all__"] = sorted(names)
    return made


class _Loader(Loader):
    """Gives the import system a module that exists already."""

    def __init__(self, made: ModuleType) -> None:
        self._made = made

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._made

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


class Replaced(MetaPathFinder):
    """Our modules, installed or not.

    Args:
        modules: what stands in for modules of these names, also where they are installed.
        packages: what stands in for packages of these names where they are not installed; where
            they are, its names are put on them, and all else of theirs stays.
    """

    def __init__(self, modules: Sequence[ModuleType], packages: Sequence[ModuleType] = ()) -> None:
        self._modules = {made.__name__: made for made in modules}
        self._packages = {made.__name__: made for made in packages}
        self._after = [AfterImport(name, self._put_names) for name in self._packages]
        self._lock = threading.RLock()
        self._former: dict[str, ModuleType] | None = None
        self._former_names: list[tuple[ModuleType, dict[str, Any]]] = []

    def install(self) -> None:
        """Puts the modules in their places; twice is once."""
        with self._lock:
            if self._former is None:
                self._former = self._take_out()
                for name in self._former:
                    self._set_attribute(name, self._modules[name])
                for watcher in self._after:
                    watcher.enter()
                sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Puts back what was there before; names that a program took stay ours."""
        with self._lock:
            if self._former is None:
                return
            sys.meta_path.remove(self)
            for watcher in self._after:
                watcher.leave()
            self._take_out()
            sys.modules.update(self._former)
            for name in self._modules:
                self._give_back_attribute(name)
            while self._former_names:
                self._give_back_names(*self._former_names.pop())
            self._former = None

    def _take_out(self) -> dict[str, ModuleType]:
        """Removes ours, and what stands where ours belong; returns the latter."""
        ours = {id(made) for made in (*self._modules.values(), *self._packages.values())}
        found = {
            name: made
            for name, made in sys.modules.items()
            if name in self._modules or id(made) in ours
        }
        for name in found:
            del sys.modules[name]
        return {name: made for name, made in found.items() if id(made) not in ours}

    def _put_names(self, package: ModuleType) -> None:
        """Puts ours on an installed package."""
        made = self._packages[package.__name__]
        ours = {name: getattr(made, name) for name in made.__all__ if name != "__path__"}
        theirs = {name: vars(package)[name] for name in ours if name in vars(package)}
        self._former_names.append((package, theirs))
        package.__dict__.update(ours)

    def _give_back_names(self, package: ModuleType, theirs: dict[str, Any]) -> None:
        for name in self._packages[package.__name__].__all__:
            if name in theirs:
                setattr(package, name, theirs[name])
            elif name != "__path__":
                delattr(package, name)

    def _set_attribute(self, name: str, made: ModuleType) -> None:
        package, _, leaf = name.rpartition(".")
        if hasattr(sys.modules.get(package), leaf):
            setattr(sys.modules[package], leaf, made)

    def _give_back_attribute(self, name: str) -> None:
        """The import system has set our module on its package."""
        package, _, leaf = name.rpartition(".")
        holder = sys.modules.get(package)
        if holder is None or getattr(holder, leaf, None) is not self._modules[name]:
            return
        if self._former and name in self._former:
            self._set_attribute(name, self._former[name])
        else:
            delattr(holder, leaf)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds ours, and packages where no others are installed."""
        if fullname in self._modules:
            is_package = any(name.startswith(f"{fullname}.") for name in self._modules)
            return ModuleSpec(fullname, _Loader(self._modules[fullname]), is_package=is_package)
        if fullname in self._packages and PathFinder.find_spec(fullname, path) is None:
            return ModuleSpec(fullname, _Loader(self._packages[fullname]), is_package=True)
        return None
