"""One description of an operator gives all of its tests.

    class TestBoxIou(OpSuite):
        parity = parity()                # cases, functions, tier: beside the reference
        failures = (Failure(...), ...)   # wrong arguments and what is raised

        def sized(self, new, n): ...     # arguments of a size, for graphs with dynamic shapes

The same suite runs on the CPU and, where there is one, on a GPU.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torchkiln
from support.memory import run_watched
from torchkiln.testing import Case, Inputs, Parity, check
from torchkiln.testing._parity import (
    compare_to_reference,
    convert,
    evaluate,
    outputs_of,
    prepare,
)


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
    change: Mapping[str, Any]
    type: type[Exception]
    match: str
    function: str = ""

    def arguments(self, right: Mapping[str, Any], device: str) -> dict[str, Any]:
        def replace(name: str, new: Any) -> Any:
            if callable(new):
                return new(right[name])
            return new.to(device) if isinstance(new, Tensor) and new.is_cpu else new

        return {**right, **{name: replace(name, new) for name, new in self.change.items()}}


def map_floats(change: Callable[[Tensor], Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    def leaf(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(leaf, dict(arguments))


def permuted(tensor: Tensor) -> Tensor:
    """The same values, the first dimension lying innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() > 1 else tensor


def sliced(tensor: Tensor) -> Tensor:
    """The same values, every second element of a larger tensor along each dimension."""
    wide = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """Other values: all rows are the first one, with stride 0."""
    return tensor[:1].expand_as(tensor)


def surrounded(tensor: Tensor) -> Tensor:
    """The same values between two guard bands of NaN, in one storage."""
    band = 64
    wide = tensor.new_full((tensor.numel() + 2 * band,), float("nan"))
    return wide[band : band + tensor.numel()].view(tensor.shape).copy_(tensor)


LAYOUTS = (permuted, sliced, expanded, surrounded)


