"""The engine, without torch: loads `torchkiln._control` and never runs `torchkiln/__init__`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Kinds of torchkiln_error_kind that mean a wrong argument: type, value, index.
_USAGE_KINDS = (1, 2, 3)

# Installed packages name here the modules that declare kernels.
ENTRY_POINTS = "torchkiln.kernels"


class ControlError(Exception):
    """A command that the engine refused: one sentence, and the rest of its record."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record["message"])
        self.argument: str = record["argument"]
        self.details: dict[str, Any] = record["details"]
        self.is_usage: bool = record["kind"] in _USAGE_KINDS


class EngineMissingError(Exception):
    """The package, its libraries or torch are not installed as they should be."""


class ModuleError(Exception):
    """A module that `--import` names cannot be imported."""


def control(command: str, **request: Any) -> dict[str, Any]:
    """Runs a command of the engine; raises ControlError with its sentence."""
    module = _control()
    try:
        reply: dict[str, Any] = module.control(command, request)
    except RuntimeError:
        raise ControlError(module.last_error()) from None
    return reply


def version() -> str:
    """The version of the engine library."""
    return str(_control().version())


def package_folder() -> Path:
    """Where the compiled parts lie; in an editable install not beside the Python files."""
    return _find_control().parent


def cmake_dir() -> Path:
    """The folder that CMake's `find_package(torchkiln)` needs."""
    folder = package_folder() / "cmake"
    if not (folder / "torchkilnConfig.cmake").is_file():
        raise EngineMissingError(f"{folder} has no torchkilnConfig.cmake. Reinstall torchkiln")
    return folder


# What --import named, to be imported with the operators.
_modules: list[str] = []


def add_imports(modules: Sequence[str]) -> None:
    """Adds modules, or files of Python, that declare kernels."""
    _modules.extend(modules)


def load_users_kernels() -> None:
    """Does the same as `load_operators` where there may be kernels beside torchkiln's own."""
    if _modules or importlib.metadata.entry_points(group=ENTRY_POINTS):
        load_operators()


def load_operators() -> None:
    """Imports torchkiln, and with it torch; then the engine knows the operators' kernels.

    Kernels of users are declared, too: by modules that --import named, and by installed packages
    with an entry point in the group `torchkiln.kernels`.
    """
    _control()
    try:
        import torchkiln  # noqa: F401
    except ImportError as error:
        raise EngineMissingError(
            f"The operators cannot be loaded ({error}). "
            "Install torch 2.10 or later in this environment: pip install torch"
        ) from error
    # A command's stdout may be one JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            try:
                point.load()
            except Exception as error:  # somebody else's package; the command may not need it
                sys.stderr.write(
                    f"torchkiln: entry point {point.name} of {ENTRY_POINTS} cannot be loaded "
                    f"({type(error).__name__}: {error})\n"
                )
        while _modules:
            _import(_modules.pop(0))


def _import(name: str) -> None:
    # As `python -m` does it: a project is worked on in its own folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            importlib.import_module(name)
    except Exception as error:
        raise ModuleError(
            f"--import must name a module or a .py file that can be imported; got {name} "
            f"({type(error).__name__}: {error})"
        ) from error


def _import_file(path: Path) -> None:
    """Runs a program's file as a module, so that what is under `__main__` does not run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))  # where a program finds its own modules
    spec.loader.exec_module(module)


@functools.cache
def _control() -> ModuleType:
    name = "torchkiln._control"
    if name in sys.modules:
        return sys.modules[name]
    path = _find_control()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise EngineMissingError(
            f"{path} cannot be loaded: {error}. Reinstall torchkiln"
        ) from error
    sys.modules[name] = module  # `import torchkiln` will use this one
    return module


def _find_control() -> Path:
    spec = importlib.util.find_spec("torchkiln")  # of a top-level name: runs nothing
    # An editable install has two folders: the sources and what was built.
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(location) / f"_control{suffix}"
            if path.is_file():
                return path
    raise EngineMissingError(
        "torchkiln's compiled module is not installed for this Python. Reinstall torchkiln"
    )
