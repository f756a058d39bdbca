"""`torchkiln explain`: which machine code an operator would run, from where, and why."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from torchkiln_cli import _native
from torchkiln_cli._output import emit_json, emit_table
from torchkiln_cli.warm import UsageError, schemas_of


def parse_values(texts: Sequence[str]) -> dict[str, str]:
    """The pairs of `name=value` arguments."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise UsageError(f"VALUES must look like k=1000; got {name}{equals}{value}")
    return {name: value for name, _, value in pairs}


def where(target: str | None, device: int) -> dict[str, Any]:
    """The part of a request that names a GPU: one that is here, unless a target is given."""
    return {"target": target} if target else {"device": device}


def kernels(
    operator: str, values: Mapping[str, str], dtypes: Sequence[str] | None, place: dict[str, Any]
) -> dict[str, Any]:
    """Asks the engine; UsageError names what is known."""
    _native.load_operators()
    try:
        return _native.control(
            "explain", operator=operator, values=dict(values), dtypes=dtypes, **place
        )
    except _native.ControlError as error:
        schema = schemas_of([operator])[0] if error.argument == "ops" else operator
        if schema != operator:
            return kernels(schema, values, dtypes, place)
        if error.is_usage:
            raise UsageError(str(error)) from error
        if "device" in place:
            raise UsageError(f"{error} Or name a GPU that is not here: --arch sm_90") from error
        raise


def emit(operator: str, reply: dict[str, Any], as_json: bool) -> None:
    """Prints a table, the sentences that are the same for many rows once below it."""
    if as_json:
        emit_json(reply)
        return
    rows = reply["kernels"]
    emit_table(
        f"{operator} on sm_{reply['architecture']}: {len(rows)} kernels",
        ("specialisation", "layer", "runs as", "registers ", "spills ", "tunables"),
        [
            (
                row["text"],
                row["layer"],
                row.get("rung", {}).get("target", "-"),
                _number(row.get("registers")),
                _number(row.get("spill_bytes")),
                row["tunables_why"],
            )
            for row in rows
        ],
    )
    for sentence in dict.fromkeys(_sentences(rows)):
        click.echo(sentence)


def _sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    layers = [f"{row['layer']}: {row['why']}." for row in rows]
    rungs = [f"{r['rung']['target']}: {r['rung']['reason']}." for r in rows if "rung" in r]
    return layers + rungs + [row["ladder"] for row in rows]


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
