"""`torchkiln verify`: prints what `torchkiln.testing.verify` finds."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import click

from torchkiln_cli import _native
from torchkiln_cli._output import emit_json, emit_table

_FIELDS = ("op", "case", "dtype", "direction", "error", "limit", "ok", "message", "label")


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
        _emit_worst([result for result in results if not result["label"]])
        _emit_labelled([result for result in results if result["label"]])
        for result in failed:
            where = " ".join(str(result[name]) for name in _FIELDS[:4])
            click.echo(f"{where}: {result['message']}", err=True)
        click.echo(f"{len(results)} checks on {device}, {len(failed)} failed.")
    return not failed


def _emit_worst(results: list[dict[str, Any]]) -> None:
    """One line for each operator, dtype and direction: the case that came nearest to its limit."""
    if not results:
        return
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


def _emit_labelled(results: list[dict[str, Any]]) -> None:
    """A table for each operator with variants: a row for each of them and dtype."""
    for op in dict.fromkeys(str(result["op"]) for result in results):
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for result in results:
            if result["op"] == op:
                row = rows.setdefault((str(result["label"]), str(result["dtype"])), {})
                direction = str(result["direction"])
                row[direction] = max(row.get(direction, 0.0), _ratio(result))
        directions = list(dict.fromkeys(name for row in rows.values() for name in row))
        emit_table(
            f"{op}: the worst error of all cases in parts of its limit",
            ("variant", "dtype", *(_heading(name) for name in directions)),
            [(*key, *(_part(row.get(name)) for name in directions)) for key, row in rows.items()],
        )


def _heading(direction: str) -> str:
    """In several lines, to be as narrow as the numbers."""
    return direction.replace("gradient", "d").replace(" ", "\n") + " "


def _part(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "FAILED" if ratio == float("inf") else f"{ratio:.0e}"


def _ratio(result: dict[str, Any]) -> float:
    if not result["ok"]:
        return float("inf")
    return float(result["error"]) / float(result["limit"]) if result["limit"] else 0.0
