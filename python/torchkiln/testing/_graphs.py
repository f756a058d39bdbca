"""What torch's own machinery asks of an operator: fakes, opcheck, compiled and captured graphs."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchkiln.testing._cases import Arguments
from torchkiln.testing._checks import require_same_bits, tensors_of
from torchkiln.testing._layouts import map_tensors
from torchkiln.testing._parity import directions_of, evaluate, outputs_of

# Overload, positional and named arguments.
OperatorCall = tuple[Any, tuple[Any, ...], dict[str, Any]]

_NAMESPACES_OF_TORCH = {"aten", "prim", "prims", "profiler"}


def require_package(package: str, piece: str) -> None:
    """Fails in one sentence where an optional package is missing."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        raise ImportError(
            f"testing.{piece}: {package} must be installed; found none. "
            f"Install it with: pip install {package}"
        ) from None


class _Recorder(TorchDispatchMode):
    """Keeps every call that passes of an operator that is not torch's own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[OperatorCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in _NAMESPACES_OF_TORCH:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operator_calls(
    function: Callable[..., Any], arguments: Arguments, differentiable: Sequence[str] = ()
) -> list[OperatorCall]:
    """Returns the calls of custom operators, forward and backward, behind one call.

    Args:
        function: what is called.
        arguments: by name.
        differentiable: arguments whose gradients are computed too.

    Returns:
        (overload, arguments by position, arguments by name) of each.
    """
    recorder = _Recorder()
    with recorder:
        evaluate(function, arguments, differentiable)
    return recorder.calls


def assert_fake_equals_real(
    function: Callable[..., Any], arguments: Arguments, differentiable: Sequence[str] = ()
) -> None:
    """Fails where a fake gives other sizes, strides, dtypes or devices than the real call.

    Args:
        function: what is tried.
        arguments: by name.
        differentiable: arguments whose gradients are compared too.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    real = evaluate(function, arguments, differentiable)
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    fakes = map_tensors(mode.from_tensor, arguments)
    with mode:
        fake = evaluate(function, fakes, differentiable)
    for name, value in real.items():
        # Sizes that depend on data are only counted.
        is_known = all(isinstance(size, int) for size in fake[name].shape)
        got, expected = _layout(fake[name], is_known), _layout(value, is_known)
        if got != expected:
            raise AssertionError(f"{name}: the fake is {got}, the result {expected}")


