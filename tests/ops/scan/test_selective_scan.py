"""selective_scan: all rules and gradients, golden values, the properties that define each rule."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import backend
from torchkiln.ops import selective_scan
from torchkiln.reference.scan import _golden
from torchkiln.reference.scan.selective_scan import _arranged, parity
from torchkiln.testing import Inputs

METHODS = ("mamba", "zoh", "foh", "bilinear", "tustin", "poly", "highorder", "rk4", "rk4_constant")
RULES = [*((name, False) for name in METHODS), ("poly", True), ("highorder", True)]


class TestSelectiveScan(OpSuite):
    # The route that adds atomically is tried by the emulated GPU and by `torchkiln verify`.
    parity = replace(
        parity(), deterministic=True, arrange=functools.partial(_arranged, deterministic=True)
    )
    dynamic: ClassVar = {"u": 0, "delta": 0, "B": 0, "C": 0, "z": 0, "initial_state": 0}
    failures = (
        Failure("integer_u", {"u": lambda x: x.long()}, TypeError, r"u must be a floating-point"),
        Failure("complex_u", {"u": lambda x: x + 0j}, TypeError, r"u must be .*; got complex64"),
        Failure("u_of_two_dimensions", {"u": lambda x: x[0]}, ValueError, r"u must have shape"),
        Failure(
            "dtype_of_delta",
            {"delta": lambda x: x.double()},
            TypeError,
            r"delta must have the dtype of u \(float32\); got float64",
        ),
        Failure(
            "shape_of_delta",
            {"delta": lambda x: x[..., 1:]},
            ValueError,
            r"delta must have shape \(2, 4, 21\); got \(2, 4, 20\)",
        ),
        Failure(
            "channels_of_A",
            {"A": lambda x: x[1:]},
            ValueError,
            r"A must have shape \(4, N\); got \(3, 3\)",
        ),
        Failure(
            "states",
            {"A": torch.zeros(4, 257)},
            ValueError,
            r"A must have 1 to 256 states; got 257",
        ),
        Failure("integer_A", {"A": torch.ones(4, 3).long()}, TypeError, r"A must be float32"),
        Failure(
            "states_of_B",
            {"B": lambda x: x[:, :, 1:]},
            ValueError,
            r"B must have shape \(2, G, 3, 21\); got \(2, 2, 2, 21\)",
        ),
        Failure(
            "groups",
            {"B": torch.zeros(2, 3, 3, 21)},
            ValueError,
            r"B must have a number of groups that divides the 4 channels; got 3",
        ),
        Failure(
            "groups_of_C",
            {"C": torch.zeros(2, 4, 3, 21)},
            ValueError,
            r"C must have the groups of B \(2\); got 4",
        ),
        Failure(
            "shape_of_constant_C",
            {"C": torch.zeros(4, 2)},
            ValueError,
            r"C must have the shape of A \(4, 3\) or vary with the positions; got \(4, 2\)",
        ),
        Failure("shape_of_D", {"D": lambda x: x[1:]}, ValueError, r"D must have shape \(4,\)"),
        Failure("shape_of_z", {"z": lambda x: x[:1]}, ValueError, r"z must have shape"),
        Failure(
            "shape_of_state",
            {"initial_state": lambda x: x[..., 1:]},
            ValueError,
            r"initial_state must have shape \(2, 4, 3\)",
        ),
        Failure("no_u", {"u": None}, TypeError, r"^selective_scan: u must be a tensor; got None"),
        Failure("list_for_u", {"u": [1.0]}, TypeError, r"u must be a tensor; got list$"),
        Failure("no_A", {"A": None}, TypeError, r"^selective_scan: A must be a tensor; got None"),
        Failure("no_B", {"B": None}, TypeError, r"^selective_scan: B must be a tensor; got None"),
        Failure("number_for_D", {"D": 1.0}, TypeError, r"D must be a tensor; got float$"),
        Failure(
            "parts_of_B",
            {
                "A": torch.zeros(4, 3, dtype=torch.complex64),
                "B": torch.zeros(2, 2, 3, 21, dtype=torch.complex128),
            },
            TypeError,
            r"B must have parts of the dtype of u \(float32\); got complex128. Use torch.view_as",
        ),
        Failure(
            "list_for_discretization",
            {"discretization": ["foj"]},
            ValueError,
            r"discretization must be .*; got \['foj'\]",
        ),
        Failure(
            "discretization",
            {"discretization": "euler"},
            ValueError,
            r'discretization must be "mamba", .* or "rk4_constant"; got \'euler\'',
        ),
    )


# ---- golden values ----


def row(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


@pytest.mark.parametrize("where", ["native", "reference"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_golden_values(rule: tuple[str, bool], where: str) -> None:
    name, true_time = rule
    states, last = _golden.GOLDEN[rule]
    arguments: dict[str, Any] = {"discretization": name, "true_time": true_time}
    ones = torch.ones(1, 1, 4, dtype=torch.float64)
    with backend(where):
        out = selective_scan(
            row(_golden.INPUTS),
            row(_golden.STEPS),
            torch.full((1, 1), _golden.REAL_A, dtype=torch.float64),
            row(_golden.MATRIX),
            ones,
            **arguments,
        )
        _, state = selective_scan(
            row(_golden.INPUTS),
            row(_golden.STEPS),
            torch.tensor([[_golden.COMPLEX_A]], dtype=torch.complex128),
            row(_golden.MATRIX) + 0j,
            ones + 0j,
            return_last_state=True,
            **arguments,
        )
    torch.testing.assert_close(out, row(states), rtol=0, atol=_golden.REAL_ROUNDING)
    torch.testing.assert_close(state.item(), last, rtol=0, atol=_golden.COMPLEX_ROUNDING)


# ---- what defines the rules ----


def states_of(v: Tensor, steps: Tensor, a: Tensor, name: str) -> Tensor:
    """After every position, for samples v, all of shape (length,), of a complex a."""
    arguments = (torch.ones(1, 1, len(v)).double(), steps.view(1, 1, -1), a.view(1, 1))
    # 2 Re(c h) is a part of h.
    parts = (
        selective_scan(
            *arguments,
            v.view(1, 1, -1),
            torch.full((1, 1, len(v)), c, dtype=torch.complex128),
            discretization=name,
            true_time=True,
        ).flatten()
        for c in (0.5, -0.5j)
    )
    return torch.complex(*parts)


@given(seeds, st.sampled_from([("zoh", 0), ("foh", 1), ("poly", 2), ("highorder", 2)]))
def test_holds_are_exact_for_polynomials(seed: int, rule: tuple[str, int]) -> None:
    """Against the closed form of the differential equation, with unequal steps and complex a."""
    name, degree = rule
    new = Inputs(seed)
    a = torch.complex(-new.uniform(1, low=0.1, high=3), new.normal(1))
    steps = new.uniform(6, low=0.05, high=0.7)
    times = torch.cat([torch.zeros(1), steps.cumsum(0)]).double()
    # h = sum_j c_j t^j is a solution for v = h' - a h.
    c = torch.complex(new.normal(degree + 1), new.normal(degree + 1))
    powers = torch.arange(degree + 1)

    def h(t: Tensor) -> Tensor:
        return (c * t[:, None] ** powers).sum(1)

    def v(t: Tensor) -> Tensor:
        slope = sum(j * c[j] * t ** (j - 1) for j in range(1, degree + 1)) + 0j * t
        return slope - a * h(t)

    # The first steps take in samples that repeat: begin behind them, from the exact state; so does
    # the last one of the rule that looks ahead.
    begin, end = 0 if degree == 0 else 2, -2 if name == "poly" else -1
    every = states_of(v(times[1:]), steps, a, name)
    exact = h(times)
    error = exact[begin] - (every[begin - 1] if begin else 0)
    # What the wrong start has left decays by exp(a t).
    left = error * torch.exp(a * (times[end] - times[begin]))
    torch.testing.assert_close(every[end] + left[0], exact[end], rtol=1e-11, atol=1e-11)


_RUNNING_SUMS: dict[str, dict[int, float]] = {
    **{rule: {0: 1} for rule in ("mamba", "zoh", "bilinear", "rk4_constant")},
    **{rule: {-1: 1 / 2, 0: 1 / 2} for rule in ("foh", "tustin", "rk4")},
    "poly": {-1: 5 / 12, 0: 8 / 12, 1: -1 / 12},
    "highorder": {0: 5 / 12, -1: 8 / 12, -2: -1 / 12},
}


@pytest.mark.parametrize("a", [0.0, -1e-12])
@pytest.mark.parametrize("rule", METHODS)
def test_nothing_decays(rule: str, a: float) -> None:
    """Of integrals there are left running sums, trapezoids and parabolas."""
    new = Inputs(6)
    v, steps = new.normal(9), new.uniform(9, low=0.1)
    ones = torch.ones(1, 1, 9, dtype=torch.float64)
    decay = torch.full((1, 1), a, dtype=torch.float64)
    out = selective_scan(ones, steps.view(1, 1, 9), decay, v.view(1, 1, 9), ones,
                         discretization=rule)  # fmt: skip
    held = sum(w * v[(torch.arange(9) + j).clamp(0, 8)] for j, w in _RUNNING_SUMS[rule].items())
    torch.testing.assert_close(out.flatten(), (steps * held).cumsum(0), rtol=0, atol=1e-10)


@given(seeds, st.sampled_from([rule for rule in RULES if rule[0] != "mamba"]))
def test_constant_input_has_its_steady_state(seed: int, rule: tuple[str, bool]) -> None:
    """-v / a, whatever the steps: the weights add up to (1 - alpha) / -z."""
    new = Inputs(seed)
    a, v = -new.uniform(2, 3, low=0.3, high=2), new.normal(2, 3)
    steps = new.uniform(1, 2, 9, low=0.2, high=0.9)
    out, state = selective_scan(
        torch.ones(1, 2, 9, dtype=torch.float64),
        steps,
        a,
        v,
        torch.ones(2, 3, dtype=torch.float64),
        discretization=rule[0],
        true_time=rule[1],
        initial_state=(-v / a)[None],
        return_last_state=True,
    )
    torch.testing.assert_close(state[0], -v / a)
    torch.testing.assert_close(out, (-v / a).sum(1)[None, :, None].expand(1, 2, 9))


@pytest.mark.parametrize(
    ("rule", "order"),
    list(zip(METHODS, (1, 1, 2, 1, 2, 3, 3, 2, 1), strict=True)),
)
def test_order_of_convergence(rule: str, order: int) -> None:
    """Half the steps, 2^order of the error, for a smooth input."""
    a = torch.tensor([[-1.3]], dtype=torch.float64)

    def last(count: int) -> float:
        times = torch.linspace(0, 2, count + 1, dtype=torch.float64)[1:]
        # Flat at both ends, where samples repeat.
        v = 1 + torch.sin(torch.pi / 2 * times).pow(4).view(1, 1, -1)
        ones = torch.ones_like(v)
        _, state = selective_scan(
            ones, ones * 2 / count, a, v, ones, discretization=rule, return_last_state=True
        )
        return float(state)

    coarse, middle, fine = last(200), last(400), last(800)
    ratio = (coarse - middle) / (middle - fine)
    assert 2 ** (order - 0.25) < ratio < 2 ** (order + 0.25)


@given(seeds, st.sampled_from(RULES))
def test_reverse_is_the_scan_of_the_flipped(seed: int, rule: tuple[str, bool]) -> None:
    new = Inputs(seed)
    u, delta, z = (new.uniform(2, 3, 13, low=0.1) for _ in range(3))
    B, C = (new.normal(2, 1, 2, 13) for _ in range(2))
    A = -new.uniform(3, 2, low=0.1)
    settings: dict[str, Any] = {"discretization": rule[0], "true_time": rule[1]}
    backwards = selective_scan(u, delta, A, B, C, z=z, reverse=True, **settings)
    flipped = selective_scan(
        *(x.flip(-1) for x in (u, delta)), A, B.flip(-1), C.flip(-1), z=z.flip(-1), **settings
    )
    assert torch.equal(backwards, flipped.flip(-1))


@given(seeds, st.integers(1, 12))
def test_a_scan_continues_from_its_last_state(seed: int, cut: int) -> None:
    """Mamba's rule takes no samples from the other side of the cut."""
    new = Inputs(seed)
    u, delta = (new.uniform(1, 2, 13, low=0.1) for _ in range(2))
    B, C = (new.normal(1, 1, 3, 13) for _ in range(2))
    A = -new.uniform(2, 3, low=0.1)
    whole, last = selective_scan(u, delta, A, B, C, return_last_state=True)
    first, state = selective_scan(
        u[..., :cut], delta[..., :cut], A, B[..., :cut], C[..., :cut], return_last_state=True
    )
    second, end = selective_scan(
        u[..., cut:],
        delta[..., cut:],
        A,
        B[..., cut:],
        C[..., cut:],
        initial_state=state,
        return_last_state=True,
    )
    torch.testing.assert_close(torch.cat([first, second], -1), whole)
    torch.testing.assert_close(end, last)


