"""mamba-ssm's, causal-conv1d's and the Vision Mamba fork's names: semantics, and where they lie."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchkiln import ops
from torchkiln._backend import choice
from torchkiln.compat import causal_conv1d, mamba, visionmamba
from torchkiln.testing import Inputs

# Independent of the code: signatures as the peers' users know them.
SIGNATURES = {
    mamba.selective_scan_fn: "u, delta, A, B, C, D, z, delta_bias, delta_softplus, "
    "return_last_state",
    mamba.mamba_inner_fn: "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, "
    "out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, "
    "delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps, "
    "discretization, reverse",
    mamba.selective_state_update: "state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, "
    "state_batch_indices",
    causal_conv1d.causal_conv1d_fn: "x, weight, bias, seq_idx, initial_states, "
    "return_final_states, final_states_out, activation",
    causal_conv1d.causal_conv1d_update: "x, conv_state, weight, bias, activation, cache_seqlens, "
    "conv_state_indices",
    visionmamba.selective_scan_fn: "u, delta, A, B, C, D, z, delta_bias, delta_softplus, "
    "return_last_state, discretization_method, use_cuda_kernel",
    visionmamba.mamba_inner_fn_no_out_proj: "xz, conv1d_weight, conv1d_bias, x_proj_weight, "
    "delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, "
    "checkpoint_lvl, discretization_method",
    visionmamba.mamba_inner_ref: "xz, conv1d_weight, conv1d_bias, x_proj_weight, "
    "delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, "
    "C_proj_bias, delta_softplus, discretization_method",
    visionmamba.bimamba_inner_fn: "xz, conv1d_weight, conv1d_bias, x_proj_weight, "
    "delta_proj_weight, out_proj_weight, out_proj_bias, A, A_b, B, C, D, delta_bias, B_proj_bias, "
    "C_proj_bias, delta_softplus, discretization_method",
}
PLACES = {
    mamba: (
        ("mamba_ssm", "selective_scan_fn"),
        ("mamba_ssm", "mamba_inner_fn"),
        ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
        ("mamba_ssm.ops.selective_scan_interface", "selective_scan_ref"),
        ("mamba_ssm.ops.selective_scan_interface", "mamba_inner_fn"),
        ("mamba_ssm.ops.selective_scan_interface", "SelectiveScanFn"),
        ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    ),
    causal_conv1d: (
        ("causal_conv1d", "causal_conv1d_fn"),
        ("causal_conv1d", "causal_conv1d_update"),
        ("causal_conv1d.causal_conv1d_interface", "causal_conv1d_fn"),
        ("causal_conv1d.causal_conv1d_interface", "causal_conv1d_ref"),
    ),
    visionmamba: (
        ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
        ("mamba_ssm.ops.selective_scan_interface", "mamba_inner_fn_no_out_proj"),
        ("mamba_ssm.ops.selective_scan_interface", "bimamba_inner_fn"),
        ("mamba_ssm.ops.selective_scan_interface", "bimamba_inner_ref"),
        ("mamba_ssm.ops.selective_scan_interface", "BiMambaInnerFn"),
        ("mamba_ssm.ops.selective_scan_interface", "SelectiveScanFn"),
        ("mamba_ssm.ops.selective_scan_interface", "mamba_inner_ref"),
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_signature(function: Any) -> None:
    assert ", ".join(inspect.signature(function).parameters) == SIGNATURES[function]


@pytest.mark.parametrize("drop_in", PLACES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_install_puts_the_names_where_users_find_them(drop_in: ModuleType) -> None:
    before = {name for name in sys.modules if name.startswith(("mamba_ssm", "causal_conv1d"))}
    drop_in.install()
    drop_in.install()
    try:
        for place, name in PLACES[drop_in]:
            assert getattr(importlib.import_module(place), name) is getattr(drop_in, name)
    finally:
        drop_in.uninstall()
    after = {name for name in sys.modules if name.startswith(("mamba_ssm", "causal_conv1d"))}
    assert after == before
    drop_in.uninstall()


def test_over_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own modules stay, but for those that are ours, and come back."""
    folder = tmp_path / "mamba_ssm" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("theirs = 1\n")
    (folder / "__init__.py").write_text("")
    (folder / "selective_scan_interface.py").write_text("selective_scan_fn = 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    place = "mamba_ssm.ops.selective_scan_interface"
    theirs = importlib.import_module(place)
    mamba.install()
    try:
        ours = importlib.import_module(place)
        package = importlib.import_module("mamba_ssm")
        assert ours.selective_scan_fn is mamba.selective_scan_fn
        assert package.theirs == 1
        assert package.selective_scan_fn is mamba.selective_scan_fn
        assert package.ops.selective_scan_interface is ours
    finally:
        mamba.uninstall()
    assert importlib.import_module(place) is theirs
    assert package.ops.selective_scan_interface is theirs
    assert not hasattr(package, "selective_scan_fn")
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        del sys.modules[name]


@pytest.mark.parametrize("when", ["before", "after"])
def test_over_an_installed_convolution(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has beside our functions stays, imported before `install` or after."""
    folder = tmp_path / "causal_conv1d"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "__version__ = '1.6'\n"
        "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn\n"
        "from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states\n"
    )
    (folder / "causal_conv1d_interface.py").write_text("causal_conv1d_fn = 'theirs'\n")
    (folder / "causal_conv1d_varlen.py").write_text("causal_conv1d_varlen_states = 'theirs'\n")
    (folder / "cpp_functions.py").write_text("causal_conv1d_fwd_function = 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = importlib.import_module("causal_conv1d") if when == "before" else None
    causal_conv1d.install()
    try:
        package = importlib.import_module("causal_conv1d")
        assert before in (None, package)
        assert package.causal_conv1d_fn is causal_conv1d.causal_conv1d_fn
        assert package.causal_conv1d_update is causal_conv1d.causal_conv1d_update
        assert package.causal_conv1d_interface.causal_conv1d_fn is package.causal_conv1d_fn
        assert (package.__version__, package.causal_conv1d_varlen_states) == ("1.6", "theirs")
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        assert functions.causal_conv1d_fwd_function == "theirs"
    finally:
        causal_conv1d.uninstall()
    if before is not None:
        assert before.causal_conv1d_fn == "theirs"
        assert before.causal_conv1d_interface.causal_conv1d_fn == "theirs"
        assert not hasattr(before, "causal_conv1d_update")
    for name in [name for name in sys.modules if name.startswith("causal_conv1d")]:
        del sys.modules[name]


def _scan(new: Inputs, length: int = 9) -> dict[str, Tensor]:
    return {
        "u": new.normal(2, 4, length).float(),
        "delta": new.uniform(2, 4, length, high=0.5).float(),
        "A": -new.uniform(4, 3, low=0.1).float(),
        "B": new.normal(2, 3, length).float(),
        "C": new.normal(2, 3, length).float(),
    }


def _euler(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """mamba-ssm's definition, word for word in tensors."""
    state, outs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for k in range(u.shape[2]):
        step = delta[:, :, k, None]
        state = (step * A).exp() * state + step * B[:, None, :, k] * u[:, :, k, None]
        outs.append((state * C[:, None, :, k]).sum(-1))
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("function", [mamba.selective_scan_fn, visionmamba.selective_scan_fn])
def test_zoh_is_mambas_rule(function: Any) -> None:
    arguments = _scan(Inputs())
    out, last = function(**arguments, return_last_state=True)
    expected, state = _euler(**arguments)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, state)
    assert torch.equal(mamba.SelectiveScanFn.apply(*arguments.values()), out)


@pytest.mark.parametrize("method", visionmamba.DISCRETIZATIONS)
def test_the_forks_names(method: str) -> None:
    """Kernel and plain PyTorch agree, gradients too: there, only zoh has right ones."""
    arguments = _scan(Inputs())
    grads = []
    for use_kernel in (True, False):
        leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
        out = visionmamba.selective_scan_fn(
            **leaves, discretization_method=method, use_cuda_kernel=use_kernel
        )
        grads.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    native = ops.selective_scan(**arguments, discretization=visionmamba.DISCRETIZATIONS[method])
    assert torch.equal(grads[0][0], native)


def test_the_forks_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def scan(u: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(choice.reference)
        return u

    monkeypatch.setattr(ops, "selective_scan", scan)
    for word in ("0", "1"):
        monkeypatch.setenv("VIM_USE_CUDA_KERNEL", word)
        visionmamba.selective_scan_fn(**_scan(Inputs()))
    visionmamba.selective_scan_fn(**_scan(Inputs()), use_cuda_kernel=False)
    assert seen == [True, False, True]


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"discretization_method must be .*\"rk4\"; got 'x'"):
        visionmamba.selective_scan_fn(**_scan(Inputs()), discretization_method="x")


def _inner(new: Inputs) -> dict[str, Tensor | None]:
    return {
        "xz": new.normal(2, 8, 7).float(),
        "conv1d_weight": new.normal(4, 1, 4).float(),
        "conv1d_bias": new.normal(4).float(),
        "x_proj_weight": new.normal(8, 4).float() / 2,
        "delta_proj_weight": new.normal(4, 2).float(),
        "out_proj_weight": new.normal(5, 4).float(),
        "out_proj_bias": None,
        "A": -new.uniform(4, 3, low=0.5).float(),
    }


def test_inner_functions() -> None:
    arguments = _inner(Inputs())
    out = mamba.mamba_inner_fn(**arguments)
    torch.testing.assert_close(out, mamba.mamba_inner_ref(**arguments), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(visionmamba.mamba_inner_fn(**arguments), out)
    weight, _ = arguments.pop("out_proj_weight"), arguments.pop("out_proj_bias")
    bare = visionmamba.mamba_inner_fn_no_out_proj(**arguments)
    torch.testing.assert_close(bare.transpose(1, 2) @ weight.t(), out, rtol=1e-4, atol=1e-4)


def test_both_directions_of_one_projection() -> None:
    """With A alone in both, the sum does not change when the sequence is read backwards."""
    arguments = _inner(Inputs())
    arguments["conv1d_weight"] = torch.zeros(4, 1, 4)
    arguments["conv1d_weight"][..., -1] = 1
    same = {**arguments, "A_b": arguments["A"]}
    out = visionmamba.bimamba_inner_fn(**same, discretization_method="bilinear")
    flipped = visionmamba.bimamba_inner_fn(
        **{**same, "xz": same["xz"].flip(2)}, discretization_method="bilinear"
    )
    torch.testing.assert_close(out, flipped.flip(1), rtol=1e-4, atol=1e-4)
    ahead = visionmamba.mamba_inner_fn(**arguments, discretization_method="bilinear")
    assert not torch.allclose(out, ahead)


_WRONG = [
    ({"x_proj_weight": torch.zeros(9, 4)}, ValueError, r"x_proj_weight must have shape \(8, 4\)"),
    (
        {"A_b": torch.zeros(4, 2)},
        ValueError,
        r"A_b must have the shape of A \(4, 3\); got \(4, 2\)",
    ),
    (
        {"A_b": torch.zeros(4, 3, dtype=torch.complex64)},
        TypeError,
        r"A_b must be real like A; got complex64",
    ),
    ({"A_b": None}, TypeError, r"A_b must be a tensor; got None"),
    ({"xz": None}, TypeError, r"xz must be a tensor; got None"),
    ({"xz": torch.zeros(2, 7, 5)}, ValueError, r"xz must have shape \(B, 2 D, L\)"),
    ({"D": torch.zeros(5)}, ValueError, r"D must have shape \(4,\); got \(5,\)"),
    ({"out_proj_weight": None}, TypeError, r"out_proj_weight must be a tensor; got None"),
]


@pytest.mark.parametrize(("wrong", "error", "sentence"), _WRONG)
def test_both_directions_refuse(
    wrong: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    arguments = _inner(Inputs())
    arguments["A_b"] = arguments["A"]
    with pytest.raises(error, match="^bimamba_inner_fn: " + sentence):
        visionmamba.bimamba_inner_fn(**arguments | wrong)


@pytest.mark.parametrize("method", ["zoh", "foh"])
def test_the_forks_classes_and_references(method: str) -> None:
    """The rule is the last argument of each."""
    arguments = _inner(Inputs())
    rest = (None,) * 6  # from B to C_proj_bias
    one = (*arguments.values(), *rest, True)
    out = visionmamba.mamba_inner_fn(**arguments, discretization_method=method)
    assert torch.equal(visionmamba.MambaInnerFn.apply(*one, 1, method), out)
    plain = visionmamba.mamba_inner_ref(*one, method)
    torch.testing.assert_close(plain, out, rtol=1e-4, atol=1e-4)

    both = (*arguments.values(), arguments["A"] / 2, *rest, True)
    out = visionmamba.bimamba_inner_fn(*both, method)
    assert torch.equal(visionmamba.BiMambaInnerFn.apply(*both, 1, method), out)
    plain = visionmamba.bimamba_inner_ref(*both, method)
    torch.testing.assert_close(plain, out, rtol=1e-4, atol=1e-4)
    assert torch.equal(visionmamba.BiMambaInnerFn.apply(*both), visionmamba.bimamba_inner_fn(*both))

    scan = (*_scan(Inputs()).values(), None, None, None, False, False, method)
    assert torch.equal(
        visionmamba.SelectiveScanFn.apply(*scan), visionmamba.selective_scan_fn(*scan)
    )


def test_decode_takes_mixed_dtypes() -> None:
    new = Inputs()
    state = new.normal(2, 4, 3).float()
    x, dt = new.normal(2, 4).bfloat16(), new.normal(2, 4).float()
    A, B, C = -new.uniform(4, 3).float(), new.normal(2, 3).bfloat16(), new.normal(2, 3).float()
    copies = state.clone(), state.clone()
    out = mamba.selective_state_update(copies[0], x, dt, A, B, C, dt_softplus=True)
    plain = mamba.selective_state_update_ref(copies[1], x, dt, A, B, C, dt_softplus=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(*copies)
    half = state.half()
    mamba.selective_state_update(half, x.float(), dt, A, B.float(), C, dt_softplus=True)
    torch.testing.assert_close(half.float(), copies[0], rtol=1e-2, atol=1e-2)


def test_decode_wants_tensors() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(TypeError, match=r"^selective_state_update: B must be a tensor; got None$"):
        mamba.selective_state_update(torch.ones(1, 1, 1), one, one, one, None, one)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"x": torch.ones(2, 4).int()}, r"x must be a floating-point tensor; got int32"),
        ({"state": torch.zeros(2, 4, 3).int()}, r"state must have the dtype of x .*; got int32"),
        ({"A": torch.zeros(4, 3) * 1j}, r"state must be complex64 beside a complex A"),
        ({"B": torch.zeros(2, 3) * 1j}, r"B must have the dtype of x \(float32\); got complex64"),
        ({"state_batch_indices": [0, 1]}, r"state_batch_indices must be a tensor; got list"),
        ({"state_batch_indices": torch.ones(2)}, r"state_batch_indices must be an integer tensor"),
    ],
)
def test_decode_rounds_nothing_away(wrong: dict[str, Any], sentence: str) -> None:
    """Imaginary parts and fractions would be lost without a word."""
    arguments = {
        "state": torch.zeros(2, 4, 3),
        "x": torch.ones(2, 4),
        "dt": torch.ones(2, 4),
        "A": -torch.ones(4, 3),
        "B": torch.ones(2, 3),
        "C": torch.ones(2, 3),
    }
    with pytest.raises(TypeError, match="^selective_state_update: " + sentence):
        mamba.selective_state_update(**arguments | wrong)


