"""Runs public functions on their cases and compares results and gradients with the reference."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchkiln._backend import backend
from torchkiln.testing._cases import Case, Inputs, Parity, find
from torchkiln.testing._tolerance import NEXT_TIER, Difference, compare, needs_plain

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """One comparison.

    Args:
        op: public function.
        case: name of the case.
        dtype: such as "float32".
        direction: "forward", or "gradient" and the argument.
        error: absolute error of the element nearest to its limit.
        limit: what it may be.
        message: what is wrong, or an empty string.
    """

    op: str
    case: str
    dtype: str
    direction: str
    error: float
    limit: float
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the comparison passed."""
        return not self.message


def prepare(case: Case, dtype: torch.dtype, device: str | torch.device) -> Arguments:
    """Returns a case's arguments, rounded to `dtype` and on `device`."""
    arguments = case.make(Inputs(zlib.crc32(case.name.encode())))
    return convert(arguments, dtype, device)


def convert(
    arguments: Arguments, dtype: torch.dtype, device: str | torch.device | None = None
) -> Arguments:
    """Returns copies; floating tensors in `dtype`, whatever else as it is."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(
            device or value.device, dtype if value.is_floating_point() else None
        )

    return pytree.tree_map(leaf, dict(arguments))  # type: ignore[no-any-return]


def outputs_of(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """Calls and returns the tensors of the result, in order."""
    return [leaf for leaf in pytree.tree_leaves(function(**arguments)) if isinstance(leaf, Tensor)]


def gradients_of(
    function: Callable[..., Any], arguments: Arguments, names: Sequence[str]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Calls, and differentiates a fixed random projection of all floating outputs.

    Returns:
        Outputs, and the gradient of each named argument.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    outputs = outputs_of(function, {**arguments, **leaves})
    curved = [output for output in outputs if output.requires_grad]
    inputs = Inputs(seed=1)
    directions = [
        # Rounded to the narrowest dtype, so that every dtype gets the same direction.
        inputs.normal(*output.shape).bfloat16().to(output.device, output.dtype)
        for output in curved
    ]
    grads = torch.autograd.grad(curved, list(leaves.values()), directions)
    return [output.detach() for output in outputs], dict(zip(names, grads, strict=True))


def evaluate(
    function: Callable[..., Any], arguments: Arguments, names: Sequence[str]
) -> dict[str, Tensor]:
    """Returns outputs and gradients by direction."""
    if names:
        outputs, grads = gradients_of(function, arguments, names)
    else:
        outputs, grads = outputs_of(function, arguments), {}
    forward = ["forward"] if len(outputs) == 1 else [f"forward {i}" for i in range(len(outputs))]
    values = dict(zip(forward, outputs, strict=True))
    return values | {f"gradient {name}": grad for name, grad in grads.items()}


def compare_to_reference(
    function: Callable[..., Any], arguments: Arguments, tier: str, names: Sequence[str] = ()
) -> dict[str, Difference]:
    """Compares one call, by direction.

    Args:
        function: public function of `torchkiln.ops`.
        arguments: in the dtype to be tried; the reference gets the same values in float64.
        tier: of the forward.
        names: arguments whose gradients are compared too.
    """
    with backend("reference"):
        expected = evaluate(function, convert(arguments, torch.float64), names)
    actual = evaluate(function, arguments, names)
    tiers = {key: tier if key.startswith("forward") else NEXT_TIER[tier] for key in expected}
    plain: dict[str, Tensor] = {}
    if any(needs_plain(tiers[key], value.dtype) for key, value in actual.items()):
        with backend("reference"):
            plain = evaluate(function, arguments, names)
    return {
        key: compare(actual[key], expected[key], tiers[key], plain.get(key)) for key in expected
    }


def check(
    parity: Parity, function: str, case: Case, dtype: torch.dtype, device: str | torch.device
) -> Iterator[Result]:
    """Yields the comparisons of one function on one case; an exception is a failed comparison."""
    from torchkiln import ops

    names = parity.differentiable if case.gradient else ()
    arguments = prepare(case, dtype, device)
    try:
        differences = compare_to_reference(
            getattr(ops, function), arguments, case.tier or parity.tier, names
        )
    except Exception as error:
        differences = {"forward": Difference(math.inf, 0.0, f"{type(error).__name__}: {error}")}
    for direction, found in differences.items():
        text = str(dtype).removeprefix("torch.")
        yield Result(function, case.name, text, direction, found.error, found.limit, found.message)


def verify(
    ops: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    dtypes: Sequence[str | torch.dtype] | None = None,
) -> list[Result]:
    """Compares operators with their references on this machine.

    Args:
        ops: schemas or public functions; None for all.
        device: where to run them.
        dtypes: such as "float32"; None for all that an operator takes.

    Returns:
        Every comparison that was made, the failed ones too.

    Raises:
        ValueError: for a name that is not known, with those that are.

    Example:
        >>> from torchkiln import testing
        >>> all(result.ok for result in testing.verify(["box_iou"], dtypes=["float32"]))
        True
    """
    parities = find()
    wanted = None if dtypes is None else [_dtype(name) for name in dtypes]
    functions = {name for parity in parities.values() for name in parity.functions}
    unknown = sorted(set(ops or ()) - functions - set(parities))
    if unknown:
        known = ", ".join(sorted(functions | set(parities)))
        raise ValueError(f"verify: ops must be among {known}; got {', '.join(unknown)}")
    return [
        result
        for parity in parities.values()
        for function, case in parity.runs
        if ops is None or parity.op in ops or function in ops
        for dtype in parity.dtypes
        if wanted is None or dtype in wanted
        for result in check(parity, function, case, dtype, device)
    ]


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"verify: dtypes must be floating-point dtypes; got {name}")
    return dtype
