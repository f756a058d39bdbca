"""`torchkiln doctor`: looks at an installation and tries it; each problem comes with its fix.

A check is a function that yields findings. Checks do not depend on each other's success: with
NVRTC, the driver, torch or the cache missing, the others still say what they see.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from torchkiln_cli import _native, _output
from torchkiln_cli.doctor import (
    _bundles,
    _cache,
    _environment,
    _gpu,
    _records,
    _trials,
    _versions,
)
from torchkiln_cli.doctor._finding import REINSTALL, REPORT, Finding

_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *_versions.CHECKS,
    *_gpu.CHECKS,
    *_cache.CHECKS,
    *_bundles.CHECKS,
    *_records.CHECKS,
    *_trials.CHECKS,
    *_environment.CHECKS,
)


def examine() -> list[Finding]:
    """Runs every check."""
    findings: list[Finding] = []
    for check in _CHECKS:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            findings += check()
        except _native.EngineMissingError as error:
            findings.append(Finding(name, "fail", str(error), REINSTALL))
        except _native.ControlError as error:
            findings.append(Finding(name, "fail", str(error), REPORT))
        except OSError as error:
            findings.append(Finding(name, "warn", f"could not be looked at: {error}", REPORT))
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
    try:
        home = str(Path.home())
    except RuntimeError:  # a user without one
        home = ""
    if home not in ("", "/"):
        report = report.replace(home, "~")
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "<host>", report)
