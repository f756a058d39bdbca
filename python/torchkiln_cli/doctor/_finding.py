"""One line of the doctor's report."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses

REINSTALL = "Reinstall torchkiln: pip install --force-reinstall --no-deps torchkiln"
REPORT = "Report this with the output of torchkiln doctor --report"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do about it."""

    name: str
    status: str  # ok, warn or fail
    fact: str
    fix: str = ""


def judge(name: str, good: bool, fact: str, fix: str, bad: str = "fail") -> Finding:
    """A finding whose fix is only named when it is needed."""
    return Finding(name, "ok" if good else bad, fact, "" if good else fix)
