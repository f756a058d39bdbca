"""Each piece of torchkiln.testing passes a right operator of a user and finds a planted fault."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.testing._internal.optests import OpCheckError

from torchkiln import testing
from torchkiln.testing import Case, Failure, Inputs, Parity, Suite


def reference(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).tanh()


@torch.library.custom_op("torchkiln_tests::squash", mutates_args=())
def squash(x: Tensor, scale: Tensor) -> Tensor:
    """tanh(x * scale); x (N, C), scale (C,)."""
    if x.shape[-1] != scale.shape[0]:
        raise ValueError(f"squash: scale must have {x.shape[-1]} elements; got {scale.shape[0]}")
    return (x * scale).tanh().contiguous()


@squash.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("torchkiln_tests::squash_backward", mutates_args=())
def squash_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    tanh = (x * scale).tanh()
    inner = grad * (1 - tanh * tanh)  # a power would be float32 under CUDA's autocast
    return (inner * scale).contiguous(), (inner * x).sum(0)


@squash_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


squash.register_autograd(
    lambda ctx, grad: squash_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "testing.md").read_text()
TEST_FILE, PIECES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
sys.modules["mine"] = types.SimpleNamespace(squash=squash)  # type: ignore[assignment]
exec(compile(TEST_FILE, "docs/testing.md", "exec"))


class TestSquash(TestSquash):  # type: ignore[name-defined,no-redef]  # noqa: F821
    """The guide's class, and what it has no room for."""

    failures = (
        Failure("narrow", {"scale": lambda scale: scale[:3]}, ValueError, "must have 33 elements"),
    )


class TestSilu(Suite):
    """Nothing here has an operator of its own: torch differentiates it twice."""

    parity = Parity(
        op="silu",
        tier="A",
        cases=(Case("typical", lambda new: {"input": new.normal(4, 6, 5, 3)}),),
        function=torch.nn.functional.silu,
        reference=lambda input: input / (1 + (-input).exp()),
        differentiable=("input",),
    )
    dynamic: ClassVar = {"input": 0}
    second_order = True
    without: ClassVar = {"opcheck": "silu is torch's own operator"}


def test_pieces_of_the_guide() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    program = ast.parse(PIECES.replace('"cuda"', repr(device)))
    if device == "cpu":
        assert "assert_capturable" in ast.unparse(program.body.pop())
    names = {"squash": squash, "reference": reference}
    exec(compile(program, "docs/testing.md", "exec"), {"torch": torch, **names})


# ---- planted faults ----


def arguments() -> dict[str, Any]:
    new = Inputs()
    return {"x": new.normal(12, 33), "scale": new.normal(33)}


NAMES = ("x", "scale")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def fails(match: str, type: type[Exception] = AssertionError) -> Any:
    return pytest.raises(type, match=match)


def test_wrong_value() -> None:
    with fails("forward: error .* beyond .*tier A"):
        testing.assert_equals_reference(lambda **a: reference(**a) + 1e-3, reference, arguments())


def test_wrong_gradient() -> None:
    def wrong(x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale + (x - x.detach())).tanh()

    testing.assert_equals_reference(wrong, reference, arguments())
    with fails("gradient x: error"):
        testing.assert_equals_reference(wrong, reference, arguments(), differentiable=NAMES)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    with fails("gradcheck: Jacobian mismatch"):
        testing.assert_gradients(lambda x: Halved.apply(x), {"x": torch.rand(5).double()}, ["x"])


def test_wrong_second_gradient() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * 3 * (x * x.detach())

    inputs = {"x": torch.rand(5).double() + 1}
    testing.assert_gradients(lambda x: Cube.apply(x), inputs, ["x"])
    with fails("gradgradcheck: "):
        testing.assert_gradients(lambda x: Cube.apply(x), inputs, ["x"], second_order=True)


def test_gradients_ask_for_float64() -> None:
    with fails("x must be float64; got float32", TypeError):
        testing.assert_gradients(reference, {"x": torch.rand(3), "scale": torch.rand(3)}, ["x"])