def test_decode_of_a_complex_recurrence() -> None:
    new = Inputs()

    def pair(*shape: int) -> Tensor:
        return torch.complex(-new.uniform(*shape, low=0.1), new.normal(*shape)).to(torch.complex64)

    state, x, A, B, C = pair(2, 4, 3), new.uniform(2, 4).half(), pair(4, 3), pair(2, 3), pair(2, 3)
    states = state.clone(), state.clone()
    out = mamba.selective_state_update(states[0], x, x, A, B, C)
    assert torch.equal(out, ops.selective_state_update(states[1], x, x, A, B, C))
    assert torch.equal(*states)


def test_final_states_out() -> None:
    new = Inputs()
    x, weight = new.normal(2, 4, 9).float(), new.normal(4, 4).half()
    kept = torch.empty(2, 4, 3)
    out, state = causal_conv1d.causal_conv1d_fn(
        x, weight, return_final_states=True, final_states_out=kept, activation="swish"
    )
    assert state is kept
    assert torch.equal(kept, x[:, :, -3:])
    plain = causal_conv1d.causal_conv1d_ref(x, weight, activation="silu")
    torch.testing.assert_close(out, plain)
    with pytest.raises(NotImplementedError, match="activation must be None, silu, or swish"):
        causal_conv1d.causal_conv1d_fn(x, weight, activation="relu")


