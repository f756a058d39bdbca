"""`torchkiln verify`: prints what `torchkiln.testing.verify` finds."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import click

from torchkiln_cli import _native
from torchkiln_cli._output import emit_json, emit_table

_FIELDS = ("op", "case", "dtype", "direction", "error", "limit", "ok", "message")


def run(ops: list[str] | None, device: str, dtypes: list[str] | None, as_json: bool) -> bool:
    """Runs the checks and prints them; True when all passed. ValueError names what is known."""
    _native.load_operators()
    from torchkiln import testing

    results = [
        {name: getattr(result, name) for name in _FIELDS}
        for result in testing.verify(ops, device, dtypes)
    ]
    failed = [result for result in results if not result["ok"]]
    if as_json:
        emit_json({"device": device, "results": results})
    else:
        _emit_worst(results)
        for result in failed:
            where = " ".join(str(result[name]) for name in _FIELDS[:4])
            click.echo(f"{where}: {result['message']}", err=True)
        click.echo(f"{len(results)} checks on {device}, {len(failed)} failed.")
    return not failed


def _emit_worst(results: list[dict[str, Any]]) -> None:
    """One line for each operator, dtype and direction: the case that came nearest to its limit."""
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in results:
        key = (str(result["op"]), str(result["dtype"]), str(result["direction"]))
        if key not in worst or _ratio(result) > _ratio(worst[key]):
            worst[key] = result
    emit_table(
        "The case nearest to its limit",
        ("operator", "dtype", "direction", "case", "error ", "limit ", ""),
        [
            (
                *key,
                str(result["case"]),
                f"{result['error']:.1e}",
                f"{result['limit']:.1e}",
                "ok" if result["ok"] else "FAILED",
            )
            for key, result in worst.items()
        ],
    )


def _ratio(result: dict[str, Any]) -> float:
    if not result["ok"]:
        return float("inf")
    return float(result["error"]) / float(result["limit"]) if result["limit"] else 0.0
