"""What an operator is tried on: declared once, beside its reference."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import importlib
import pkgutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchkiln._backend import backend

Arguments = Mapping[str, Any]

if TYPE_CHECKING:
    from torchkiln.testing._draw import Draw
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
        golden: numbers, float64, that outputs must have, and how far the numbers themselves may be
            off; by "forward", or "forward 0" and so on of several. Compared by `verify` in float32
            and float64.
    """

    name: str
    make: Callable[[Inputs], Mapping[str, Any]]
    functions: tuple[str, ...] = ()
    gradient: bool = True
    tier: str = ""
    reason: str = ""
    golden: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.tier) != bool(self.reason):
            raise ValueError(f"case {self.name}: another tier needs a reason, and only that")


@dataclass(frozen=True)
class Failure:
    """Wrong arguments and what they must raise.

    Args:
        name: of the test.
        change: arguments of the typical case that are replaced; a callable gets the right one.
        type: exactly this exception.
        match: regular expression of the message.
        function: public function; empty for the first one.
    """

    name: str
    change: Arguments
    type: type[Exception]
    match: str
    function: str = ""

    def arguments(self, right: Arguments, device: str | torch.device) -> dict[str, Any]:
        """Returns the arguments of the call that must fail."""

        def replace(name: str, new: Any) -> Any:
            if callable(new):
                return new(right[name])
            return new.to(device) if isinstance(new, Tensor) and new.is_cpu else new

        return {**right, **{name: replace(name, new) for name, new in self.change.items()}}


@dataclass(frozen=True)
class Parity:
    """An operator's public functions and the cases on which they must equal the reference.

    Args:
        op: name of the operator.
        tier: of the forward; a key of TIERS.
        cases: the first one is the typical one, used where one is enough.
        functions: names in `torchkiln.ops`; empty for one with the operator's name.
        differentiable: arguments that get a gradient.
        dtypes: floating dtypes that the operator takes.
        deterministic: whether two runs are equal bit for bit.
        function: what is called: the name of a function of `torchkiln.ops`, or any callable that
            takes the arguments of each case by name and returns tensors.
        reference: what it must equal: plain PyTorch with the same arguments, in any dtype and on
            any device.
        devices: types of devices that it runs on.
        workloads: calls of realistic sizes, for tuning and benchmarks.
        fuzz: draws arguments of `draw.function` for a random call, also strange ones.
        arrange: turns a case's arguments, by name, into those of the function, where tensors that
            are differentiated stand in lists.
        label: names the variant of the operator that a case's arguments ask for; `torchkiln verify`
            prints a row for each.

    Example:
        >>> import torch
        >>> from torchkiln.testing import Case, Parity
        >>> silu = Parity(
        ...     op="silu",
        ...     tier="A",
        ...     cases=(Case("typical", lambda new: {"input": new.normal(7, 33)}),),
        ...     function=torch.nn.functional.silu,
        ...     reference=lambda input: input / (1 + (-input).exp()),
        ...     differentiable=("input",),
        ... )
    """

    op: str
    tier: str
    cases: tuple[Case, ...]
    functions: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    deterministic: bool = True
    workloads: tuple[Workload, ...] = ()
    function: Callable[..., Any] | str | None = None
    reference: Callable[..., Any] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    fuzz: Callable[[Draw], Mapping[str, Any]] | None = None
    arrange: Callable[..., Arguments] | None = None
    label: Callable[[Arguments], str] | None = None

    def __post_init__(self) -> None:
        if not self.functions:
            object.__setattr__(self, "functions", (self.op,))
        if (self.function is None) != (self.reference is None):
            given = "function" if self.reference is None else "reference"
            raise ValueError(
                f"parity {self.op}: function and reference must both be given; got only {given}"
            )
        if self.function is not None and self.functions != (self.op,):
            raise ValueError(
                f"parity {self.op}: functions must be left out beside a function; "
                f"got {', '.join(self.functions)}"
            )

    @property
    def runs(self) -> list[tuple[str, Case]]:
        """Every public function with each case made for it."""
        return [
            (function, case)
            for function in self.functions
            for case in self.cases
            if not case.functions or function in case.functions
        ]

    def typical(self, name: str) -> Case:
        """The first case made for a function."""
        return next(case for function, case in self.runs if function == name)

    def differentiated(self, case: Case) -> tuple[str, ...]:
        """The arguments whose gradients are compared on a case."""
        return self.differentiable if case.gradient else ()

    def native(self, name: str) -> Callable[..., Any]:
        """The function that is tried."""
        if callable(self.function):
            return self.function
        from torchkiln import ops

        function: Callable[..., Any] = getattr(ops, self.function or name)
        if self.arrange is None:
            return function
        return functools.partial(_call_arranged, function, self.arrange)

    def oracle(self, name: str) -> Callable[..., Any]:
        """Its reference, with the same arguments."""
        return self.reference or functools.partial(_call_reference, self.native(name))


def _call_arranged(
    function: Callable[..., Any], arrange: Callable[..., Arguments], **arguments: Any
) -> Any:
    return function(**arrange(**arguments))


def _call_reference(function: Callable[..., Any], **arguments: Any) -> Any:
    with backend("reference"):
        return function(**arguments)


def prepare(
    case: Case, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> dict[str, Any]:
    """Returns a case's arguments, rounded to `dtype` and on `device`.

    Args:
        case: what to make.
        dtype: of floating tensors.
        device: of all tensors.
        seed: another one gives other values of the same sizes.
    """
    return convert(case.make(Inputs(zlib.crc32(case.name.encode()) + seed)), dtype, device)


def convert(
    arguments: Arguments, dtype: torch.dtype, device: str | torch.device | None = None
) -> dict[str, Any]:
    """Returns copies; floating tensors in `dtype`, whatever else as it is."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(
            device or value.device, dtype if value.is_floating_point() else None
        )

    return pytree.tree_map(leaf, dict(arguments))  # type: ignore[no-any-return]


def find() -> dict[str, Parity]:
    """Returns what every module of `torchkiln.reference` declares by a function `parity()`.

    A module of several operators has a function `parities()` that returns all of theirs.

    Operators and kernels of users that have a reference and cases come after them.
    """
    from torchkiln import reference
    from torchkiln.testing._own import registered

    found: dict[str, Parity] = {}
    for info in pkgutil.walk_packages(reference.__path__, f"{reference.__name__}."):
        found |= declared(importlib.import_module(info.name))
    return found | registered()


def declared(module: ModuleType) -> dict[str, Parity]:
    """Returns what one module declares by `parity()` or `parities()`."""
    parities = module.parities() if hasattr(module, "parities") else ()
    if hasattr(module, "parity"):
        parities = (module.parity(),)
    return {parity.op: parity for parity in parities}
