"""What must hold for any operator, whatever it computes. Each check takes a callable."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils import _pytree as pytree

from torchkiln.testing._cases import Arguments
from torchkiln.testing._layouts import map_tensors
from torchkiln.testing._memory import run_watched, surrounded
from torchkiln.testing._parity import evaluate, outputs_of


def tensors_of(arguments: Arguments) -> list[Tensor]:
    """Returns the tensors among the arguments, also those inside lists."""
    return [leaf for leaf in pytree.tree_leaves(dict(arguments)) if isinstance(leaf, Tensor)]


def bits(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals itself and 0 differs from -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def require_same_bits(
    results: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> None:
    """Fails with the name of the first output that differs."""
    for name, value in expected.items():
        if not torch.equal(bits(results[name]), bits(value)):
            raise AssertionError(f"{name} differs {where}")


def assert_inputs_unchanged(
    function: Callable[..., Any], arguments: Arguments, differentiable: Sequence[str] = ()
) -> None:
    """Fails where a call, or its gradient, writes to its inputs or right beside them.

    Args:
        function: what is tried.
        arguments: by name; tensors are copied between guard bands.
        differentiable: arguments whose gradients are computed too.
    """
    guarded = map_tensors(surrounded, arguments)
    storages = [
        torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        for x in tensors_of(guarded)
    ]
    before = [bits(storage).clone() for storage in storages]
    evaluate(function, guarded, differentiable)
    for index, (storage, old) in enumerate(zip(storages, before, strict=True)):
        if not torch.equal(bits(storage), old):
            raise AssertionError(f"the call changed tensor {index} of its inputs, or beside it")


def assert_outputs_whole(
    function: Callable[..., Any], arguments: Arguments, differentiable: Sequence[str] = ()
) -> None:
    """Fails where a call leaves an element of an output unwritten, or writes beside an output.

    Fresh memory is filled with two patterns in turn, and what lies beside the outputs is looked
    at: torch's blocks on CUDA, on the CPU the notes of glibc's malloc (not seen where another
    malloc has replaced it).

    Args:
        function: what is tried; two runs must give the same bits. Its outputs come from torch's
            allocator.
        arguments: by name.
        differentiable: arguments whose gradients are computed too.
    """
    expected = evaluate(function, arguments, differentiable)
    device = next((tensor.device.type for tensor in expected.values()), "cpu")
    for results in run_watched(device, lambda: evaluate(function, arguments, differentiable)):
        require_same_bits(results, expected, "with what fresh memory held: not all is written")


def assert_deterministic(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiable: Sequence[str] = (),
    runs: int = 2,
) -> None:
    """Fails where runs differ by a bit.

    Args:
        function: what is tried.
        arguments: by name.
        differentiable: arguments whose gradients are compared too.
        runs: how many.

    Example:
        >>> import torch
        >>> from torchkiln import testing
        >>> testing.assert_deterministic(torch.cumsum, {"input": torch.rand(99), "dim": 0})
    """
    expected = evaluate(function, arguments, differentiable)
    for _ in range(runs - 1):
        require_same_bits(
            evaluate(function, arguments, differentiable), expected, "between two runs"
        )


def assert_thread_safe(
    function: Callable[..., Any], arguments: Arguments, differentiable: Sequence[str] = ()
) -> None:
    """Fails where calls from several Python threads, or on several inner threads, change a bit.

    Args:
        function: what is tried; two runs must give the same bits.
        arguments: by name.
        differentiable: arguments whose gradients are compared too.
    """
    expected = evaluate(function, arguments, differentiable)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(evaluate, function, arguments, differentiable) for _ in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        results = [future.result() for future in futures]
        results.append(evaluate(function, arguments, differentiable))
    finally:
        torch.set_num_threads(before)
    for result in results:
        require_same_bits(result, expected, "between threads")


def assert_gradients(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiable: Sequence[str],
    second_order: bool = False,
) -> None:
    """Fails where a gradient is not the slope that finite differences find.

    Args:
        function: what is tried.
        arguments: by name; floating ones in float64.
        differentiable: arguments whose gradients are checked.
        second_order: whether gradients of gradients are checked too.

    Raises:
        AssertionError: for a wrong gradient.
        TypeError: for another dtype, in which finite differences prove nothing.

    Example:
        >>> import torch
        >>> from torchkiln import testing
        >>> input = testing.Inputs().normal(3, 4)
        >>> testing.assert_gradients(torch.nn.functional.silu, {"input": input}, ["input"])
    """
    for name in differentiable:
        if arguments[name].dtype != torch.float64:
            got = str(arguments[name].dtype).removeprefix("torch.")
            raise TypeError(f"assert_gradients: {name} must be float64; got {got}")

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        changed = dict(zip(differentiable, inputs, strict=True))
        outputs = outputs_of(function, {**arguments, **changed})
        return tuple(output for output in outputs if output.is_floating_point())

    leaves = [arguments[name].detach().clone().requires_grad_() for name in differentiable]
    checks: list[Callable[..., bool]] = [torch.autograd.gradcheck]
    if second_order:
        checks.append(torch.autograd.gradgradcheck)
    for check in checks:
        try:
            check(call, leaves, fast_mode=True)
        except GradcheckError as error:
            raise AssertionError(f"{check.__name__}: {error}") from None
