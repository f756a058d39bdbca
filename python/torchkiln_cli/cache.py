"""`torchkiln cache ...`: what the cache holds, and emptying it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
from typing import Any

import click

from torchkiln_cli import _native
from torchkiln_cli._output import emit_json, emit_table, size_text


def stat(as_json: bool) -> None:
    """Prints the state of the cache."""
    reply = _native.control("cache.stat")
    if as_json:
        emit_json(reply)
        return
    for name, value in reply.items():
        text = size_text(value) if name.endswith("bytes") else str(value)
        click.echo(f"{name.removesuffix('_bytes').replace('_', ' '):18}{text}")


def list_entries(as_json: bool) -> None:
    """Prints every entry."""
    reply = _native.control("cache.list")
    entries: list[dict[str, Any]] = sorted(
        reply["entries"], key=lambda entry: int(entry["used"]), reverse=True
    )
    if as_json:
        emit_json({"entries": entries})
        return
    emit_table(
        f"{len(entries)} kernels",
        ("specialisation", "arch", "registers ", "bytes ", "last used", "compiler"),
        [
            (
                entry.get("specialization") or entry["key"][:16],
                entry.get("arch", ""),
                str(entry.get("registers", "")),
                size_text(entry["bytes"]),
                datetime.datetime.fromtimestamp(entry["used"]).strftime("%Y-%m-%d %H:%M"),
                entry["compiler"].rsplit("-", 2)[0],
            )
            for entry in entries
        ],
    )


def clear(yes: bool, as_json: bool) -> None:
    """Empties the cache, after a question unless `yes`."""
    if not yes:
        count = _native.control("cache.stat")["entries"]
        click.confirm(f"Remove {count} compiled kernels?", abort=True, err=True)
    reply = _native.control("cache.clear")
    if as_json:
        emit_json(reply)
    else:
        click.echo(f"Freed {size_text(reply['freed_bytes'])}.")
