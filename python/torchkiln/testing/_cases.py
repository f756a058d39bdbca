"""What an operator is tried on: declared once, beside its reference."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchkiln.testing._workloads import Workload

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Inputs:
    """Random tensors for cases: float64 on the CPU, the same ones at every run."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform between `low` and `high`."""
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return low + (high - low) * values

    def normal(self, *shape: int) -> Tensor:
        """Normal, mean 0 and deviation 1."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def integers(self, *shape: int, low: int = 0, high: int) -> Tensor:
        """From `low` to `high` - 1, int64."""
        return torch.randint(low, high, shape, generator=self._generator)

    def boxes(self, count: int, extent: float = 100.0) -> Tensor:
        """(count, 4) x1, y1, x2, y2 inside a square of side `extent`; sides up to half of it."""
        corner = self.uniform(count, 2, high=extent / 2)
        return torch.cat([corner, corner + self.uniform(count, 2, high=extent / 2)], dim=1)


@dataclass(frozen=True)
class Case:
    """One set of arguments.

    Args:
        name: unique within the operator.
        make: returns the public function's arguments by name; floating tensors in float64.
        functions: the public functions that take them; empty for all of the operator.
        gradient: whether gradients are compared. Not where the function has a kink in the inputs
            and neither side's choice is wrong.
        tier: another tier than the operator's; needs a `reason` with the measured error.
        reason: why the tier is another one.
    """

    name: str
    make: Callable[[Inputs], Mapping[str, Any]]
    functions: tuple[str, ...] = ()
    gradient: bool = True
    tier: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if bool(self.tier) != bool(self.reason):
            raise ValueError(f"case {self.name}: another tier needs a reason, and only that")


@dataclass(frozen=True)
class Parity:
    """An operator's public functions and the cases on which they must equal the reference.

    Args:
        op: name of the schema.
        tier: of the forward; a key of TIERS.
        cases: the first one is the typical one, used where one is enough.
        functions: names in `torchkiln.ops`; empty for one with the operator's name.
        differentiable: arguments that get a gradient.
        dtypes: floating dtypes that the operator takes.
        deterministic: whether two runs are equal bit for bit.
        workloads: calls of realistic sizes, for tuning and benchmarks.
    """

    op: str
    tier: str
    cases: tuple[Case, ...]
    functions: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    deterministic: bool = True
    workloads: tuple[Workload, ...] = ()

    def __post_init__(self) -> None:
        if not self.functions:
            object.__setattr__(self, "functions", (self.op,))

    @property
    def runs(self) -> list[tuple[str, Case]]:
        """Every public function with each case made for it."""
        return [
            (function, case)
            for function in self.functions
            for case in self.cases
            if not case.functions or function in case.functions
        ]


def find() -> dict[str, Parity]:
    """Returns what every module of `torchkiln.reference` declares by a function `parity()`."""
    from torchkiln import reference

    found = {}
    for info in pkgutil.walk_packages(reference.__path__, f"{reference.__name__}."):
        declare = getattr(importlib.import_module(info.name), "parity", None)
        if declare is not None:
            parity = declare()
            found[parity.op] = parity
    return found
