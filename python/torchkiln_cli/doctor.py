"""`torchkiln doctor`: looks at an installation and tries it; each problem comes with its fix.

A check is a function that yields findings. Checks do not depend on each other's success: with
NVRTC, the driver, torch or the cache missing, the others still say what they see.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchkiln_cli import _native, _output

_MINIMUM_TORCH = (2, 10)
_PROBE_SECONDS = 300
_LOW_SPACE = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it."""

    name: str
    status: str  # ok, warn or fail
    fact: str
    fix: str = ""


def examine() -> list[Finding]:
    """Runs every check."""
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check()
        except (_native.ControlError, _native.EngineMissingError) as error:
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(Finding(name, "fail", str(error)))
    return findings


def emit_json(findings: list[Finding]) -> None:
    """Prints findings for programs."""
    _output.emit_json({"findings": [dataclasses.asdict(f) for f in findings]})


def text(findings: list[Finding], report: bool = False) -> str:
    """Findings for people; a report has neither the home folder nor the host's name in it."""
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.status:4}  {finding.name}: {finding.fact}")
        if finding.fix:
            lines.append(f"      -> {finding.fix}")
    counts = {s: sum(f.status == s for f in findings) for s in ("ok", "warn", "fail")}
    lines.append(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    joined = "\n".join(lines)
    return f"```\n{_anonymous(joined)}\n```" if report else joined


def _anonymous(report: str) -> str:
    report = report.replace(str(Path.home()), "~")
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "<host>", report)


# --- versions -----------------------------------------------------------------------------------


def _library() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    python = f"Python {platform.python_version()}, {system}"
    yield Finding("torchkiln", "ok", f"{_native.version()}, {python}")


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
        yield Finding("torch", "ok", version)


def _nvrtc() -> Iterator[Finding]:
    install = "pip install 'torchkiln[compiler]', or point TORCHKILN_NVRTC_PATH at libnvrtc.so"
    candidates = _native.control("nvrtc", load=False)["candidates"]
    try:
        reply = _native.control("nvrtc", load=True)
    except _native.ControlError as error:
        looked = f" (looked at {', '.join(c['path'] for c in candidates)})" if candidates else ""
        yield Finding("NVRTC", "fail", f"{error}{looked}; only cached kernels can run", install)
        return
    used = reply.get("path") or (candidates[0]["path"] if candidates else "already loaded")
    known = {c["path"]: c for c in candidates}.get(used, {})
    details = [
        text
        for text in (
            str(used),
            str(known.get("why", "")),
            f"build {reply.get('compiler') or known.get('compiler') or 'unknown'}",
        )
        if text
    ]
    yield Finding("NVRTC", "ok", f"{reply['version']} ({', '.join(details)})")
    builtins = _builtins_beside(Path(str(used)))
    if builtins is not None:
        yield builtins
    others = [c["path"] for c in candidates if c["path"] != used]
    if others:
        yield Finding("other copies of NVRTC", "ok", f"not used: {', '.join(others)}")
    listed = ", ".join(f"sm_{number}" for number in reply["architectures"])
    yield Finding("NVRTC's architectures", "ok", listed)


def _builtins_beside(library: Path) -> Finding | None:
    if not library.is_absolute():
        return None
    found = sorted(library.resolve().parent.glob("libnvrtc-builtins.so*"))
    if found:
        return Finding("NVRTC's builtins", "ok", found[0].name)
    fix = "Reinstall nvidia-cuda-nvrtc; its two libraries belong into one folder"
    return Finding("NVRTC's builtins", "warn", f"none beside {library}", fix)


def _driver() -> Iterator[Finding]:
    try:
        reply = _native.control("driver")
    except _native.ControlError as error:
        fix = "Nothing to do on a machine without a GPU; elsewhere install the NVIDIA driver"
        yield Finding("driver", "warn", str(error), fix)
        return
    major, minor = reply["version"] // 1000, reply["version"] % 1000 // 10
    try:
        nvrtc = _native.control("nvrtc", load=True)
    except _native.ControlError:
        nvrtc = {"version": "0.0", "architectures": []}
    if major < int(nvrtc["version"].split(".")[0]):
        fact = f"knows CUDA {major}.{minor}, older than NVRTC {nvrtc['version']}"
        fix = f"Update the driver, or pip install 'nvidia-cuda-nvrtc-cu{major}'"
        yield Finding("driver", "warn", fact, fix)
    else:
        yield Finding("driver", "ok", f"knows CUDA {major}.{minor}")
    if not reply["devices"]:
        yield Finding("GPU", "warn", "the driver lists none", "Check CUDA_VISIBLE_DEVICES")
    for index, device in enumerate(reply["devices"]):
        number = 10 * device["major"] + device["minor"]
        name, fact = f"GPU {index}", f"{device['name']}, sm_{number}"
        if not nvrtc["architectures"] or number in nvrtc["architectures"]:
            yield Finding(name, "ok", fact)
        else:
            fix = "Install a newer nvidia-cuda-nvrtc"
            yield Finding(name, "warn", f"{fact}, which NVRTC {nvrtc['version']} lacks", fix)


# --- cache --------------------------------------------------------------------------------------


