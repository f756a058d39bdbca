"""What the built libraries ask of the loader, and what they show to it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
# Before glibc 2.34 these were libraries of their own.
SYSTEM |= {"libdl.so.2", "libpthread.so.0", "librt.so.1"}
SYSTEM_SYMBOL = re.compile(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC)_|^(__gmon_start__|_ITM_\w+)$")
# torch's stable ABI is a set of C functions; a CPU build has none of those for CUDA.
TORCH_SHIM = re.compile(r"^(torch_|aoti_torch_(?!cuda_))\w+$")


def folder() -> Path:
    """The folder of the installed libraries; in an editable install, not that of the sources."""
    return Path(importlib.import_module("torchkiln._control").__file__ or "").parent


def library(name: str) -> Path:
    """The one installed library of a name; its version is part of the file name."""
    (path,) = folder().glob(f"{name}-[0-9]*.so")
    return path


def dynamic(path: Path, tag: str) -> set[str]:
    """The values of one kind in the dynamic section of an ELF file."""
    text = subprocess.run(
        ["readelf", "-dW", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return set(re.findall(rf"\({tag}\)[^\[]*\[([^\]]*)\]", text))


def symbols(path: Path, option: str) -> dict[str, str]:
    """Dynamic symbols with their version, each with the letter of its kind."""
    text = subprocess.run(
        ["nm", "-D", option, str(path)], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in text.splitlines()]
    return {row[-1]: row[-2] for row in rows}


def test_engine_needs_only_the_system() -> None:
    assert dynamic(library("libtorchkiln"), "NEEDED") <= SYSTEM


def test_operators_need_the_engine_and_torch_by_name() -> None:
    needed = dynamic(library("libtorchkiln_ops"), "NEEDED") - SYSTEM
    assert needed == {library("libtorchkiln").name, "libtorch_cpu.so"}


def test_control_module_needs_the_engine_only() -> None:
    (control,) = folder().glob("_control.*.so")
    assert dynamic(control, "NEEDED") - SYSTEM == {library("libtorchkiln").name}


@pytest.mark.parametrize("name", ["libtorchkiln", "libtorchkiln_ops"])
def test_library_is_named_by_its_version_and_finds_its_neighbours(name: str) -> None:
    path = library(name)
    assert dynamic(path, "SONAME") == {path.name}
    assert dynamic(path, "RUNPATH") | dynamic(path, "RPATH") <= {"$ORIGIN"}


@pytest.mark.parametrize("name", ["libtorchkiln", "libtorchkiln_ops"])
def test_library_names_no_folder_of_the_machine_that_built_it(name: str) -> None:
    assert str(ROOT).encode() not in library(name).read_bytes()


def test_engine_exports_the_c_abi_and_nothing_else() -> None:
    header = (ROOT / "include/torchkiln/torchkiln.h").read_text()
    declared = set(re.findall(r"^TORCHKILN_API\b[^;(]*?(torchkiln_\w+)\(", header, re.MULTILINE))
    assert declared
    assert set(symbols(library("libtorchkiln"), "--defined-only")) == declared


def test_operators_export_only_c_symbols_of_ours() -> None:
    exported = symbols(library("libtorchkiln_ops"), "--defined-only")
    assert [name for name in exported if not name.startswith("torchkiln_")] == []


def test_operators_ask_only_for_the_stable_abi() -> None:
    engine = set(symbols(library("libtorchkiln"), "--defined-only"))
    undefined = symbols(library("libtorchkiln_ops"), "--undefined-only")
    # A weak symbol may be missing: it is how newer functions of torch are used where they exist.
    unexpected = [
        name
        for name in undefined
        if not (SYSTEM_SYMBOL.search(name) or TORCH_SHIM.match(name) or name in engine)
    ]
    assert unexpected == []