def test_a_buffer_of_final_states_is_used_again() -> None:
    """What it held before is not part of the next graph, which is differentiated as ever."""
    new = Inputs()
    kept = torch.zeros(2, 4, 3)
    leaf, weight = new.normal(2, 4, 9).float().requires_grad_(), new.normal(4, 4).float()
    for _ in range(2):
        x = leaf.exp()
        _, state = causal_conv1d.causal_conv1d_fn(
            x, weight, return_final_states=True, final_states_out=kept
        )
        (grad,) = torch.autograd.grad(state.sum(), leaf)
        assert not kept.requires_grad
        assert torch.equal(kept, x[:, :, -3:])
        torch.testing.assert_close(grad[:, :, -3:], x[:, :, -3:])


def test_update_with_other_index_types() -> None:
    new = Inputs()
    state, weight = new.normal(5, 4, 3).float(), new.normal(4, 4).float()
    x, rows = new.normal(2, 4).float(), torch.tensor([3, 0])
    copies = state.clone(), state[rows]
    out = causal_conv1d.causal_conv1d_update(x, copies[0], weight, conv_state_indices=rows)
    plain = causal_conv1d.causal_conv1d_update_ref(x, copies[1], weight)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(copies[0][rows], copies[1])


def test_no_tensor_for_the_convolution() -> None:
    weight = torch.zeros(4, 3)
    with pytest.raises(TypeError, match=r"^causal_conv1d: x must be a tensor; got None$"):
        causal_conv1d.causal_conv1d_fn(None, weight, initial_states=torch.zeros(1, 4, 2))
    with pytest.raises(TypeError, match=r"^causal_conv1d: seq_idx must be a tensor; got list$"):
        causal_conv1d.causal_conv1d_fn(torch.zeros(1, 4, 2), weight, seq_idx=[0, 0])
    with pytest.raises(TypeError, match=r"^causal_conv1d_update: x must be a tensor; got None$"):
        causal_conv1d.causal_conv1d_update(None, weight, weight)