def test_another_number_of_outputs() -> None:
    with fails(r"the outputs are \['forward'\], not \['forward 0', 'forward 1'\]"):
        testing.assert_equals_reference(
            lambda x: x, lambda x: (x, x), {"x": torch.rand(3)}, differentiable=[]
        )


def test_no_gradient() -> None:
    with fails("no output has a gradient of x"):
        testing.assert_equals_reference(
            lambda x: x.detach(), lambda x: x, {"x": torch.rand(3)}, differentiable=["x"]
        )


def raw(x: Tensor) -> Tensor:
    """Reads the memory behind the pointer, as a kernel does that forgets strides."""
    return torch.as_strided(x, x.shape, torch.empty(x.shape).stride())


# What is wrong with a kernel, and the layouts that show it.
LAYOUT_FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "no_strides": (raw, {"channels_last", "permuted", "strided", "expanded"}),
    "no_offset": (
        lambda x: torch.as_strided(x, x.shape, x.stride(), 0),
        {"strided", "offset"},
    ),
}


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_layouts_show(fault: str) -> None:
    wrong, expected = LAYOUT_FAULTS[fault]
    found = set()
    for layout in testing.LAYOUTS:
        inputs = testing.lay_out({"x": Inputs().normal(4, 3, 5, 6)}, layout)
        try:
            testing.assert_equals_reference(wrong, lambda x: x.clone(), inputs, "X")
        except (AssertionError, RuntimeError):
            found.add(layout)
    assert found == expected


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint8, torch.bool])
def test_layouts_keep_values(layout: str, dtype: torch.dtype) -> None:
    x = Inputs().integers(4, 3, 5, 6, high=100).to(dtype)
    nested = testing.lay_out({"list": [x, x[0, 0, 0, 0]], "number": 3}, layout)
    assert nested["number"] == 3
    expected = x[:1].expand_as(x) if layout == "expanded" else x
    assert torch.equal(nested["list"][0], expected)
    assert torch.equal(nested["list"][1], x[0, 0, 0, 0])
    assert testing.lay_out({"x": x}, "offset")["x"].data_ptr() % 16 == x.element_size()


def test_other_sizes() -> None:
    x = torch.arange(6).view(2, 3)
    assert testing.emptied({"x": x, "y": 1}, {"x": 1})["x"].shape == (2, 0)
    assert testing.resized({"x": x}, {"x": 0}, 3)["x"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert testing.resized({"x": x}, {"x": 1}, 2)["x"].tolist() == [[0, 1], [3, 4]]


def test_changed_input() -> None:
    with fails("changed tensor 1 of its inputs"):
        testing.assert_inputs_unchanged(
            lambda x, y: x + y.mul_(2), {"x": torch.ones(3), "y": torch.ones(3)}
        )

    def beside(x: Tensor) -> Tensor:
        torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel()).zero_()
        return x.clone()

    with fails("changed tensor 0 of its inputs, or beside it"):
        testing.assert_inputs_unchanged(beside, {"x": torch.ones(3)})


def test_unwritten_output() -> None:
    def lazy(x: Tensor) -> Tensor:
        output = torch.empty_like(x)
        output[:-1] = x[:-1]
        return output

    with fails("forward differs with what fresh memory held"):
        testing.assert_outputs_whole(lazy, {"x": torch.ones(5000)})


@pytest.mark.parametrize("side", ["before", "behind"])
def test_output_written_beside(side: str) -> None:
    """In a process of its own, because malloc would find its damaged note, too, and end it."""
    program = """
        import ctypes, sys
        import torch
        from torchkiln.testing._memory import assert_blocks_are_whole

        output = [torch.ones(62) for _ in range(9)][4]
        assert_blocks_are_whole(output)
        # The size of this block, 8 bytes in front of it, or that of the next one.
        note = ctypes.c_size_t.from_address(output.data_ptr() - 8)
        if sys.argv[1] == "behind":
            note = ctypes.c_size_t.from_address(output.data_ptr() - 8 + (note.value & ~7))
        before, note.value = note.value, 0
        try:
            assert_blocks_are_whole(output)
        except AssertionError as error:
            note.value = before
            print(error)
    """
    done = run(program, side)
    assert done.stdout == f"the call wrote {side} an output\n", done.stderr


