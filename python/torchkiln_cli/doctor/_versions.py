"""What is installed, and whether the parts belong together."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchkiln_cli import _native
from torchkiln_cli.doctor import _trials
from torchkiln_cli.doctor._finding import REINSTALL, Finding, judge

_MINIMUM_TORCH = (2, 10)


def _library() -> Iterator[Finding]:
    version = _native.version()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding("torchkiln", "ok", f"{version}, Python {platform.python_version()}, {system}")
    try:
        package = importlib.metadata.version("torchkiln")
    except importlib.metadata.PackageNotFoundError:
        package = version  # built in place, without metadata
    if package != version:
        fact = f"the package is {package} and its engine library {version}"
        yield Finding("torchkiln's parts", "fail", fact, REINSTALL)
    folder = _native.package_folder()
    expected = f"libtorchkiln_ops-{version}.so"
    found = sorted(path.name for path in folder.glob("libtorchkiln_ops*.so"))
    there = f"; there is {', '.join(found)}" if found else ""
    fact = expected if expected in found else f"{expected} is missing in {folder}{there}"
    yield judge("operator library", expected in found, fact, REINSTALL)


def _torch() -> Iterator[Finding]:
    minimum = ".".join(map(str, _MINIMUM_TORCH))
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("torch", "fail", "not installed", f"pip install 'torch>={minimum}'")
        return
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < _MINIMUM_TORCH:
        fix = f"pip install --upgrade 'torch>={minimum}'"
        yield Finding("torch", "fail", f"{version}; torchkiln needs {minimum} or later", fix)
    else:
        yield Finding("torch", "ok", f"{version}, {_cuda_of_torch()}")


def _cuda_of_torch() -> str:
    """What torch was built for, read from its version file: importing torch takes a second."""
    spec = importlib.util.find_spec("torch")  # of a top-level name: runs nothing
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(folder) / "version.py"
        match = re.search(r"^cuda\b.*?=\s*'([\d.]+)'", _read(file), re.MULTILINE)
        if match:
            return f"built for CUDA {match[1]}"
    return "built without CUDA"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _nvrtc() -> Iterator[Finding]:
    install = "pip install 'torchkiln[compiler]', or point TORCHKILN_NVRTC_PATH at libnvrtc.so"
    candidates = _native.control("nvrtc", load=False)["candidates"]
    try:
        reply = _native.control("nvrtc", load=True)
    except _native.ControlError as error:
        looked = f" (looked at {', '.join(c['path'] for c in candidates)})" if candidates else ""
        yield Finding("NVRTC", "fail", f"{error}{looked}; only stored kernels can run", install)
        return
    used = reply["path"]
    known: dict[str, Any] = {c["path"]: c for c in candidates}.get(used, {})
    details = [used, known.get("why", ""), f"build {reply['compiler']}"]
    yield Finding("NVRTC", "ok", f"{reply['version']} ({', '.join(d for d in details if d)})")
    yield _builtins(Path(used), reply["version"])
    yield from _copies(used, [c["path"] for c in candidates if "/" in c["path"]])
    listed = ", ".join(f"sm_{number}" for number in reply["architectures"])
    yield Finding("NVRTC's architectures", "ok", listed)


def _builtins(library: Path, version: str) -> Finding:
    """NVRTC opens a second library at its first compile, and it must be of the same version."""
    names = sorted(p.name for p in library.resolve().parent.glob("libnvrtc-builtins.so.*"))
    good = any(name.partition(".so.")[2].startswith(version) for name in names)
    fact = ", ".join(names) or f"none beside {library}"
    if names and not good:
        fact += f" beside {library}, which is {version}"
    fix = "Reinstall nvidia-cuda-nvrtc; its two libraries belong into one folder"
    return judge("NVRTC's builtins", good, fact, fix)


def _copies(used: str, candidates: list[str]) -> Iterator[Finding]:
    """Which of several wins: here, and in a process that torch has filled with its own."""
    others = [path for path in candidates if path != used]
    if others:
        yield Finding("other copies of NVRTC", "ok", f"not used: {', '.join(others)}")
    with_torch = _trials.probe().get("nvrtc", {})
    if with_torch.get("error") is None and with_torch.get("path", used) != used:
        fact = f"{with_torch['path']} ({with_torch['version']}) wins once torch is loaded"
        fix = "Harmless: kernels of either serve both. TORCHKILN_NVRTC_PATH chooses one for all"
        yield Finding("NVRTC beside torch", "warn", fact, fix)


CHECKS = (_library, _torch, _nvrtc)
