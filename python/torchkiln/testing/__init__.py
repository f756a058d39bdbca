"""Proves operators: ours and those of users. `docs/testing.md` is the guide.

`verify` compares our operators with their references on a user's machine. `Suite` makes a test
class of one operator's description; the `assert_` functions are its pieces, for tests of another
shape. Any callable that returns tensors can be tried, and none of it needs a GPU. Only `Suite`
needs pytest, and only `assert_opcheck` expecttest.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchkiln.testing._cases import FLOATS, Case, Failure, Inputs, Parity, find, prepare
from torchkiln.testing._checks import (
    assert_deterministic,
    assert_gradients,
    assert_inputs_unchanged,
    assert_outputs_whole,
    assert_thread_safe,
)
from torchkiln.testing._draw import Draw
from torchkiln.testing._graphs import (
    assert_autocast,
    assert_capturable,
    assert_compiles,
    assert_fake_equals_real,
    assert_one_graph,
    assert_opcheck,
    operator_calls,
    require_package,
)
from torchkiln.testing._layouts import LAYOUTS, emptied, lay_out, resized
from torchkiln.testing._parity import Result, assert_equals_reference, check, verify
from torchkiln.testing._tolerance import TIERS, Difference, compare
from torchkiln.testing._workloads import FORMATS, Run, Sizes, Workload, runs

if TYPE_CHECKING:
    from torchkiln.testing._suite import Suite

__all__ = [
    "FLOATS",
    "FORMATS",
    "LAYOUTS",
    "TIERS",
    "Case",
    "Difference",
    "Draw",
    "Failure",
    "Inputs",
    "Parity",
    "Result",
    "Run",
    "Sizes",
    "Suite",
    "Workload",
    "assert_autocast",
    "assert_capturable",
    "assert_compiles",
    "assert_deterministic",
    "assert_equals_reference",
    "assert_fake_equals_real",
    "assert_gradients",
    "assert_inputs_unchanged",
    "assert_one_graph",
    "assert_opcheck",
    "assert_outputs_whole",
    "assert_thread_safe",
    "check",
    "compare",
    "emptied",
    "find",
    "lay_out",
    "operator_calls",
    "prepare",
    "resized",
    "runs",
    "verify",
]


def __getattr__(name: str) -> Any:
    # On first use, because it needs pytest, which is no requirement of the package.
    if name == "Suite":
        require_package("pytest", "Suite")
        from torchkiln.testing._suite import Suite

        return Suite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
