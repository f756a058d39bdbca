"""The arrows of the design: which room may include or import which other one."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP_SUFFIXES = {".h", ".hpp", ".cpp", ".cuh"}

# Room -> rooms of ours that it may include.
ARROWS = {
    "cache": {"cache"},
    "kernel_templates": {"kernel_templates"},
    "jit": {"jit", "cache", "include"},
    "include": {"include"},
    "bindings": {"bindings", "include", "kernel_templates"},
    "bindings/python_module": {"bindings/python_module", "include"},
}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', re.MULTILINE)
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
STABLE_TORCH = re.compile(r"^torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/")
# Compiled by users against the torch that they have.
FULL_TORCH = "include/torchkiln/autograd.hpp"
CUDA = re.compile(r"^(cuda|nvrtc|nvJitLink|cub/|thrust/|cooperative_groups)")


def room_of(path: str) -> str | None:
    """Returns the room of a file, given relative to the root, or None outside of all rooms."""
    rooms = [room for room in ARROWS if path.startswith(room + "/")]
    return max(rooms, key=len, default=None)


def resolve(includer: str, name: str) -> str | None:
    """Finds the file that an include line names as the compiler does; None if it is not ours."""
    folders = [str(Path(includer).parent), ".", "include", "kernel_templates"]
    candidates = (Path(folder) / name for folder in folders)
    return next((path.as_posix() for path in candidates if (ROOT / path).is_file()), None)


def forbidden_include(includer: str, quote: str, name: str) -> str | None:
    """Says why an include line is not allowed; None if it is."""
    room = room_of(includer)
    assert room is not None
    target = resolve(includer, name)
    if target is not None:
        if room_of(target) not in ARROWS[room]:
            return f"{room} must not depend on {target}"
        if target.endswith(".cuh") and room != "kernel_templates":
            return f"{target} is for the GPU compiler only"
        return None
    if room == "kernel_templates":
        return "kernel templates include only each other"
    if CUDA.match(name):
        return "no file of a CUDA toolkit may be read"
    if TORCH.match(name):
        if includer == FULL_TORCH:
            return None
        if room != "bindings":
            return "torch headers belong in bindings/ only"
        return None if STABLE_TORCH.match(name) else "only torch's stable ABI is allowed"
    return "no such file" if quote == '"' else None


def forbidden_includes(includer: str, text: str) -> Iterator[str]:
    """Yields one line for each include line of a file that is not allowed."""
    for match in INCLUDE.finditer(text):
        reason = forbidden_include(includer, match[1], match[2])
        if reason:
            yield f"{includer}: {match[0].strip()}: {reason}"


def test_include_lines_follow_the_arrows() -> None:
    files = [
        path.relative_to(ROOT).as_posix()
        for room in ARROWS
        for path in (ROOT / room).rglob("*")
        if path.suffix in CPP_SUFFIXES
    ]
    assert files
    texts = {name: (ROOT / name).read_text() for name in sorted(files)}
    bad = [line for name, text in texts.items() for line in forbidden_includes(name, text)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("includer", "line"),
    [
        ("cache/x.cpp", '#include "jit/spec/embedded.h"'),
        ("jit/x.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("jit/x.cpp", "#include <cuda.h>"),
        ("bindings/detection/x.cpp", '#include "jit/spec/embedded.h"'),
        ("bindings/detection/x.cpp", "#include <torch/extension.h>"),
        ("bindings/detection/x.cpp", "#include <ATen/ATen.h>"),
        ("bindings/python_module/x.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("kernel_templates/common/x.h", "  #  include <cmath>"),
        ("cache/x.cpp", '#include "cache/missing.h"'),
        ("include/torchkiln/torchkiln.hpp", "#include <ATen/ATen.h>"),
    ],
)
def test_a_forbidden_include_is_found(includer: str, line: str) -> None:
    assert list(forbidden_includes(includer, f"// first line\n{line}\n"))


@pytest.mark.parametrize(
    ("includer", "line"),
    [
        ("jit/x.cpp", '#include "jit/spec/embedded.h"'),
        ("jit/x.cpp", "#include <nlohmann/json.hpp>"),
        ("bindings/detection/x.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("bindings/detection/x.cpp", "#include <torch/csrc/inductor/aoti_torch/c/shim.h>"),
    ],
)
def test_an_allowed_include_passes(includer: str, line: str) -> None:
    assert not list(forbidden_includes(includer, line))


# --- Python ---------------------------------------------------------------------------------------


def is_type_checking(node: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt], inside_functions: bool) -> Iterator[ast.stmt]:
    """Yields the statements that run on import, and those of functions if asked for."""
    for node in body:
        if is_type_checking(node):
            continue
        yield node
        if not inside_functions and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), inside_functions)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, inside_functions)


def imports(path: Path, text: str, inside_functions: bool) -> Iterator[str]:
    """Yields the full names of the modules that a file of python/ imports."""
    package = path.with_suffix("").parts[:-1]
    for node in statements(ast.parse(text).body, inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def names_under(name: str, package: str) -> bool:
    """Whether a module is a package or lies in it."""
    return name == package or name.startswith(package + ".")


def forbidden_imports(path: Path, text: str) -> Iterator[str]:
    """Yields one line for each import of a file, given relative to python/, that is not allowed."""
    if path.parts[0] == "torchkiln_cli":
        names = imports(path, text, inside_functions=False)
        heavy = [n for n in names if names_under(n, "torch") or names_under(n, "torchkiln")]
        rule = "the command line imports it where it is needed, not at the top"
        yield from (f"{path}: {n}: {rule}" for n in heavy)
        return
    everywhere = set(imports(path, text, inside_functions=True))
    if path.name != "__main__.py":
        rule = "the library does not know its command line"
        yield from (f"{path}: {n}: {rule}" for n in everywhere if names_under(n, "torchkiln_cli"))
    if path.parts[:2] == ("torchkiln", "reference"):
        rule = "a reference shares nothing with what it judges"
        yield from (f"{path}: {n}: {rule}" for n in everywhere if names_under(n, "torchkiln.ops"))


def test_import_lines_follow_the_arrows() -> None:
    files = sorted((ROOT / "python").rglob("*.py"))
    assert files
    relative = [(path.relative_to(ROOT / "python"), path.read_text()) for path in files]
    bad = [line for path, text in relative for line in forbidden_imports(path, text)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("torchkiln_cli/main.py", "import torch"),
        ("torchkiln_cli/main.py", "try:\n  from torchkiln import ops\nexcept ImportError:\n  pass"),
        ("torchkiln_cli/main.py", "import click\nclass A:\n  import torch.nn"),
        ("torchkiln/ops/x.py", "def f():\n  import torchkiln_cli"),
        ("torchkiln/reference/detection/x.py", "from ...ops import nms"),
        ("torchkiln/reference/detection/x.py", "from torchkiln import ops"),
    ],
)
def test_a_forbidden_import_is_found(path: str, text: str) -> None:
    assert list(forbidden_imports(Path(path), text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("torchkiln_cli/main.py", "import torchkiln_cli.cache\ndef f():\n  import torch"),
        ("torchkiln_cli/main.py", "if TYPE_CHECKING:\n  import torch"),
        ("torchkiln/__main__.py", "from torchkiln_cli.main import cli"),
        ("torchkiln/reference/detection/x.py", "import torch\nfrom . import boxes"),
    ],
)
def test_an_allowed_import_passes(path: str, text: str) -> None:
    assert not list(forbidden_imports(Path(path), text))
