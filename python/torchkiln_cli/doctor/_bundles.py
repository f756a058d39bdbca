"""Bundles that this process would use: whole, complete, and for this version."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchkiln_cli import _native, _output
from torchkiln_cli.doctor._finding import Finding, judge

_AGAIN = "Make it again with this version: torchkiln bundle create"


def _bundles() -> Iterator[Finding]:
    reply = _native.control("bundles")
    for refused in reply["refused"]:
        yield Finding("bundle", "fail", f"{refused['path']}: {refused['why']}", _AGAIN)
    for bundle in reply["bundles"]:
        yield _examined(_native.control("bundle.verify", path=bundle["path"]))
    mode = _native.control("settings")["values"].get("jit", "allow")
    if mode == "forbid" and not reply["bundles"]:
        fact = "TORCHKILN_JIT=forbid without a bundle: only what the cache holds can run"
        fix = "Name a bundle in TORCHKILN_BUNDLES, or set TORCHKILN_JIT=allow"
        yield Finding("bundles", "warn", fact, fix)


def _examined(proof: dict[str, Any]) -> Finding:
    path = proof["path"]
    if proof["problems"]:
        first = proof["problems"][0]
        count = f"{len(proof['problems'])} of {proof['objects']} objects"
        fact = f"{path}: {count} cannot be used; {first['object']}: {first['why']}"
        return Finding("bundle", "fail", fact, _AGAIN)
    architectures = ", ".join(proof["architectures"])
    fact = f"{path}: {proof['objects']} kernels for {architectures}, "
    fact += f"{_output.size_text(proof['bytes'])}, by {', '.join(proof['compilers'])}"
    missing = proof["missing"]
    if missing:
        first = f"{missing[0]['specialization']}@{missing[0]['arch']}"
        fact += f"; {len(missing)} are not there for each of them, such as {first}"
    return judge("bundle", not missing, fact, _AGAIN, bad="warn")


CHECKS = (_bundles,)
