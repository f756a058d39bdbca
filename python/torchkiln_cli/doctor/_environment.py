"""Variables, and files that stand in the way of what Python should import."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from torchkiln_cli import _native
from torchkiln_cli.doctor._finding import Finding

# What our processes import; a file of this name beside a script is imported instead.
_MODULES = ("torch", "torchkiln", "torchkiln_cli", "click", "rich", "numpy")


def _environment() -> Iterator[Finding]:
    reply = _native.control("settings")
    known = [variable["name"] for variable in reply["variables"]]
    warnings = reply["values"].get("warnings", [])
    for warning in warnings:
        yield Finding("environment", "warn", warning, "Correct or unset it")
    for name in reply["unknown"]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}"
        yield Finding("environment", "warn", f"{name} is not a setting of torchkiln", fix)
    if not reply["unknown"] and not warnings:
        count = sum(name in os.environ for name in known)
        yield Finding("environment", "ok", f"{count} TORCHKILN_* variables set, all known")


def _imports() -> Iterator[Finding]:
    folder = Path.cwd()
    for path in _shadows(folder):
        fact = f"{path} is imported instead of the installed {path.stem} by programs started here"
        yield Finding("working directory", "fail", fact, "Rename it, or start elsewhere")
    copies = _copies("torchkiln")
    if len(copies) > 1:
        fact = f"{len(copies)} on the path: {', '.join(copies)}"
        yield Finding("copies of torchkiln", "fail", fact, "Keep one; pip uninstall torchkiln")


def _shadows(folder: Path) -> Iterator[Path]:
    # Where the packages themselves lie, nothing shadows them.
    if (folder / "torchkiln_cli" / "_native.py").is_file():
        return
    for name in _MODULES:
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file():
                yield path if path.suffix == ".py" and path.stem == name else path.parent


def _copies(package: str) -> list[str]:
    """Folders of Python's path that hold the package, each once."""
    found = [Path(entry or ".") / package for entry in sys.path]
    real = (path.resolve() for path in found if (path / "__init__.py").is_file())
    return list(dict.fromkeys(map(str, real)))


CHECKS = (_environment, _imports)