# ---- forms of the arguments ----


def test_three_forms_of_complex_matrices() -> None:
    new = Inputs(3)
    u, delta = (new.uniform(2, 4, 7, low=0.1).float() for _ in range(2))
    A = torch.complex(-new.uniform(4, 3), new.normal(4, 3)).to(torch.complex64)
    B = torch.complex(new.normal(2, 3, 7), new.normal(2, 3, 7)).to(torch.complex64)
    pairs = torch.view_as_real(B).flatten(-2)
    expected = selective_scan(u, delta, A, B, B)
    assert torch.equal(selective_scan(u, delta, A, pairs, B[:, None]), expected)
    assert torch.equal(selective_scan(u, delta, A, pairs[:, None], B), expected)


def test_autocast_gives_mixed_inputs_their_common_dtype() -> None:
    new = Inputs(4)
    u, delta = (new.uniform(2, 4, 7, low=0.1).float() for _ in range(2))
    A, B = -new.uniform(4, 3).float(), new.normal(2, 3, 7).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = selective_scan(u, delta.bfloat16(), A, B.bfloat16(), B)
    expected = selective_scan(u, delta.bfloat16().float(), A, B.bfloat16().float(), B)
    assert torch.equal(mixed, expected)


def test_long_rows_keep_few_states() -> None:
    """What is saved for the gradient, beside the inputs, is a thirtieth of all states."""
    u = torch.rand(1, 2, 5000, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = selective_scan(
            u, u.detach(), -torch.rand(2, 16), torch.rand(1, 16, 5000), torch.rand(2, 16)
        )
    out.sum().backward()
    assert max(saved) == 16 * 5000
    assert sum(saved) < 2 * 10_000 + 16 * 5000 + 2 * 32 + 10_000 * 16 / 30


def _complex_scan() -> dict[str, Tensor]:
    new = Inputs(5)

    def pair(*shape: int) -> Tensor:
        return torch.complex(-new.uniform(*shape, low=0.1), new.normal(*shape)).to(torch.complex64)

    return {
        "u": new.normal(2, 4, 7).float(),
        "delta": new.uniform(2, 4, 7, low=0.1).float(),
        "A": pair(4, 3),
        "B": pair(2, 3, 7),
        "C": pair(2, 3, 7),
        "initial_state": pair(2, 4, 3),
    }


def test_complex_scans_compile_whole() -> None:
    arguments = _complex_scan()
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    outs = []
    for function in (selective_scan, compiled):
        A = arguments["A"].clone().requires_grad_()
        out = function(**arguments | {"A": A})
        outs.append((out.detach(), *torch.autograd.grad(out.sum(), A)))
    for eager, graph in zip(*outs, strict=True):
        torch.testing.assert_close(graph, eager)


def test_conjugates_that_are_not_resolved() -> None:
    arguments = _complex_scan()
    lazy = {name: value.conj() for name, value in arguments.items()}
    resolved = {name: value.conj().resolve_conj() for name, value in arguments.items()}
    assert lazy["A"].is_conj()
    assert torch.equal(selective_scan(**lazy), selective_scan(**resolved))


def test_shapes_alone() -> None:
    for arguments in (_complex_scan(), {**_complex_scan(), "A": torch.ones(4, 3)}):
        if not arguments["A"].is_complex():
            arguments |= {"B": torch.ones(2, 3, 7), "C": torch.ones(4, 3)}
            del arguments["initial_state"]
        shapes = {name: value.to("meta") for name, value in arguments.items()}
        out, state = selective_scan(**shapes, return_last_state=True)
        assert (out.shape, state.shape) == ((2, 4, 7), (2, 4, 3))
        assert state.dtype == arguments["A"].dtype


@pytest.mark.parametrize("states", [1, 2, 3])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(states: int, bad: float) -> None:
    """Also where one thread goes from that row to the others, and where N is odd."""
    generator = torch.Generator().manual_seed(0)
    u, delta = (torch.rand(2, 17, 9, generator=generator) for _ in range(2))
    A = -torch.rand(17, states, generator=generator)
    B, C = (torch.rand(2, states, 9, generator=generator) for _ in range(2))
    expected = selective_scan(u, delta, A, B, C)
    u[0, 0, 4] = bad
    out = selective_scan(u, delta, A, B, C)
    assert torch.equal(out[0, 0, :4], expected[0, 0, :4])
    assert torch.equal(out[0, 1:], expected[0, 1:])
    assert torch.equal(out[1], expected[1])
    assert not out[0, 0, 4:].isfinite().any()
