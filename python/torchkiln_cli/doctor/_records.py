"""Tuning records: for which GPUs, measured with what, and whether more can be kept."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchkiln_cli import _native
from torchkiln_cli.doctor._finding import Finding, judge

_AGAIN = "They are used all the same; torchkiln tune measures them again"


def _records() -> Iterator[Finding]:
    reply = _native.control("records.stat")
    folder = reply["folder"] or "no folder"
    fix = "Set TORCHKILN_CACHE_DIR to a folder of your own; until then choices end with the process"
    total = sum(device["records"] for device in reply["devices"])
    fact = f"{total} in {folder}" + (
        "" if reply["writable"] else f", not writable: {reply['state']}"
    )
    yield judge("tuning records", reply["writable"], fact, fix, bad="warn")
    for device in reply["devices"]:
        yield _device(device)
    for file in reply["unreadable"]:
        fact = f"{file['path']}: {file['why']}"
        yield Finding("tuning records, unreadable", "warn", fact, "Remove it: it is not used")
    if _native.control("settings")["values"].get("tune") == "tune":
        fact = "TORCHKILN_TUNE=tune: first launches of every program measure"
        fix = "Unset it, and run torchkiln tune or torchkiln.autotune() once"
        yield Finding("tuning mode", "warn", fact, fix)


def _device(device: dict[str, Any]) -> Finding:
    """One GPU's records: how many, and which are older than what is installed."""
    name = f"tuning records of {device['device']}"
    fact = f"{device['records']} of {device['kernels']} kernels"
    if not device["here"]:
        fact += ", no GPU of this machine"
    stale = [
        f"{s['records']} measured with {s['field']} {s['recorded']}, now {s['now']}"
        for s in device["stale"]
    ]
    return judge(name, not stale, "; ".join([fact, *stale]), _AGAIN, bad="warn")


CHECKS = (_records,)