class Recorder(TorchDispatchMode):
    """Keeps every call of an operator of ours that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchkiln":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def bits(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals itself and 0 differs from -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(bits(first[name]), bits(second[name])), name


class OpSuite:
    """Base of an operator's tests. Cases come from `parity`; what a subclass adds runs as well."""

    parity: ClassVar[Parity]
    failures: ClassVar[tuple[Failure, ...]] = ()
    # Dimension of each argument that changes from call to call, for graphs with dynamic shapes.
    dynamic: ClassVar[Mapping[str, int]] = {}
    # What floating-point inputs are cast to under autocast; None: nothing is cast.
    autocast: ClassVar[torch.dtype | None] = None
    # Layouts that make no sense for this operator, with the reason.
    without_layouts: ClassVar[Mapping[str, str]] = {}

    def sized(self, new: Inputs, n: int) -> Mapping[str, Any]:
        """Returns arguments whose dynamic dimensions are about `n`."""
        raise NotImplementedError("a suite with `dynamic` says here what to call")

    # ---- parameters ----

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        parity = self.parity
        layouts = [f for f in LAYOUTS if f.__name__ not in self.without_layouts]
        tables: dict[str, tuple[list[Any], Callable[[Any], str]]] = {
            "run": (parity.runs, lambda run: f"{run[0]}-{run[1].name}"),
            "function": (list(parity.functions), str),
            "dtype": (list(parity.dtypes), lambda dtype: str(dtype).removeprefix("torch.")),
            "failure": (list(self.failures), lambda failure: failure.name),
            "layout": (layouts, lambda layout: layout.__name__),
        }
        for name, (values, label) in tables.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=label)

    @property
    def typical(self) -> Case:
        return self.parity.cases[0]

    @property
    def widest(self) -> torch.dtype:
        """float64 where it is taken."""
        return self.parity.dtypes[-1]

    def names(self, case: Case) -> tuple[str, ...]:
        return self.parity.differentiable if case.gradient else ()

    def runs_of(self, function: str) -> Iterator[Case]:
        return (case for name, case in self.parity.runs if name == function)

    def typical_of(self, function: str) -> Case:
        return next(self.runs_of(function))

    def recorded(self, function: str, device: str) -> list[tuple[Any, tuple[Any, ...]]]:
        """The operator calls, forward and backward, behind one typical call."""
        case = self.typical_of(function)
        arguments = prepare(case, torch.float32, device)
        with Recorder() as recorder:
            evaluate(getattr(torchkiln.ops, function), arguments, self.names(case))
        return recorder.calls

    # ---- values ----

    def test_equals_reference(
        self, run: tuple[str, Case], dtype: torch.dtype, device: str, record_property: Any
    ) -> None:
        function, case = run
        for result in check(self.parity, function, case, dtype, device):
            record_property(result.direction, result.error / result.limit if result.limit else 0.0)
            assert result.ok, f"{result.direction}: {result.message}"

    def test_layouts(self, function: str, layout: Callable[..., Tensor], device: str) -> None:
        case = self.typical_of(function)
        arguments = map_floats(layout, prepare(case, torch.float32, device))
        differences = compare_to_reference(
            getattr(torchkiln.ops, function),
            arguments,
            case.tier or self.parity.tier,
            self.names(case),
        )
        for direction, found in differences.items():
            assert found.ok, f"{direction}: {found.message}"

    def test_cases_cover_empty_and_single(self) -> None:
        sizes = set()
        for case in self.parity.cases:
            for leaf in pytree.tree_leaves(dict(case.make(Inputs()))):
                sizes |= set(leaf.shape) if isinstance(leaf, Tensor) else set()
        assert {0, 1} <= sizes

    def test_gradcheck(self, function: str, device: str) -> None:
        case = self.typical_of(function)
        if not self.names(case):
            pytest.skip("not differentiable")
        arguments = prepare(case, self.widest, device)

        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            changed = dict(zip(self.names(case), inputs, strict=True))
            outputs = outputs_of(getattr(torchkiln.ops, function), {**arguments, **changed})
            return tuple(output for output in outputs if output.is_floating_point())

        leaves = [arguments[name].clone().requires_grad_() for name in self.names(case)]
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)

    # ---- memory ----

    def test_inputs_are_unchanged(self, run: tuple[str, Case], device: str) -> None:
        """Also between guard bands: the bands and the values keep their bits."""
        function, case = run
        arguments = map_floats(surrounded, prepare(case, torch.float32, device))
        leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        storages = [
            torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()) for x in leaves
        ]
        before = [bits(storage).clone() for storage in storages]
        evaluate(getattr(torchkiln.ops, function), arguments, self.names(case))
        for storage, old in zip(storages, before, strict=True):
            assert torch.equal(bits(storage), old)

    def test_outputs_keep_to_their_memory(self, run: tuple[str, Case], device: str) -> None:
        """Every element is written and nothing beside them; support/memory.py says how far."""
        function, case = run
        # The widest dtype leaves malloc the least room between an output and its notes.
        arguments = prepare(case, self.widest, device)
        call = getattr(torchkiln.ops, function)
        expected = evaluate(call, arguments, self.names(case))
        for result in run_watched(device, lambda: evaluate(call, arguments, self.names(case))):
            assert_same_bits(result, expected)

    def test_two_runs_are_equal(self, run: tuple[str, Case], device: str) -> None:
        if not self.parity.deterministic:
            pytest.skip("the operator does not claim it")
        function, case = run
        arguments = prepare(case, torch.float32, device)
        call = getattr(torchkiln.ops, function)
        first = evaluate(call, arguments, self.names(case))
        assert_same_bits(first, evaluate(call, arguments, self.names(case)))

    def test_threads(self, function: str, device: str) -> None:
        """Calls from several Python threads, and inner threads, change no bit."""
        case = self.typical_of(function)
        arguments = prepare(case, torch.float32, device)
        call = getattr(torchkiln.ops, function)
        names = self.names(case) if self.parity.deterministic else ()
        expected = evaluate(call, arguments, names)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(evaluate, call, arguments, names) for _ in range(8)]
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            results = [future.result() for future in futures]
            results.append(evaluate(call, arguments, names))
        finally:
            torch.set_num_threads(before)
        for result in results:
            assert_same_bits(result, expected)

    # ---- torch's machinery ----

    def test_fake_equals_real(self, run: tuple[str, Case], device: str) -> None:
        function, case = run
        arguments = prepare(case, torch.float32, device)
        call = getattr(torchkiln.ops, function)
        real = evaluate(call, arguments, self.names(case))
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        fakes = pytree.tree_map_only(Tensor, mode.from_tensor, dict(arguments))
        with mode:
            fake = evaluate(call, fakes, self.names(case))
        for name, value in real.items():
            assert_same_layout(fake[name], value)

    def test_opcheck(self, function: str, device: str) -> None:
        """Schema, fake and autograd registration of every operator behind the function."""
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        for overload, args in self.recorded(function, device):
            torch.library.opcheck(overload, args, test_utils=tests)

    def test_opcheck_aot(self, device: str) -> None:
        """Traced with dynamic shapes, with and without gradients; one function stands for all."""
        function = self.parity.functions[0]
        overload, args = self.recorded(function, device)[0]
        torch.library.opcheck(overload, args, test_utils="test_aot_dispatch_dynamic")
        if self.parity.differentiable:
            leaves = tuple(
                arg.detach().requires_grad_()
                if isinstance(arg, Tensor) and arg.is_floating_point()
                else arg
                for arg in args
            )
            torch.library.opcheck(overload, leaves, test_utils="test_aot_dispatch_dynamic")

    def test_one_graph_for_all_sizes(self, device: str) -> None:
        """A fake that turns a symbolic size into a number would compile again for each size."""
        if not self.dynamic:
            pytest.skip("no dynamic dimension")
        torch._dynamo.reset()
        call = getattr(torchkiln.ops, self.parity.functions[0])
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, backend=counter, fullgraph=True)
        for n in (9, 14, 25):
            arguments = convert(self.sized(Inputs(n), n), torch.float32, device)
            expected = evaluate(call, arguments, ())
            for name, dim in self.dynamic.items():
                torch._dynamo.mark_dynamic(arguments[name], dim)
            assert_same_bits(evaluate(compiled, arguments, ()), expected)
        assert counter.frame_count == 1

    def test_compiled_gradient(self, device: str) -> None:
        case = self.typical_of(self.parity.functions[0])
        if not self.names(case):
            pytest.skip("not differentiable")
        torch._dynamo.reset()
        call = getattr(torchkiln.ops, self.parity.functions[0])
        arguments = prepare(case, torch.float32, device)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        expected = evaluate(call, arguments, self.names(case))
        actual = evaluate(compiled, arguments, self.names(case))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], equal_nan=True)

    def test_autocast(self, function: str, device: str) -> None:
        """Inputs are cast to the rule's dtype; gradients come back in the inputs' own."""
        case = self.typical_of(function)
        arguments = prepare(case, torch.bfloat16, device)
        call = getattr(torchkiln.ops, function)
        with torch.autocast(device, dtype=torch.bfloat16):
            actual = evaluate(call, arguments, self.names(case))
        cast = map_floats(lambda x: x.to(self.autocast or x.dtype), arguments)
        expected = evaluate(call, cast, self.names(case))
        for name, value in expected.items():
            dtype = value.dtype if name.startswith("forward") else torch.bfloat16
            torch.testing.assert_close(actual[name], value.to(dtype), equal_nan=True)

    # ---- errors ----

    def test_refuses(self, failure: Failure, device: str) -> None:
        function = failure.function or self.parity.functions[0]
        right = prepare(self.typical_of(function), torch.float32, device)
        with pytest.raises(failure.type, match=failure.match) as caught:
            getattr(torchkiln.ops, function)(**failure.arguments(right, device))
        assert caught.type is failure.type


def assert_same_layout(fake: Tensor, real: Tensor) -> None:
    """Sizes, strides, dtype and device; sizes that depend on data are only counted."""
    assert (fake.dtype, fake.device.type, fake.dim()) == (real.dtype, real.device.type, real.dim())
    if all(isinstance(size, int) for size in fake.shape):
        assert fake.shape == real.shape
        # Strides of a tensor without elements, or of a dimension of size 1, mean nothing.
        meaningful = [i for i, size in enumerate(real.shape) if size > 1 and real.numel()]
        assert [fake.stride(i) for i in meaningful] == [real.stride(i) for i in meaningful]