def _cache() -> Iterator[Finding]:
    reply = _native.control("cache.stat")
    entries = f"{reply['entries']} kernels, {_output.size_text(reply['bytes'])}"
    if reply.get("writable", True):
        yield Finding("cache", "ok", entries)
    else:
        fix = "Set TORCHKILN_CACHE_DIR to a folder of your own; until then kernels live in memory"
        yield Finding("cache", "fail", f"{reply['state']}; {entries}", fix)
    checks = _native.control("selftest.store")["checks"]
    root = next((Path(c["fact"]) for c in checks if c["name"] == "root" and c["ok"]), None)
    if root is not None and root.is_dir():
        yield from _folder(root)
    for check in checks:
        name = f"cache, {check['name']}"
        fix = "" if check["ok"] else "Set TORCHKILN_CACHE_DIR to a folder on a local disk"
        yield Finding(name, "ok" if check["ok"] else "fail", check["fact"], fix)


def _folder(root: Path) -> Iterator[Finding]:
    status = root.stat()
    mode = stat.S_IMODE(status.st_mode)
    owner = "yours" if status.st_uid == os.getuid() else f"owned by user {status.st_uid}"
    fact = f"{root}, {owner}, mode {mode:04o}, {_file_system(root)}"
    private = status.st_uid == os.getuid() and not mode & 0o022
    fix = "" if private else f"chown it to yourself and run: chmod 700 {root}"
    yield Finding("cache folder", "ok" if private else "fail", fact, fix)
    free = shutil.disk_usage(root).free
    enough = free >= _LOW_SPACE
    fix = "" if enough else "Free some space, or set TORCHKILN_CACHE_DIR to another disk"
    yield Finding("cache space", "ok" if enough else "warn", f"{_output.size_text(free)} free", fix)


def _file_system(path: Path) -> str:
    """Type of the file system that holds a path: the longest mount point above it."""
    best, kind = "", "unknown file system"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind


# --- trying it ----------------------------------------------------------------------------------


@functools.cache
def _probe() -> dict[str, Any]:
    """The facts that need torch, from a process of its own with an empty cache."""
    try:
        numbers = _native.control("nvrtc", load=True)["architectures"]
    except _native.ControlError:
        numbers = []
    targets = sorted({n for n in (*numbers[:1], 90, *numbers[-1:]) if n in numbers})
    with tempfile.TemporaryDirectory(prefix="torchkiln-doctor-") as folder:
        command = [sys.executable, "-m", "torchkiln_cli._probe", *(f"sm_{n}" for n in targets)]
        environment = {**os.environ, "TORCHKILN_CACHE_DIR": folder}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"error": f"trying an operator took more than {_PROBE_SECONDS} seconds"}
    try:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"error": f"trying an operator ended with code {done.returncode}: {last[0]}"}
    return facts


def _compile() -> Iterator[Finding]:
    facts = _probe()
    if "error" in facts:
        fix = "python -c 'import torchkiln' shows the whole error"
        yield Finding("operators", "fail", facts["error"], fix)
        return
    for row in facts["compiles"]:
        name = f"compile for {row['name']}"
        if row["error"] is None:
            yield Finding(name, "ok", f"{row['specialization']}: {row['milliseconds']:.0f} ms")
        else:
            yield Finding(name, "fail", row["error"], "Reinstall nvidia-cuda-nvrtc")


def _launch() -> Iterator[Finding]:
    for row in _probe().get("gpus", []):
        if row["error"] is None:
            yield Finding(f"run on {row['name']}", "ok", "the same result as on the CPU")
        else:
            fix = "Run torchkiln verify --device cuda, and report what it prints"
            yield Finding(f"run on {row['name']}", "fail", row["error"], fix)


def _torchvision() -> Iterator[Finding]:
    if importlib.util.find_spec("torchvision") is None:
        yield Finding("torchvision", "ok", "not installed, and only its drop-in needs it")
        return
    facts = _probe().get("torchvision")
    if facts is None:
        return
    if facts["error"] is not None:
        fix = "Reinstall torchvision in a version that fits this torch"
        yield Finding("torchvision", "warn", facts["error"], fix)
    elif facts["healthy"]:
        yield Finding("torchvision", "ok", facts["version"])
    else:
        fact = f"{facts['version']} cannot load its library with this torch"
        fix = "torchkiln.compat.torchvision.install() before importing it, or install one that fits"
        yield Finding("torchvision", "warn", fact, fix)


# --- environment --------------------------------------------------------------------------------


def _environment() -> Iterator[Finding]:
    reply = _native.control("settings")
    known = [variable["name"] for variable in reply["variables"]]
    for warning in reply["values"].get("warnings", []):
        yield Finding("environment", "warn", warning, "Correct or unset it")
    for name in reply["unknown"]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}"
        yield Finding("environment", "warn", f"{name} is not a setting of torchkiln", fix)
    if not reply["unknown"]:
        count = sum(name in os.environ for name in known)
        yield Finding("environment", "ok", f"{count} TORCHKILN_* variables set, all known")


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _library,
    _torch,
    _nvrtc,
    _driver,
    _cache,
    _compile,
    _launch,
    _torchvision,
    _environment,
)
