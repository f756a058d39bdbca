"""The engine, without torch: loads `torchkiln._control` and never runs `torchkiln/__init__`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Kinds of torchkiln_error_kind that mean a wrong argument: type, value, index.
_USAGE_KINDS = (1, 2, 3)


class ControlError(Exception):
    """A command that the engine refused: one sentence, and the rest of its record."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record["message"])
        self.argument: str = record["argument"]
        self.details: dict[str, Any] = record["details"]
        self.is_usage: bool = record["kind"] in _USAGE_KINDS


class EngineMissingError(Exception):
    """The package, its libraries or torch are not installed as they should be."""


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


def load_operators() -> None:
    """Imports torchkiln, and with it torch; then the engine knows the operators' kernels."""
    _control()
    try:
        import torchkiln  # noqa: F401
    except ImportError as error:
        raise EngineMissingError(
            f"The operators cannot be loaded ({error}). "
            "Install torch 2.10 or later in this environment: pip install torch"
        ) from error


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