def alternating() -> Callable[[Tensor], Tensor]:
    calls: Iterator[int] = iter(range(100))
    return lambda x: x + next(calls) % 2 * 1e-6


def test_runs_that_differ() -> None:
    with fails("forward differs between two runs"):
        testing.assert_deterministic(alternating(), {"x": torch.zeros(3)})
    with fails("forward differs between threads"):
        testing.assert_thread_safe(alternating(), {"x": torch.zeros(3)})


@torch.library.custom_op("torchkiln_tests::faulty", mutates_args=())
def faulty(x: Tensor, fault: str) -> Tensor:
    return (x * 2).t().contiguous().t() if fault == "strides" else x * 2


@faulty.register_fake
def _(x: Tensor, fault: str) -> Tensor:
    if fault == "sizes":
        return x.new_empty(x.shape[0] + 1, x.shape[1])
    if fault == "specialises":
        return x.new_empty([int(size) for size in x.shape])
    return x.new_empty(x.shape, dtype=torch.float64 if fault == "dtype" else None)


def call_faulty(fault: str) -> Callable[[Tensor], Tensor]:
    return lambda x: faulty(x, fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("sizes", r"the fake is float32 on cpu, sizes \(5, 3\), .*the result .*sizes \(4, 3\)"),
        ("strides", r"strides \(3, 1\), the result .*strides \(1, 4\)"),
        ("dtype", "the fake is float64 on cpu, .* the result float32"),
    ],
)
def test_wrong_fake(fault: str, message: str) -> None:
    inputs = {"x": torch.ones(4, 3)}
    testing.assert_fake_equals_real(call_faulty("none"), inputs)
    with fails(f"forward: .*{message}"):
        testing.assert_fake_equals_real(call_faulty(fault), inputs)
    if fault == "strides" and torch.__version__ < (2, 12):
        return  # its opcheck does not look at strides
    with pytest.raises(OpCheckError):
        testing.assert_opcheck(call_faulty(fault), inputs, traced=False)


def test_opcheck_needs_an_operator() -> None:
    with fails("no operator to check behind the call"):
        testing.assert_opcheck(torch.nn.functional.silu, {"input": torch.ones(3)})


def test_operators_behind_a_call() -> None:
    calls = testing.operator_calls(squash, arguments(), NAMES)
    names = [overload.name() for overload, _, _ in calls]
    assert names == ["torchkiln_tests::squash", "torchkiln_tests::squash_backward"]


def test_fake_that_specialises() -> None:
    calls = [{"x": torch.rand(n, 3)} for n in (9, 14, 25)]
    testing.assert_one_graph(call_faulty("none"), calls, {"x": 0})
    with pytest.raises((UserError, RuntimeError)):
        testing.assert_one_graph(call_faulty("specialises"), calls, {"x": 0})


def test_more_than_one_graph() -> None:
    calls = [{"x": torch.rand(n, 3), "by": float(n)} for n in (9, 14, 25)]

    def by_number(x: Tensor, by: float) -> Tensor:
        return x * 2 if by < 10 else x * 3

    with fails("^[23] graphs were compiled for 3 sizes"):
        testing.assert_one_graph(by_number, calls, {"x": 0})