def _layout(tensor: Tensor, is_known: bool) -> str:
    text = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
    if not is_known:
        return f"{text} of {tensor.dim()} dimensions"
    # Strides of a tensor without elements, or of a dimension of size 1, mean nothing.
    meaningful = [
        stride if size > 1 and tensor.numel() else "any"
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return f"{text}, sizes {tuple(tensor.shape)}, strides {tuple(meaningful)}"


def assert_opcheck(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiable: Sequence[str] = (),
    traced: bool = True,
) -> None:
    """Runs `torch.library.opcheck` on every custom operator behind a call; needs expecttest.

    Args:
        function: what is called; at least one operator must be behind it that is not torch's own.
        arguments: by name.
        differentiable: arguments whose gradients are computed too: their operators are checked.
        traced: whether the first operator is also traced with dynamic shapes, and its gradient
            where there is one. This takes seconds.

    Raises:
        torch.testing._internal.optests.OpCheckError: with what is wrong.
        ImportError: without expecttest.
    """
    require_package("expecttest", "assert_opcheck")
    calls = operator_calls(function, arguments, differentiable)
    if not calls:
        raise AssertionError("there is no operator to check behind the call but torch's own")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for overload, args, kwargs in calls:
        torch.library.opcheck(overload, args, kwargs, test_utils=tests)
    if traced:
        overload, args, kwargs = calls[0]
        torch.library.opcheck(overload, args, kwargs, test_utils="test_aot_dispatch_dynamic")
        if differentiable:
            leaves = pytree.tree_map_only(Tensor, _as_leaf, args)
            torch.library.opcheck(overload, leaves, kwargs, test_utils="test_aot_dispatch_dynamic")


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _in_one_frame(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Python's around any callable, because torch.compile starts at a frame."""

    def frame(**arguments: Any) -> Any:
        return function(**arguments)

    return frame


def assert_one_graph(
    function: Callable[..., Any], calls: Sequence[Arguments], dynamic: Mapping[str, int]
) -> None:
    """Fails where `torch.compile` needs more than one graph for several sizes.

    A fake that turns a symbolic size into a number, such as `int(x.shape[0])` or an `if` on it,
    makes torch compile again for each size; here it fails.

    Args:
        function: what is compiled, with `fullgraph=True`.
        calls: arguments by name, of at least two sizes; none of them 0 or 1, which torch
            specialises for in any case.
        dynamic: the dimension of each tensor that is marked by `torch._dynamo.mark_dynamic`.

    Raises:
        AssertionError: for another number of graphs, or for another result than without compiling.
        torch._dynamo.exc.UserError: where a marked size becomes a number.

    Example:
        >>> import torch
        >>> from torchkiln import testing
        >>> calls = [{"input": torch.rand(size, 4)} for size in (9, 14, 25)]
        >>> testing.assert_one_graph(torch.nn.functional.silu, calls, {"input": 0})
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_in_one_frame(function), backend=counter, fullgraph=True)
    for arguments in calls:
        expected = evaluate(function, arguments)
        for name, dim in dynamic.items():
            torch._dynamo.mark_dynamic(arguments[name], dim)
        _require_close(evaluate(compiled, arguments), expected)
    if counter.frame_count != 1:
        raise AssertionError(f"{counter.frame_count} graphs were compiled for {len(calls)} sizes")


def assert_compiles(
    function: Callable[..., Any], arguments: Arguments, differentiable: Sequence[str] = ()
) -> None:
    """Fails where `torch.compile` breaks the graph or changes a result or gradient.

    Args:
        function: what is compiled, with `fullgraph=True`.
        arguments: by name.
        differentiable: arguments whose gradients are compared too.
    """
    torch._dynamo.reset()
    compiled = torch.compile(_in_one_frame(function), backend="aot_eager", fullgraph=True)
    expected = evaluate(function, arguments, differentiable)
    _require_close(evaluate(compiled, arguments, differentiable), expected)


def assert_autocast(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiable: Sequence[str] = (),
    cast_to: torch.dtype | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Fails where autocast does another thing than cast the floating inputs.

    Args:
        function: what is tried.
        arguments: by name, in `dtype`. Gradients must come back in it, too.
        differentiable: arguments whose gradients are compared too.
        cast_to: what the operator's autocast rule casts to; None where it has no rule.
        dtype: of autocast.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(cast_to) if cast_to and tensor.is_floating_point() else tensor

    device = tensors_of(arguments)[0].device.type
    expected = evaluate(function, map_tensors(cast, arguments), differentiable)
    with torch.autocast(device, dtype=dtype):
        actual = evaluate(function, arguments, differentiable)
    for name in differentiable:
        expected[f"gradient {name}"] = expected[f"gradient {name}"].to(arguments[name].dtype)
    _require_close(actual, expected)


def _require_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        try:
            torch.testing.assert_close(actual[name], value, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def assert_capturable(
    function: Callable[..., Any],
    arguments: Arguments,
    other: Arguments,
    differentiable: Sequence[str] = (),
) -> None:
    """Fails where a CUDA graph of a call, or of its gradient, gives other bits for other values.

    A call that waits for the device, or that keeps a value of the first run on the host, cannot
    be captured or replays the old result.

    Args:
        function: what is captured; two runs must give the same bits.
        arguments: by name, on a CUDA device.
        other: the same sizes with other values, which the graph is replayed on.
        differentiable: arguments whose gradients are captured too.

    Raises:
        AssertionError: for another result.
        ValueError: without a tensor on a CUDA device.
        RuntimeError: of torch, for a call that cannot be captured.
    """
    static = map_tensors(lambda tensor: tensor.detach().clone(), arguments)
    inputs = tensors_of(static)
    if not any(tensor.is_cuda for tensor in inputs):
        raise ValueError("assert_capturable: arguments must be on a CUDA device; got none there")
    leaves = {name: static[name].detach().requires_grad_() for name in differentiable}
    outputs = outputs_of(function, {**static, **leaves})
    directions = directions_of(outputs)
    # What happens once (compiles, allocations, a library's workspace) happens beside the graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        evaluate(function, static, differentiable, directions)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(function, static, differentiable, directions)
    # Before the inputs, because an output may share their memory.
    for value in captured.values():
        value.untyped_storage().fill_(0)  # type: ignore[attr-defined]
    for tensor, value in zip(inputs, tensors_of(other), strict=True):
        tensor.copy_(value)
    graph.replay()
    expected = evaluate(function, other, differentiable, directions)
    require_same_bits(captured, expected, "between the replayed graph and a call")
