"""Calls of the sizes that models make: what is tuned, and what benchmarks measure.

An operator declares its workloads beside its reference, in `Parity.workloads`.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchkiln.testing._cases import Parity

Sizes = Mapping[str, int]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Workload:
    """Arguments of a size that a model has.

    Args:
        name: unique within the operator.
        sizes: by name, and what they are unless told otherwise. A layer constant of a kernel and
            the size that it stands for have one name.
        make: returns the public function's arguments by name for such sizes; tensors on the CPU,
            floating ones in float32.
        functions: the public functions that take them; empty for all of the operator.
        layouts: what 4-dimensional tensors are given in; keys of FORMATS.
        gradient: whether the backward belongs to it.
    """

    name: str
    sizes: Sizes
    make: Callable[[Sizes], Mapping[str, Any]]
    functions: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("contiguous",)
    gradient: bool = True

    def arguments(
        self, sizes: Sizes, dtype: torch.dtype, layout: str, device: str | torch.device
    ) -> dict[str, Any]:
        """Returns arguments for a call on `device`; the same numbers every time."""
        format = FORMATS[layout]

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            moved = value.to(device, dtype if value.is_floating_point() else None, copy=True)
            return moved.contiguous(memory_format=format) if moved.dim() == 4 else moved

        made = _made(self.make, tuple(sizes.items()))
        return pytree.tree_map(leaf, dict(made))  # type: ignore[no-any-return]


# The next run usually wants the same numbers in another dtype or layout.
@functools.lru_cache(maxsize=1)
def _made(
    make: Callable[[Sizes], Mapping[str, Any]], sizes: tuple[tuple[str, int], ...]
) -> Mapping[str, Any]:
    return make(dict(sizes))


@dataclass(frozen=True)
class Run:
    """One public function on one workload, in one dtype and layout."""

    parity: Parity
    workload: Workload
    function: str
    sizes: Sizes
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.function, self.workload.name, dtype]
        return " ".join([*parts, self.layout] if len(self.workload.layouts) > 1 else parts)

    @property
    def directions(self) -> frozenset[str]:
        """Names of its calls: "forward" and, where there is a gradient, "forward+backward"."""
        has_backward = self.workload.gradient and bool(self.parity.differentiable)
        return frozenset(["forward", "forward+backward"] if has_backward else ["forward"])

    def arguments(self, device: str | torch.device) -> dict[str, Any]:
        """Arguments of the public function."""
        return self.workload.arguments(self.sizes, self.dtype, self.layout, device)

    def bind(self, direction: str, arguments: Mapping[str, Any]) -> Callable[[], object]:
        """The call of one direction; it may be repeated."""
        function = self.parity.native(self.function)
        if direction == "forward":
            return lambda: function(**arguments)
        names = self.parity.differentiable
        leaves = {name: arguments[name].detach().requires_grad_() for name in names}
        return lambda: _differentiate(function, {**arguments, **leaves})

    def calls(self, device: str | torch.device) -> dict[str, Callable[[], object]]:
        """The calls by direction, forward first, on arguments of their own."""
        arguments = self.arguments(device)
        return {name: self.bind(name, arguments) for name in sorted(self.directions)}


def _differentiate(function: Callable[..., Any], arguments: Mapping[str, Any]) -> object:
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    outputs = [v for v in pytree.tree_leaves(function(**arguments)) if v.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(v) for v in outputs])


def runs(
    parities: Iterable[Parity],
    dtypes: Sequence[torch.dtype] | None = None,
    sizes: Sizes | None = None,
) -> list[Run]:
    """Lists every public function on each of its workloads.

    Args:
        parities: operators.
        dtypes: None for all that an operator takes.
        sizes: other sizes than the workloads'; a workload that lacks one of them is left out.

    Raises:
        ValueError: for a size that no workload has.
    """
    parities, sizes = list(parities), sizes or {}
    known = {name for p in parities for workload in p.workloads for name in workload.sizes}
    unknown = sorted(set(sizes) - known)
    if unknown:
        listed = ", ".join(sorted(known)) or "none"
        raise ValueError(f"sizes must be among {listed}; got {', '.join(unknown)}")
    return [
        Run(parity, workload, function, {**workload.sizes, **sizes}, dtype, layout)
        for parity in parities
        for workload, function in _pairs(parity)
        if set(sizes) <= set(workload.sizes)
        for dtype in parity.dtypes
        if dtypes is None or dtype in dtypes
        for layout in workload.layouts
    ]


def _pairs(parity: Parity) -> Iterator[tuple[Workload, str]]:
    for workload in parity.workloads:
        for function in workload.functions or parity.functions:
            yield workload, function
