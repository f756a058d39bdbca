"""A tunable that does not change the machine code would be measured for nothing."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import struct
from collections import defaultdict
from typing import Any

import pytest

from torchkiln import _control

pytestmark = pytest.mark.slow


def points() -> dict[str, list[dict[str, Any]]]:
    """Every point that an H200 can run, of the float32 variant with most of them, by kernel."""
    request = {"operators": None, "dtypes": ["float32"], "points": "all", "target": "sm_90"}
    tunables = {
        (kernel["path"], kernel["entry"]): [p["name"] for p in kernel["parameters"] if p["tunable"]]
        for kernel in _control.control("kernels", {})["kernels"]
    }
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in _control.control("expand", request)["specializations"]:
        names = tunables[row["path"], row["entry"]]
        row["point"] = {a["name"]: a["value"] for a in row["arguments"] if a["name"] in names}
        statics = [str(a["value"]) for a in row["arguments"] if a["name"] not in names]
        groups[(row["path"], row["entry"], *statics)].append(row)
    largest: dict[str, list[dict[str, Any]]] = {}
    for (path, entry, *_), rows in groups.items():
        name = f"{path}:{entry}"
        if len(rows) > len(largest.get(name, [])):
            largest[name] = rows
    return largest


SPACES = points()
TUNABLES = [(name, tunable) for name, rows in SPACES.items() for tunable in rows[0]["point"]]


def machine_code(cubin: bytes) -> bytes:
    """Instructions, in section ".text.<name>"; the name is no part of them: it tells the point."""
    sections, entry, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * entry) for i in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, size in headers:
        if cubin[strings + name :].startswith(b".text."):
            return cubin[offset : offset + size]
    raise AssertionError("a cubin without code")


def code_of(row: dict[str, Any]) -> bytes:
    reply = _control.control("compile", {"specialization": row, "target": "sm_90"})
    for entry in _control.control("cache.list", {})["entries"]:
        if entry["key"] == reply["key"]:
            with open(entry["path"], "rb") as file:
                content = file.read()
            return machine_code(content[content.index(b"\x7fELF") :])
    raise AssertionError(f"{row['text']} is not in the cache")


@pytest.mark.parametrize(("kernel", "tunable"), TUNABLES, ids=[f"{k}-{t}" for k, t in TUNABLES])
def test_every_tunable_changes_the_code(kernel: str, tunable: str) -> None:
    def others(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row["point"].items() if name != tunable}

    pairs = itertools.combinations(SPACES[kernel], 2)
    pair = next((p for p in pairs if others(p[0]) == others(p[1])), None)
    assert pair is not None, f"{tunable} has one value"
    first, second = (code_of(row) for row in pair)
    assert first != second, f"{pair[0]['text']} and {pair[1]['text']} are the same code"
