"""selective_state_update: steps equal the scan, for each causal rule; rows, heads, complex."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from support.op_suite import Failure, OpSuite
from torchkiln import backend
from torchkiln.ops import scan_history, selective_scan, selective_state_update
from torchkiln.ops.scan.selective_state_update import _count
from torchkiln.reference.scan.selective_state_update import parity
from torchkiln.testing import Inputs

_CAUSAL = ("mamba", "zoh", "foh", "bilinear", "tustin", "highorder", "rk4", "rk4_constant")


class TestSelectiveStateUpdate(OpSuite):
    parity = parity()
    without: ClassVar = {"expanded": "the state is changed in place"}
    failures = (
        Failure(
            "integers",
            {"x": lambda x: x.long()},
            TypeError,
            r"^selective_state_update: x must be a floating-point tensor; got int64",
        ),
        Failure(
            "state_shape",
            {"state": lambda s: s[:, :4]},
            ValueError,
            r"state must have shape \(3, 5, 4\); got \(3, 4, 4\)",
        ),
        Failure(
            "steps",
            {"dt": lambda dt: dt[:2]},
            ValueError,
            r"dt must have shape \(3, 5\); got \(2, 5\)",
        ),
        Failure(
            "A", {"A": lambda a: a[:, :3]}, ValueError, r"A must have shape \(5, 4\); got \(5, 3\)"
        ),
        Failure(
            "groups",
            {"B": torch.zeros(3, 2, 4, 1), "C": torch.zeros(3, 2, 4, 1)},
            ValueError,
            r"B must have a number of groups that divides 5; got 2",
        ),
        Failure(
            "matrix",
            {"C": lambda c: c[:, :3]},
            ValueError,
            r"C must have shape \(3, 1, 4\); got \(3, 1, 3\)",
        ),
        Failure(
            "poly",
            {"discretization": "poly"},
            ValueError,
            r"discretization must be a rule that needs no later sample; got poly\. Decode with "
            r"highorder",
        ),
        Failure(
            "unknown",
            {"discretization": "euler"},
            ValueError,
            r'discretization must be "mamba", "zoh", .* or "rk4_constant"; got \'euler\'',
        ),
        Failure(
            "indices",
            {"state_batch_indices": torch.zeros(3).long()},
            TypeError,
            r"state_batch_indices must be int32; got int64",
        ),
    )


def _problem(length: int, is_complex: bool, groups: int = 2) -> dict[str, Any]:
    new = Inputs(7)

    def number(*shape: int) -> Tensor:
        re, im = new.normal(*shape), new.normal(*shape)
        return torch.complex(re, im) if is_complex else re

    return {
        "u": new.normal(3, 4, length),
        "delta": new.normal(3, 4, length),
        "A": number(4, 5) - 2 * new.uniform(4, 5, low=1, high=2),
        "B": number(3, groups, 5, length),
        "C": number(3, groups, 5, length),
        "D": new.normal(4),
        "z": new.normal(3, 4, length),
        "delta_bias": new.normal(4),
        "delta_softplus": True,
    }


def _step(state: Tensor, p: dict[str, Any], k: int, **settings: Any) -> Tensor:
    return selective_state_update(
        state,
        p["u"][..., k],
        p["delta"][..., k],
        p["A"],
        p["B"][..., k],
        p["C"][..., k],
        p["D"],
        p["z"][..., k],
        p["delta_bias"],
        True,
        **settings,
    )


@pytest.mark.parametrize("true_time", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("rule", _CAUSAL)
def test_steps_equal_the_scan(rule: str, is_complex: bool, true_time: bool) -> None:
    """From the start, and after a prefix that was scanned."""
    problem = _problem(6, is_complex)
    settings: dict[str, Any] = {"discretization": rule, "true_time": true_time}
    with backend("reference"):
        whole, last = selective_scan(**problem, return_last_state=True, **settings)
    for prefix in (0, 1, 4):
        past = {k: v[..., :prefix] if k in ("u", "delta", "B", "C", "z") else v
                for k, v in problem.items()}  # fmt: skip
        steps = torch.nn.functional.softplus(past["delta"] + problem["delta_bias"][:, None])
        history = scan_history(past["u"], past["B"], rule, true_time=true_time, delta=steps)
        state = torch.zeros_like(last)
        if prefix:
            with backend("reference"):
                _, state = selective_scan(**past, return_last_state=True, **settings)
            state = state.clone()
        for k in range(prefix, 6):
            out = _step(state, problem, k, history=history, **settings)
            torch.testing.assert_close(out, whole[..., k])
        torch.testing.assert_close(state, last)


def test_only_named_rows_change(device: str) -> None:
    problem = {k: v.to(device) if isinstance(v, Tensor) else v
               for k, v in _problem(1, False).items()}  # fmt: skip
    cache = Inputs().normal(6, 4, 5).to(device)
    before, rows = cache.clone(), torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    history = scan_history(
        torch.zeros(6, 4, 0, device=device).double(),
        torch.zeros(6, 2, 5, 0, device=device).double(),
        "foh",
    )
    assert history is not None
    out = _step(cache, problem, 0, state_batch_indices=rows, discretization="foh", history=history)
    assert not out[1].any()
    changed = (cache != before).flatten(1).any(1).tolist()
    assert changed == [True, False, False, False, True, False]
    assert history.seen.tolist() == [1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_and_weights_may_stay_in_float32(dtype: torch.dtype, device: str) -> None:
    problem = _problem(1, False, groups=1)
    wide = {k: v.to(device) for k, v in problem.items() if isinstance(v, Tensor)}
    mixed = {k: v.to(dtype if k in ("u", "delta", "B", "C", "z") else torch.float32)
             for k, v in wide.items()}  # fmt: skip
    exact = {k: v.double() for k, v in mixed.items()}
    state = Inputs().normal(3, 4, 5).to(device, torch.float32)
    expected_state = state.double()
    out = _step(state, mixed, 0)
    expected = _step(expected_state, exact, 0)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))
    torch.testing.assert_close(state, expected_state.float(), rtol=1e-5, atol=1e-5)


def test_tied_heads_cost_no_memory(device: str) -> None:
    """Mamba-2's steps: one number a head, expanded."""
    new = Inputs()
    state = new.normal(2, 3, 4, 8).to(device)
    x, dt = new.normal(2, 3, 4).to(device), new.uniform(2, 3, 1).to(device)
    A, D = -new.uniform(3, 1, 1).to(device), new.normal(3, 1).to(device)
    B, C = new.normal(2, 1, 8).to(device), new.normal(2, 1, 8).to(device)
    outs = []
    for change in (lambda t: t, Tensor.contiguous):
        copy = state.clone()
        tied = (change(dt.expand(2, 3, 4)), change(A.expand(3, 4, 8)), B, C)
        outs += [selective_state_update(copy, x, *tied, change(D.expand(3, 4))), copy]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_counter_below_0_counts_as_0(name: str) -> None:
    """One that wrapped led before the rings."""
    results = []
    for seen in (0, -1, -(2**31)):
        history = scan_history(torch.zeros(1, 4, 0), torch.zeros(1, 3, 0), "foh")
        assert history is not None
        history.seen.fill_(seen)
        state, step, rate, row = (torch.ones(s) for s in ((1, 4, 3), (1, 4), (4, 3), (1, 3)))
        with backend(name):
            out = selective_state_update(
                state, step, step, -rate, row, row, discretization="foh", history=history
            )
        results.append(torch.cat([out.flatten(), state.flatten(), history.x.flatten()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_history_is_needed() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"history must be given for a rule that takes in earlier"):
        selective_state_update(torch.zeros(1, 1, 1), one, one, -one, one, one, discretization="foh")


def test_rows_that_are_none_are_not_counted(device: str) -> None:
    """Those beyond the state neither, which a GPU takes."""
    seen = torch.tensor([3, 4, 5], dtype=torch.int32, device=device)
    rows = torch.tensor([1, 7, -1, 2**31 - 1], dtype=torch.int32, device=device)
    _count(seen, rows)
    assert seen.tolist() == [3, 5, 5]


@pytest.mark.gpu
def test_rows_beyond_the_state_on_a_gpu() -> None:
    problem = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in _problem(1, False).items()}
    state, before = torch.zeros(3, 4, 5, device="cuda").double(), torch.zeros(3, 4, 0).cuda()
    history = scan_history(before.double(), torch.zeros(3, 2, 5, 0, device="cuda").double(), "foh")
    rows = torch.tensor([3, 1, -1], dtype=torch.int32, device="cuda")
    out = _step(state, problem, 0, state_batch_indices=rows, discretization="foh", history=history)
    assert not out[0].any()
    assert state.flatten(1).any(1).tolist() == [False, True, False]
    assert history is not None
    assert history.seen.tolist() == [0, 1, 0]


@pytest.mark.parametrize("is_complex", [False, True])
def test_autograd_notices_the_change(is_complex: bool, device: str) -> None:
    problem = {k: v.to(device) if isinstance(v, Tensor) else v
               for k, v in _problem(2, is_complex).items()}  # fmt: skip
    state = torch.ones(3, 4, 5, device=device, dtype=problem["A"].dtype)
    u = problem["u"].clone().requires_grad_()
    out = selective_scan(**problem | {"u": u}, initial_state=state)
    _step(state, problem, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_history_of_no_use() -> None:
    """Its samples would be counted without being kept."""
    one = torch.ones(1, 1)
    history = scan_history(torch.zeros(1, 1, 0), torch.zeros(1, 1, 0), "foh")
    arguments = torch.zeros(1, 1, 1), one, one, -one, one, one
    with pytest.raises(
        ValueError, match=r"history must be None for a rule .* beside 'zoh'\. Leave"
    ):
        selective_state_update(*arguments, discretization="zoh", history=history)
    pair: Any = (one, one)
    with pytest.raises(TypeError, match=r"history must be a ScanHistory or None; got tuple\. Make"):
        selective_state_update(*arguments, discretization="foh", history=pair)
    assert history is not None
    assert history.seen.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_of_half_types_sums_widely(dtype: torch.dtype) -> None:
    """Steps of 20, whose exponential float16 does not hold, and many states."""
    new = Inputs()
    x, state = new.normal(2, 3).to(dtype), new.normal(2, 3, 64).to(dtype)
    dt = torch.tensor([[16.0, 20, 0.1], [-40, 12, 3]]).to(dtype)
    rest = -new.uniform(3, 64).to(dtype), *(new.normal(2, 64).to(dtype) for _ in "BC")
    expected = selective_state_update(
        state.double(), x.double(), dt.double(), *(t.double() for t in rest), dt_softplus=True
    )
    with backend("reference"):
        out = selective_state_update(state, x, dt, *rest, dt_softplus=True)
    torch.testing.assert_close(out, expected.to(dtype))


def test_a_row_beyond_the_state() -> None:
    one, rows = torch.ones(1, 1), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"state_batch_indices must be below the number of states"):
        selective_state_update(
            torch.zeros(2, 1, 1), one, one, -one, one, one, state_batch_indices=rows
        )


def test_too_many_channels() -> None:
    """States without numbers, and the rest expanded: no memory."""
    state, x = torch.zeros(2**16, 2**15, 0), torch.ones(1, 1).expand(2**16, 2**15)
    empty = torch.zeros(2**16, 0)
    with pytest.raises(
        ValueError,
        match=r"^selective_state_update: x must have fewer than 2\^31 elements; got "
        r"\(65536, 32768\)\. Split the batch",
    ):
        selective_state_update(state, x, x, x.new_zeros(2**15, 0), empty, empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["A", "B", "C", "tied A", "none"])
def test_strides_along_states_change_no_number(
    change: str, weight: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    """The GPU reads several states at once, where all tensors allow it."""
    weight = torch.promote_types(weight, dtype)
    new = Inputs()
    state = new.normal(2, 6, 24).to(device, torch.float32)
    x, dt = new.normal(2, 6).to(device, dtype), new.uniform(2, 6).to(device, dtype)
    of = {
        "A": -new.uniform(6, 24).to(device, weight),
        **{name: new.normal(2, 24).to(device, dtype) for name in "BC"},
    }
    if change == "tied A":
        of["A"] = of["A"][:, :1].expand(6, 24)
    elif change != "none":
        of[change] = of[change].repeat_interleave(3, 1)[:, ::3]
    expected_state = state.double()
    expected = selective_state_update(
        expected_state, x.double(), dt.double(), *(of[name].double() for name in "ABC")
    )
    out = selective_state_update(state, x, dt, of["A"], of["B"], of["C"])
    torch.testing.assert_close(out, expected.to(dtype))
    torch.testing.assert_close(state, expected_state.float(), rtol=1e-5, atol=1e-5)


def test_a_state_without_numbers(device: str) -> None:
    """It may have strides of 0."""
    state = torch.zeros(1, 2, 0, device=device).expand(3, 2, 0)
    x, empty = torch.ones(3, 2, device=device), torch.zeros(3, 0, device=device)
    out = selective_state_update(state, x, x, x.new_zeros(2, 0), empty, empty)
    assert not out.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_state_is_rounded_once_a_step_and_the_output_comes_before(
    dtype: torch.dtype, device: str
) -> None:
    """As mamba-ssm has it: the sum is of what the state was before it was rounded."""
    new = Inputs()
    state = new.normal(2, 3, 40).to(device, dtype)
    x, dt = new.normal(2, 3).to(device, dtype), new.uniform(2, 3).to(device, dtype)
    A, B, C = (
        -new.uniform(3, 40).to(device, dtype),
        *(new.normal(2, 40).to(device, dtype) for _ in "BC"),
    )
    for _ in range(4):
        exact = state.double()
        expected = selective_state_update(exact, *(tensor.double() for tensor in (x, dt, A, B, C)))
        out = selective_state_update(state, x, dt, A, B, C)
        torch.testing.assert_close(out, expected.to(dtype))
        torch.testing.assert_close(state, exact.to(dtype))


def _complex(new: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """State, x, A and B of a complex recurrence."""

    def pair(*shape: int) -> torch.Tensor:
        return torch.complex(-new.uniform(*shape, low=0.1), new.normal(*shape)).to(torch.complex64)

    return pair(2, 4, 3), new.uniform(2, 4).to(dtype), pair(4, 3), pair(2, 3)


def test_a_complex_state_in_a_compiled_graph() -> None:
    state, x, A, B = _complex(Inputs(), torch.float32)
    states = state.clone(), state.clone()
    compiled = torch.compile(selective_state_update, backend="aot_eager", fullgraph=True)
    out = compiled(states[0], x, x, A, B, B)
    torch.testing.assert_close(out, selective_state_update(states[1], x, x, A, B, B))
    torch.testing.assert_close(*states)
    assert not torch.equal(states[0], state)


def test_conjugates_that_are_not_resolved() -> None:
    state, x, A, B = _complex(Inputs(), torch.float32)
    states = state.clone(), state.conj().resolve_conj()
    out = selective_state_update(states[0].conj(), x, x, A.conj(), B.conj(), B.conj())
    plain = [tensor.conj().resolve_conj() for tensor in (A, B, B)]
    torch.testing.assert_close(out, selective_state_update(states[1], x, x, *plain))
    torch.testing.assert_close(states[0].conj(), states[1])


def test_complex_parameters_of_another_precision() -> None:
    """As selective_scan takes them."""
    state, x, A, B = _complex(Inputs(), torch.float64)
    out = selective_state_update(state.to(torch.complex128), x, x, A, B, B)
    wide = [tensor.to(torch.complex128) for tensor in (state, A, B)]
    torch.testing.assert_close(
        out, selective_state_update(wide[0], x, x, wide[1], wide[2], wide[2])
    )
    with pytest.raises(TypeError, match=r"state must be complex128 .* float64; got complex64"):
        selective_state_update(state, x, x, A, B, B)


@pytest.mark.parametrize("name", ["A", "B"])
def test_what_is_no_tensor(name: str) -> None:
    one = torch.ones(1, 1)
    arguments = {"state": torch.ones(1, 1, 1), "x": one, "dt": one, "A": one, "B": one, "C": one}
    sentence = f"^selective_state_update: {name} must be a tensor; got None$"
    with pytest.raises(TypeError, match=sentence):
        selective_state_update(**arguments | {name: None})


@pytest.mark.parametrize(
    ("u", "B", "sentence"),
    [
        ((2, 3, 5), (3, 4), r"B must have shape \(2, N, 5\) or \(2, G, N, 5\); got \(3, 4\)"),
        ((2, 3, 5), (2, 4, 4), r"B must have shape .*; got \(2, 4, 4\)"),
        ((3, 5), (2, 4, 5), r"u must have shape \(B, D, L\); got \(3, 5\)"),
    ],
)
def test_wrong_histories(u: tuple[int, ...], B: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match="^scan_history: " + sentence):
        scan_history(torch.zeros(u), torch.zeros(B), "foh")
    whole = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"delta must have shape \(2, 3, 5\); got \(2, 3, 4\)"):
        scan_history(whole, whole, "highorder", true_time=True, delta=whole[..., 1:])
