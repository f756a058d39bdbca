"""`torchkiln bundle ...`: one file with everything that a program needs on its GPUs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from typing import Any

import click

from torchkiln_cli import _native, warm
from torchkiln_cli._output import emit_json, emit_table, size_text

_SHOWN = 10  # lines of a list of problems


def create(
    out: str,
    selection: warm.Selection,
    architectures: Sequence[str],
    jobs: int | None,
    as_json: bool,
) -> bool:
    """Compiles what is selected and writes it as a bundle; whether that worked.

    Nothing is written unless everything is there. Only objects of the NVRTC that is installed
    count, so that the same request gives the same bytes whatever the cache held before.
    """
    work, unknown = warm.work_of(selection, architectures)
    outcome = warm.compile_work(work, jobs, "bundle", own_compiler=True)
    outcome.rows += unknown
    outcome.total += len(unknown)
    bundle: dict[str, Any] | None = None
    if outcome.complete:
        items = [{"specialization": s, "target": arch} for s, arch in work]
        bundle = _native.control("bundle.create", out=os.path.abspath(out), items=items)
    if as_json:
        emit_json({"bundle": bundle, "kernels": [row.to_json() for row in outcome.rows]})
    else:
        warm.emit_failures(outcome)
        click.echo(outcome.summary())
        click.echo(_written(bundle) if bundle else f"{out} was not written.")
    return bundle is not None


def merge(out: str, inputs: Sequence[str], as_json: bool) -> None:
    """Writes one bundle with the objects of all."""
    bundle = _native.control(
        "bundle.merge", out=os.path.abspath(out), inputs=[os.path.abspath(path) for path in inputs]
    )
    if as_json:
        emit_json({"bundle": bundle})
    else:
        click.echo(_written(bundle))


def list_objects(path: str, as_json: bool) -> None:
    """Prints every object."""
    reply = _native.control("bundle.list", path=os.path.abspath(path))
    if as_json:
        emit_json(reply)
        return
    emit_table(
        f"{len(reply['objects'])} kernels, {size_text(reply['bytes'])}",
        ("specialisation", "arch", "registers ", "spilled ", "bytes ", "compiler"),
        [
            (
                row["specialization"],
                row["arch"],
                _number(row["registers"]),
                _number(row["spill_bytes"]),
                size_text(row["bytes"]),
                row["compiler"].rsplit("-", 2)[0],
            )
            for row in reply["objects"]
        ],
    )


def verify(
    path: str, manifest: str | None, architectures: Sequence[str] | None, as_json: bool
) -> bool:
    """Proves that a bundle is whole and complete; whether it is."""
    _native.load_users_kernels()
    reply = _native.control(
        "bundle.verify",
        path=os.path.abspath(path),
        manifest=None if manifest is None else os.path.abspath(manifest),
        architectures=None if architectures is None else list(architectures),
    )
    good = not reply["problems"] and not reply["missing"]
    if as_json:
        emit_json({"ok": good, **reply})
        return good
    click.echo(
        f"{reply['objects']} kernels ({reply['specializations']} specialisations for "
        f"{', '.join(reply['architectures']) or 'no architecture'}), {size_text(reply['bytes'])}, "
        f"by {', '.join(name.rsplit('-', 2)[0] for name in reply['compilers']) or 'no compiler'}."
    )
    _emit_some(f"{row['object']}: {row['why']}" for row in reply["problems"])
    if reply["missing"]:
        by_text = collections.defaultdict(list)
        for row in reply["missing"]:
            by_text[row["specialization"]].append(row["arch"])
        _emit_some(f"missing: {text} for {', '.join(names)}" for text, names in by_text.items())
    if reply["spilling"]:
        most = max(reply["spilling"], key=lambda row: int(row["spill_bytes"]))
        click.echo(
            f"{len(reply['spilling'])} kernels spill registers, at most {most['spill_bytes']} "
            f"bytes: {most['specialization']}@{most['arch']}."
        )
    click.echo("Complete: code, architectures, symbols and keys are right." if good else "Not fit.")
    return good


def _emit_some(lines: Any) -> None:
    shown = list(lines)
    for line in shown[:_SHOWN]:
        click.echo(line, err=True)
    if len(shown) > _SHOWN:
        click.echo(f"and {len(shown) - _SHOWN} more; --json lists all", err=True)


def _written(bundle: dict[str, Any]) -> str:
    return f"{bundle['path']}: {bundle['objects']} kernels, {size_text(bundle['bytes'])}."


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
