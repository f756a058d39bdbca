"""One description of an operator gives all of its tests, under pytest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch

from torchkiln.testing import _checks, _graphs
from torchkiln.testing._cases import Case, Failure, Inputs, Parity, convert, prepare
from torchkiln.testing._layouts import LAYOUTS, emptied, lay_out, resized
from torchkiln.testing._parity import assert_equals_reference, check

_DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Sizes that no kernel and no fake may treat in a special way.
_SIZES = (9, 14, 25)


class Suite:
    """Base of a test class that proves one operator; needs pytest.

    A subclass says what the operator is, and inherits the tests. They run on the CPU and, where
    there is one, on a GPU.

    Attributes:
        parity: the operator, its reference and the cases.
        dynamic: the dimension of each argument that changes from call to call, for graphs with
            dynamic shapes and for empty inputs.
        failures: wrong arguments and what they raise.
        autocast: what floating inputs are cast to under autocast; None: nothing is cast.
        second_order: whether gradients of gradients are checked, too.
        devices: where the operator runs.
        without: tests (the name less `test_`; "cuda_graph[nms]" for one function's) and layouts
            that make no sense for this operator, each with the reason, which is that of the skip.

    Example:
        >>> import torch
        >>> from torchkiln.testing import Case, Parity, Suite
        >>> class TestSilu(Suite):
        ...     parity = Parity(
        ...         op="silu",
        ...         tier="A",
        ...         cases=(Case("typical", lambda new: {"input": new.normal(7, 33)}),),
        ...         function=torch.nn.functional.silu,
        ...         reference=lambda input: input / (1 + (-input).exp()),
        ...         differentiable=("input",),
        ...     )
        ...     dynamic = {"input": 0}
        ...     without = {"opcheck": "silu is torch's own operator"}
    """

    parity: ClassVar[Parity]
    dynamic: ClassVar[Mapping[str, int]] = {}
    failures: ClassVar[tuple[Failure, ...]] = ()
    autocast: ClassVar[torch.dtype | None] = None
    second_order: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    without: ClassVar[Mapping[str, str]] = {}

    def sized(self, new: Inputs, size: int) -> Mapping[str, Any]:
        """Returns arguments whose dynamic dimensions have about this size.

        Override it where rows of the typical case cannot be repeated or left out.
        """
        typical = self.parity.cases[0].make(new)
        return resized(typical, self.dynamic, size)

    # ---- parameters ----

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        tests = {name.removeprefix("test_") for name in dir(cls) if name.startswith("test_")}
        named = {name.partition("[")[0] for name in cls.without}
        unknown = sorted(named - tests - set(LAYOUTS))
        if unknown:
            raise ValueError(
                f"{cls.__name__}: without must name tests or layouts; got {', '.join(unknown)}. "
                f"There are {', '.join(sorted(tests | set(LAYOUTS)))}"
            )

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Gives each test the cases, functions, dtypes, layouts or failures that it asks for."""
        parity = self.parity
        layouts = [name for name in LAYOUTS if name not in self.without]
        tables: dict[str, tuple[list[Any], Callable[[Any], str]]] = {
            "run": (parity.runs, lambda run: f"{run[0]}-{run[1].name}"),
            "function": (list(parity.functions), str),
            "dtype": (list(parity.dtypes), lambda dtype: str(dtype).removeprefix("torch.")),
            "failure": (list(self.failures), lambda failure: failure.name),
            "layout": (layouts, str),
        }
        for name, (values, label) in tables.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=label)

    @pytest.fixture(params=_DEVICES)
    def device(self, request: pytest.FixtureRequest) -> str:
        """Each device of this machine."""
        if request.param not in self.devices:
            pytest.skip(f"the operator does not run on {request.param}")
        return str(request.param)

    @pytest.fixture(autouse=True)
    def _skip_what_makes_no_sense(self, request: pytest.FixtureRequest) -> None:
        name = getattr(request.node, "originalname", "").removeprefix("test_")
        function = getattr(request.node, "callspec", None)
        of_function = f"{name}[{function.params.get('function')}]" if function else name
        for key in (name, of_function):
            if key in self.without:
                pytest.skip(self.without[key])

    @property
    def narrow(self) -> torch.dtype:
        """float32 where it is taken: the dtype of what is tried in one only."""
        return torch.float32 if torch.float32 in self.parity.dtypes else self.parity.dtypes[0]

    @property
    def widest(self) -> torch.dtype:
        """float64 where it is taken."""
        return max(self.parity.dtypes, key=lambda dtype: torch.finfo(dtype).bits)

    def prepared(
        self,
        function: str,
        device: str,
        dtype: torch.dtype | None = None,
        case: Case | None = None,
    ) -> tuple[Callable[..., Any], Mapping[str, Any], tuple[str, ...]]:
        """Returns a function, arguments, and which of them are differentiable.

        Args:
            function: public function.
            device: of the arguments.
            dtype: of the arguments; None for `narrow`.
            case: what they are; None for the typical one.
        """
        case = case or self.parity.typical(function)
        arguments = prepare(case, dtype or self.narrow, device)
        return self.parity.native(function), arguments, self.parity.differentiated(case)

    def _needs_equal_runs(self) -> None:
        if not self.parity.deterministic:
            pytest.skip("the operator does not claim that two runs are equal")

    # ---- values ----

    def test_equals_reference(
        self, run: tuple[str, Case], dtype: torch.dtype, device: str, record_property: Any
    ) -> None:
        """Every case and dtype, results and gradients, against the reference in float64."""
        function, case = run
        for result in check(self.parity, function, case, dtype, device):
            record_property(result.direction, result.error / result.limit if result.limit else 0.0)
            if not result.ok:
                pytest.fail(f"{result.direction}: {result.message}")

    def test_layouts(self, function: str, layout: str, device: str) -> None:
        """The typical case in each layout."""
        _, arguments, names = self.prepared(function, device)
        self._compare(function, lay_out(arguments, layout), names)

    def test_empty(self, device: str) -> None:
        """The typical case without elements along its dynamic dimensions."""
        if not self.dynamic:
            pytest.skip("no dynamic dimension")
        function = self.parity.functions[0]
        _, arguments, names = self.prepared(function, device)
        self._compare(function, emptied(arguments, self.dynamic), names)

    def _compare(self, function: str, arguments: Mapping[str, Any], names: tuple[str, ...]) -> None:
        assert_equals_reference(
            self.parity.native(function),
            self.parity.oracle(function),
            arguments,
            self.parity.typical(function).tier or self.parity.tier,
            names,
        )

    def test_gradients(self, function: str, device: str) -> None:
        """Against finite differences, twice where the suite asks for it."""
        native, arguments, names = self.prepared(function, device, torch.float64)
        if not names:
            pytest.skip("not differentiable")
        if torch.float64 not in self.parity.dtypes:
            pytest.skip("finite differences need float64, which the operator does not take")
        _checks.assert_gradients(native, arguments, names, self.second_order)

    # ---- memory ----

    def test_inputs_are_unchanged(self, run: tuple[str, Case], device: str) -> None:
        """Also beside them: they lie between guard bands."""
        _checks.assert_inputs_unchanged(*self.prepared(run[0], device, case=run[1]))

    def test_outputs_are_whole(self, run: tuple[str, Case], device: str) -> None:
        """Every element is written, and nothing beside them."""
        self._needs_equal_runs()
        # The widest dtype leaves malloc the least room between an output and its notes.
        _checks.assert_outputs_whole(*self.prepared(run[0], device, self.widest, run[1]))

    def test_two_runs_are_equal(self, run: tuple[str, Case], device: str) -> None:
        """Bit for bit."""
        self._needs_equal_runs()
        _checks.assert_deterministic(*self.prepared(run[0], device, case=run[1]))

    def test_threads(self, function: str, device: str) -> None:
        """Calls from several Python threads, and inner threads, change no bit."""
        native, arguments, names = self.prepared(function, device)
        _checks.assert_thread_safe(native, arguments, names if self.parity.deterministic else ())

    # ---- torch's machinery ----

    def test_fake_equals_real(self, run: tuple[str, Case], device: str) -> None:
        """Sizes, strides, dtypes and devices of results and gradients."""
        _graphs.assert_fake_equals_real(*self.prepared(run[0], device, case=run[1]))

    def test_opcheck(self, function: str, device: str) -> None:
        """Schema, fake and autograd registration of every operator behind the function."""
        # Tracing takes seconds; one function stands for all.
        traced = function == self.parity.functions[0]
        _graphs.assert_opcheck(*self.prepared(function, device), traced=traced)

    def test_one_graph_for_all_sizes(self, device: str) -> None:
        """A fake that turns a symbolic size into a number would compile again for each size."""
        if not self.dynamic:
            pytest.skip("no dynamic dimension")
        calls = [convert(self.sized(Inputs(n), n), self.narrow, device) for n in _SIZES]
        _graphs.assert_one_graph(self.parity.native(self.parity.functions[0]), calls, self.dynamic)

    def test_compiles(self, device: str) -> None:
        """Results and gradients of the compiled call."""
        _graphs.assert_compiles(*self.prepared(self.parity.functions[0], device))

    def test_autocast(self, function: str, device: str) -> None:
        """Inputs are cast to the rule's dtype; gradients come back in the inputs' own."""
        if torch.bfloat16 not in self.parity.dtypes:
            pytest.skip("the operator does not take bfloat16")
        prepared = self.prepared(function, device, torch.bfloat16)
        _graphs.assert_autocast(*prepared, cast_to=self.autocast)

    def test_cuda_graph(self, function: str, device: str) -> None:
        """Captured with its gradient, and replayed on other values."""
        if device != "cuda":
            pytest.skip("needs a CUDA device")
        self._needs_equal_runs()
        native, arguments, names = self.prepared(function, device)
        other = prepare(self.parity.typical(function), self.narrow, device, seed=1)
        _graphs.assert_capturable(native, arguments, other, names)

    # ---- errors ----

    def test_refuses(self, failure: Failure, device: str) -> None:
        """Wrong arguments raise what the suite says, and exactly that."""
        function = failure.function or self.parity.functions[0]
        native, right, _ = self.prepared(function, device)
        with pytest.raises(failure.type, match=failure.match) as caught:
            native(**failure.arguments(right, device))
        if caught.type is not failure.type:
            pytest.fail(f"raised {caught.type.__name__}, not {failure.type.__name__}")
