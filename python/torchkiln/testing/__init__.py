"""Compares the compiled operators with their references; needs no test framework.

`torchkiln verify` runs it on a user's machine, the test suite on ours.
"""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.testing._cases import FLOATS, Case, Inputs, Parity, find
from torchkiln.testing._parity import Result, check, verify
from torchkiln.testing._tolerance import TIERS, Difference, compare
from torchkiln.testing._workloads import LAYOUTS, Run, Sizes, Workload, runs

__all__ = [
    "FLOATS",
    "LAYOUTS",
    "TIERS",
    "Case",
    "Difference",
    "Inputs",
    "Parity",
    "Result",
    "Run",
    "Sizes",
    "Workload",
    "check",
    "compare",
    "find",
    "runs",
    "verify",
]
