"""What of `mmcv.ops` is there: the table that the command and the documentation show."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from torchkiln.compat.mmcv import _tree
from torchkiln.compat.mmcv._names import MODULES, Name, public

__all__ = ["MISSING", "markdown", "problems", "rows"]

# The state of a name that raises when it is used.
MISSING = "not yet"
_KINDS = {"def": "function", "apply": "function", "function": "Function class", "class": "class"}


def rows() -> list[dict[str, str]]:
    """One row for each public name: name, module, kind, registry and state."""
    return [
        {
            "name": row.name,
            "module": f"mmcv.ops.{row.module}",
            "kind": _KINDS[row.kind],
            "registry": row.registry,
            "state": _state(row),
        }
        for row in sorted(public().values(), key=lambda row: (row.module, row.name))
    ]


def problems() -> list[str]:
    """A sentence for each name that does not resolve to what its row says; none is expected."""
    everything = [row for names in MODULES.values() for row in names.values()]
    return [sentence for row in everything for sentence in _problems(row)]


def markdown() -> str:
    """The table for the documentation."""
    lines = [
        f"{sum(bool(row.operator) for row in public().values())} of {len(public())} names work.",
        "",
        "| name | module | kind | state |",
        "|---|---|---|---|",
    ]
    for row in rows():
        registry = f", registered as `{row['registry']}`" if row["registry"] else ""
        module = row["module"].removeprefix("mmcv.ops.")
        lines.append(f"| `{row['name']}` | `{module}` | {row['kind']}{registry} | {row['state']} |")
    return "\n".join(lines) + "\n"


def _state(row: Name) -> str:
    if not row.operator:
        return MISSING
    if row.operator == "torch":
        return "plain tensor operations"
    return f"torchkiln.ops.{row.operator}"


def _problems(row: Name) -> Iterator[str]:
    try:
        value = getattr(_tree.modules()[f"mmcv.ops.{row.module}"], row.name)
    except Exception as error:  # whatever it is, it belongs into the report
        yield f"{row.path}: does not resolve: {error}"
        return
    if row.operator not in ("", "torch"):
        native = importlib.import_module("torchkiln.ops")
        if not hasattr(native, row.operator):
            yield f"{row.path}: there is no operator {row.operator}"
    called = value.apply if row.kind == "function" else value
    if _parameters(inspect.signature(called)) != _parameters(row.signature):
        yield f"{row.path}: must have the signature {row.signature}"
    forward = row.forward_signature
    if not row.operator or forward is None:
        return
    if _parameters(inspect.signature(value.forward)) != _parameters(forward):
        yield f"{row.path}.forward: must have the signature {forward}"


def _parameters(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
    """Without annotations, which are ours, and `self`, which stays in what is not bound."""
    values = [p for p in signature.parameters.values() if p.name != "self"]
    return [(p.name, p.kind, p.default) for p in values]
