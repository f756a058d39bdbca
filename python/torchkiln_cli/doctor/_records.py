"""Tuning records: for which GPUs, measured with what, and whether more can be kept."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torchkiln_cli import _native
from torchkiln_cli.doctor._finding import Finding, judge

_AGAIN = "They are used all the same; torchkiln tune measures them again"


def _records() -> Iterator[Finding]:
    reply = _native.control("records.examine")
    files = reply["files"]
    fact = f"{sum(file['records'] for file in files)} in {len(files)} files"
    if not reply["writable"]:
        fact += f"; no more can be kept: {reply['state']}"
    fix = "Set TORCHKILN_CACHE_DIR to a folder of your own; until then choices end with the process"
    yield judge("tuning records", reply["writable"], fact, fix, bad="warn")
    by_device: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        if file["device"] is not None:
            by_device.setdefault(json.dumps(file["device"], sort_keys=True), []).append(file)
        if file["device"] is None or file["unreadable"]:
            yield _unreadable(file)
    for number, of_device in enumerate(by_device.values(), start=1):
        yield _device(number, of_device, of_device[0]["device"] in reply["devices"])
    if _native.control("settings")["values"].get("tune") == "tune":
        fact = "TORCHKILN_TUNE=tune: first launches of every program measure"
        fix = "Unset it, and run torchkiln tune or torchkiln.autotune() once"
        yield Finding("tuning mode", "warn", fact, fix)


def _unreadable(file: dict[str, Any]) -> Finding:
    if file["device"] is None:
        fact = f"{file['file']}: it names no device, and is not used"
    else:
        fact = f"{file['file']}: {file['unreadable']} lines cannot be read, and are not used"
    return Finding(f"tuning records, {file['file']}", "warn", fact, "Remove the file")


def _device(number: int, files: list[dict[str, Any]], is_here: bool) -> Finding:
    """One kind of GPU: how many records, and which are older than what is installed."""
    device = files[0]["device"]
    records = sum(file["records"] for file in files)
    fact = f"{device['name']}, sm_{device['architecture']}: {records} of {len(files)} templates"
    fact += "" if is_here else ", of no GPU of this machine"
    stale = [
        f"{s['records']} measured with {s['field']} {s['recorded']}, now {s['now']}"
        for file in files
        for s in file["stale"]
    ]
    name = f"tuning records of GPU kind {number}"
    return judge(name, not stale, "; ".join([fact, *stale]), _AGAIN, bad="warn")


CHECKS = (_records,)
