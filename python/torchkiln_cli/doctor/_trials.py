"""Compiling, loading and running, tried in a process of its own on an empty cache."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from torchkiln_cli import _native
from torchkiln_cli.doctor._finding import REPORT, Finding, judge

_PROBE_SECONDS = 300
# Ten times what the slowest template should take on one core (docs/reports).
_SLOW_MILLISECONDS = 2500


@functools.cache
def probe() -> dict[str, Any]:
    """The facts that need torch; "error" alone when they could not be had."""
    try:
        numbers = _native.control("nvrtc", load=True)["architectures"]
    except (_native.ControlError, _native.EngineMissingError):
        numbers = []
    targets = [f"sm_{number}" for number in numbers if number >= 75]
    with tempfile.TemporaryDirectory(prefix="torchkiln-doctor-") as folder:
        command = [sys.executable, "-m", "torchkiln_cli._probe", *targets]
        environment = {**os.environ, "TORCHKILN_CACHE_DIR": folder}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_PROBE_SECONDS,
                check=False,
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
    facts = probe()
    if "error" in facts:
        fix = "python -c 'import torchkiln' shows the whole error"
        yield Finding("operators", "fail", facts["error"], fix)
        return
    failed = {row["name"]: row["error"] for row in facts["compiles"] if row["error"] is not None}
    for name, error in failed.items():
        yield Finding(f"compile for {name}", "fail", error, "Reinstall nvidia-cuda-nvrtc")
    times = {r["name"]: r["milliseconds"] for r in facts["compiles"] if r["name"] not in failed}
    if times:
        slowest = max(times, key=lambda name: times[name])
        fact = f"box_iou for {', '.join(times)}: {times[slowest]:.0f} ms at most ({slowest})"
        fix = "30 to 250 ms are usual: is the machine busy, or NVRTC on a network disk?"
        good = times[slowest] < _SLOW_MILLISECONDS
        yield judge("compile", good, fact, fix, bad="warn")


def _surroundings() -> Iterator[Finding]:
    """A thread with a small stack, a forked child, a folder full of traps."""
    for row in probe().get("surroundings", []):
        fact = row["fact"] if row["error"] is None else row["error"]
        yield judge(row["name"], row["error"] is None, fact, REPORT)


def _launch() -> Iterator[Finding]:
    for row in probe().get("gpus", []):
        fact = "the same result as on the CPU" if row["error"] is None else row["error"]
        fix = "Run torchkiln verify --device cuda, and report what it prints"
        yield judge(f"run on {row['name']}", row["error"] is None, fact, fix)


def _torchvision() -> Iterator[Finding]:
    if importlib.util.find_spec("torchvision") is None:
        yield Finding("torchvision", "ok", "not installed, and only its drop-in needs it")
        return
    facts = probe().get("torchvision")
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


CHECKS = (_compile, _surroundings, _launch, _torchvision)
