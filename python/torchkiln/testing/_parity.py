"""Runs functions on their cases and compares results and gradients with the reference."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchkiln.testing._cases import Arguments, Case, Inputs, Parity, convert, find, prepare
from torchkiln.testing._tolerance import NEXT_TIER, Difference, compare, needs_plain


@dataclass(frozen=True)
class Result:
    """One comparison.

    Args:
        op: public function.
        case: name of the case.
        dtype: such as "float32".
        direction: "forward", "gradient" and the argument, or "golden" and the output.
        error: absolute error of the element nearest to its limit.
        limit: what it may be.
        message: what is wrong, or an empty string.
        label: the variant of the operator, or an empty string.
    """

    op: str
    case: str
    dtype: str
    direction: str
    error: float
    limit: float
    message: str = ""
    label: str = ""

    @property
    def ok(self) -> bool:
        """Whether the comparison passed."""
        return not self.message


def outputs_of(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """Calls and returns the tensors of the result, in order; complex ones as pairs of real ones."""
    leaves = pytree.tree_leaves(function(**arguments))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in tensors]


def directions_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the fixed random directions that outputs are differentiated along."""
    inputs = Inputs(seed=1)
    # Rounded to the narrowest dtype, so that every dtype gets the same direction.
    return [
        inputs.normal(*output.shape).bfloat16().to(output.device, output.dtype)
        for output in outputs
        if output.requires_grad
    ]


def evaluate(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiable: Sequence[str] = (),
    directions: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Calls, and differentiates a random projection of all floating outputs.

    Args:
        function: what is called with the arguments by name.
        arguments: as for the function.
        differentiable: arguments whose gradients are wanted.
        directions: one for each output that needs a gradient; None: of `directions_of`.

    Returns:
        Outputs and gradients by "forward" ("forward 0" of several) and "gradient <argument>".
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in differentiable}
    outputs = outputs_of(function, {**arguments, **leaves})
    forward = ["forward"] if len(outputs) == 1 else [f"forward {i}" for i in range(len(outputs))]
    values = {name: output.detach() for name, output in zip(forward, outputs, strict=True)}
    if leaves:
        curved = [output for output in outputs if output.requires_grad]
        if not curved:
            raise AssertionError(f"no output has a gradient of {', '.join(leaves)}")
        along = directions_of(curved) if directions is None else directions
        grads = torch.autograd.grad(
            curved, list(leaves.values()), along, allow_unused=True, materialize_grads=True
        )
        values |= {f"gradient {name}": g for name, g in zip(leaves, grads, strict=True)}
    return values


def compare_to_reference(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Arguments,
    tier: str,
    differentiable: Sequence[str] = (),
) -> dict[str, Difference]:
    """Compares one call, by direction.

    Args:
        function: what is tried.
        reference: with the same arguments; gets the same values in float64.
        arguments: in the dtype to be tried.
        tier: of the forward; gradients use the next one.
        differentiable: arguments whose gradients are compared too.
    """
    expected = evaluate(reference, convert(arguments, torch.float64), differentiable)
    actual = evaluate(function, arguments, differentiable)
    if actual.keys() != expected.keys():
        raise AssertionError(f"the outputs are {list(actual)}, not {list(expected)}")
    tiers = {key: tier if key.startswith("forward") else NEXT_TIER[tier] for key in expected}
    plain: dict[str, Tensor] = {}
    if any(needs_plain(tiers[key], value.dtype) for key, value in actual.items()):
        plain = evaluate(reference, arguments, differentiable)
    return {
        key: compare(actual[key], expected[key], tiers[key], plain.get(key)) for key in expected
    }


def assert_equals_reference(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Arguments,
    tier: str = "A",
    differentiable: Sequence[str] = (),
) -> dict[str, Difference]:
    """Fails where a result or gradient is further from the float64 reference than its tier allows.

    Args:
        function: what is tried: any callable that returns tensors.
        reference: plain PyTorch with the same arguments; called in float64.
        arguments: by name, in the dtype and layout and on the device to be tried.
        tier: of the forward, a key of TIERS; gradients use the next one.
        differentiable: arguments whose gradients are compared too.

    Returns:
        The worst element of each output and gradient.

    Raises:
        AssertionError: with the output, the error and what it may be.

    Example:
        >>> import torch
        >>> from torchkiln import testing
        >>> input = testing.Inputs().normal(4, 9).half()
        >>> _ = testing.assert_equals_reference(
        ...     torch.nn.functional.silu,
        ...     lambda input: input * input.sigmoid(),
        ...     {"input": input},
        ...     tier="A",
        ...     differentiable=["input"],
        ... )
    """
    differences = compare_to_reference(function, reference, arguments, tier, differentiable)
    for direction, found in differences.items():
        if not found.ok:
            raise AssertionError(f"{direction}: {found.message}")
    return differences


def check(
    parity: Parity, function: str, case: Case, dtype: torch.dtype, device: str | torch.device
) -> Iterator[Result]:
    """Yields the comparisons of one function on one case; an exception is a failed comparison."""
    names = parity.differentiated(case)
    try:
        arguments = prepare(case, dtype, device)
        differences = compare_to_reference(
            parity.native(function),
            parity.oracle(function),
            arguments,
            case.tier or parity.tier,
            names,
        )
        differences |= _golden(parity.native(function), case, arguments, dtype)
    except Exception as error:
        differences = {"forward": Difference(math.inf, 0.0, f"{type(error).__name__}: {error}")}
    label = parity.label(case.make(Inputs())) if parity.label else ""
    text = str(dtype).removeprefix("torch.")
    for direction, found in differences.items():
        how_far = found.error, found.limit, found.message
        yield Result(function, case.name, text, direction, *how_far, label)


def _golden(
    function: Callable[..., Any], case: Case, arguments: Arguments, dtype: torch.dtype
) -> dict[str, Difference]:
    """Compares outputs with numbers; not in half types, which round the inputs."""
    if not case.golden or dtype not in (torch.float32, torch.float64):
        return {}
    outputs = evaluate(function, arguments)
    found = {}
    for name, (numbers, rounding) in case.golden.items():
        actual = outputs[name].cpu().double()
        if actual.shape != numbers.shape:
            raise AssertionError(f"golden {name}: shapes {actual.shape} and {numbers.shape}")
        error = float((actual - numbers).abs().max())
        # As many digits as a kernel's polynomials have.
        limit = rounding + 64 * torch.finfo(dtype).eps * float(numbers.abs().max())
        message = "" if error <= limit else f"{actual.tolist()}, not {numbers.tolist()}"
        found[f"golden {name}"] = Difference(error, limit, message)
    return found


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
    kind = torch.device(device).type
    for parity in parities.values():
        if ops is not None and parity.op in ops and kind not in parity.devices:
            devices = ", ".join(parity.devices)
            raise ValueError(f"verify: device must be {devices} for {parity.op}; got {device}")
    return [
        result
        for parity in parities.values()
        for function, case in parity.runs
        if kind in parity.devices
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