def test_compiled_call_that_differs() -> None:
    def differs(x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_compiling() else x

    with fails("forward: Tensor-likes are not close"):
        testing.assert_compiles(differs, {"x": torch.ones(3)})


def test_autocast_rule() -> None:
    inputs = {"input": torch.rand(4, 4).bfloat16(), "weight": torch.rand(4, 4).bfloat16()}
    testing.assert_autocast(torch.nn.functional.linear, inputs, ["input"], torch.bfloat16)
    # torch casts a loss up.
    distance = torch.nn.functional.mse_loss
    inputs = {"input": torch.rand(4, 4).bfloat16(), "target": torch.rand(4, 4).bfloat16()}
    testing.assert_autocast(distance, inputs, ["input"], torch.float32)
    with fails("forward: "):
        testing.assert_autocast(distance, inputs, ["input"], None)


def test_capture_asks_for_a_gpu() -> None:
    with fails("arguments must be on a CUDA device", ValueError):
        testing.assert_capturable(torch.abs, {"input": torch.ones(3)}, {"input": torch.ones(3)})


@pytest.mark.gpu
def test_capture() -> None:
    first, other = ({"x": torch.rand(5, device="cuda")} for _ in range(2))
    testing.assert_capturable(lambda x: x.exp(), first, other, ["x"])
    with pytest.raises(RuntimeError, match="captur"):
        testing.assert_capturable(lambda x: x * x.sum().item(), first, other)

    calls: list[Tensor] = []

    def counts(x: Tensor) -> Tensor:
        calls.append(x)
        return x * len(calls)

    with fails("differs between the replayed graph and a call"):
        testing.assert_capturable(counts, first, other)


# ---- declarations ----


def test_parity_needs_both() -> None:
    with fails("function and reference must both be given; got only function", ValueError):
        Parity("x", "A", (), function=torch.abs)
    with fails("functions must be left out beside a function; got y", ValueError):
        Parity("x", "A", (), ("y",), function=torch.abs, reference=torch.abs)


def test_without_must_be_known() -> None:
    with fails("without must name tests or layouts; got opchek", ValueError):
        type("Wrong", (Suite,), {"without": {"opchek": "misspelt"}})


# ---- as a user sees it ----

PROGRAM = """
import torch
from torchkiln.testing import Case, Parity, Suite

class TestOwn(Suite):
    parity = Parity(
        op="own",
        tier="A",
        cases=(Case("typical", lambda new: {"x": new.normal(3, 8)}),),
        function=lambda x: torch.as_strided(x, x.shape, (8, 1)) * 2,
        reference=lambda x: x * 2,
    )
    without = {"opcheck": "no operator", "threads": "not today"}
    devices = ("cpu",)
"""


def test_a_users_file(tmp_path: Path) -> None:
    """Far from this repository's conftest: the kernel that forgets strides fails its layouts."""
    (tmp_path / "test_own.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfs", "-p", "no:cacheprovider", "test_own.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    failed = {line.split(" - ")[0] for line in done.stdout.splitlines() if "FAILED" in line}
    where = "FAILED test_own.py::TestOwn::test_layouts"
    assert failed == {
        f"{where}[own-{layout}-cpu]" for layout in ("permuted", "strided", "expanded")
    }, done.stdout
    for reason in ("no operator", "not today", "no dynamic dimension", "not differentiable"):
        assert reason in done.stdout


def test_imports_without_its_extras() -> None:
    """Only the pieces that need pytest or expecttest say so, and only when they are used."""
    program = """
        import sys
        for name in ("pytest", "expecttest", "hypothesis"):
            sys.modules[name] = None
        import torch
        from torchkiln import testing
        assert testing.verify(["box_iou"], dtypes=["float32"])
        for use in (
            lambda: testing.Suite,
            lambda: testing.assert_opcheck(torch.abs, {"input": torch.ones(2)}),
        ):
            try:
                use()
            except ImportError as error:
                print(error)
    """
    done = run(program)
    assert done.stdout.splitlines() == [
        f"testing.{piece}: {package} must be installed; found none. "
        f"Install it with: pip install {package}"
        for piece, package in (("Suite", "pytest"), ("assert_opcheck", "expecttest"))
    ], done.stderr
