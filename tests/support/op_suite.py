"""One description of an operator gives all of its tests.

    class TestBoxIou(OpSuite):
        parity = parity()                # cases, functions, tier: beside the reference
        failures = (Failure(...), ...)   # wrong arguments and what is raised

        def sized(self, new, n): ...     # arguments of a size, for graphs with dynamic shapes

The tests are those of `torchkiln.testing.Suite`; here stands what only our own operators promise.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

from torchkiln.testing import Failure, Inputs, Suite

__all__ = ["CompositionSuite", "Failure", "OpSuite"]


class OpSuite(Suite):
    """Base of an operator's tests. Cases come from `parity`; what a subclass adds runs as well."""

    def test_cases_cover_empty_and_single(self) -> None:
        sizes = set()
        for case in self.parity.cases:
            for leaf in pytree.tree_leaves(dict(case.make(Inputs()))):
                sizes |= set(leaf.shape) if isinstance(leaf, Tensor) else set()
        assert {0, 1} <= sizes


class CompositionSuite(OpSuite):
    """Base of the tests of an operator that is made of torch's own."""

    without: ClassVar = {"opcheck": "only torch's own operators are behind it"}
