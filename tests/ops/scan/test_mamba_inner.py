"""mamba_inner_fn: what is computed again, memory, complex states, autocast."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from support.op_suite import CompositionSuite, Failure
from torchkiln.ops import causal_conv1d_fn, mamba_inner_fn
from torchkiln.ops.scan import mamba_inner
from torchkiln.reference.scan.mamba_inner import _make, parity
from torchkiln.reference.scan.mamba_inner import mamba_inner_fn as plain
from torchkiln.testing import Inputs, prepare


class TestMambaInner(CompositionSuite):
    parity = parity()
    dynamic: ClassVar = {"xz": 0}
    without: ClassVar = {
        "expanded": "gradients of rows that are one in memory are sums of many",
        "autocast": "the projections run in autocast's dtype, the scan does not: see below",
    }
    failures = (
        Failure(
            "odd",
            {"xz": lambda xz: xz[:, :7]},
            ValueError,
            r"^mamba_inner_fn: xz must have shape \(B, 2 D, L\); got \(2, 7, 9\)",
        ),
        Failure(
            "integers",
            {"xz": lambda xz: xz.long()},
            TypeError,
            r"^mamba_inner_fn: xz must be a floating-point tensor; got int64",
        ),
        Failure(
            "projection",
            {"x_proj_weight": lambda w: w[:5]},
            ValueError,
            r"x_proj_weight must have shape \(8, 4\); got \(5, 4\)",
        ),
        Failure(
            "no_xz", {"xz": None}, TypeError, r"^mamba_inner_fn: xz must be a tensor; got None$"
        ),
        Failure("no_A", {"A": None}, TypeError, r"^mamba_inner_fn: A must be a tensor; got None$"),
        Failure(
            "list_for_B",
            {"B": [1.0]},
            TypeError,
            r"^mamba_inner_fn: B must be a tensor; got list$",
        ),
        Failure(
            "bias_alone",
            {"out_proj_weight": None, "out_proj_bias": torch.zeros(5)},
            ValueError,
            r"out_proj_bias must be None without out_proj_weight; got a tensor",
        ),
        Failure(
            "level",
            {"checkpoint_lvl": 2},
            ValueError,
            r"checkpoint_lvl must be 0 or 1; got 2",
        ),
    )


def test_level_1_computes_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return causal_conv1d_fn(*arguments, **settings)

    monkeypatch.setattr(mamba_inner, "causal_conv1d_fn", counted)
    grads = []
    for level, expected in ((0, 1), (1, 3)):
        calls.clear()
        arguments = prepare(parity().cases[0], torch.float64, device)
        xz = arguments["xz"].requires_grad_()
        arguments["x_proj_weight"].requires_grad_()
        out = mamba_inner_fn(**arguments | {"checkpoint_lvl": level})
        assert len(calls) == 1
        inputs = (xz, arguments["x_proj_weight"])
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
        # For the scan, and for the projection's weight.
        assert len(calls) == expected
    for kept, computed in zip(*grads, strict=True):
        assert torch.equal(kept, computed)


def test_complex_states(device: str) -> None:
    arguments: dict[str, Any] = prepare(parity().cases[0], torch.float64, device)
    arguments["A"] = torch.complex(arguments["A"], Inputs().normal(4, 3).to(device))
    arguments["x_proj_weight"] = Inputs(1).normal(2 + 12, 4).to(device)
    torch.testing.assert_close(mamba_inner_fn(**arguments), plain(**arguments))


def test_under_autocast(device: str) -> None:
    arguments = prepare(parity().cases[0], torch.float32, device)
    arguments["xz"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = mamba_inner_fn(**arguments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(**arguments), rtol=0.05, atol=0.05)
    (grad,) = torch.autograd.grad(out.float().sum(), arguments["xz"])
    assert grad.dtype == torch.float32


_CHANGED = ("A", "x_proj_weight", "delta_proj_weight", "conv1d_weight", "D", "delta_bias")


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", _CHANGED)
def test_what_changed_since_the_forward_is_noticed(name: str, level: int, device: str) -> None:
    arguments = prepare(parity().cases[0], torch.float64, device)
    for value in arguments.values():
        value.requires_grad_()
    out = mamba_inner_fn(**arguments | {"checkpoint_lvl": level})
    with torch.no_grad():
        arguments[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_computed_again_comes_from_the_same_tensors(device: str) -> None:
    """Without a gradient of its own autograd does not keep the convolution's weight."""
    arguments = prepare(parity().cases[0], torch.float64, device)
    arguments["x_proj_weight"].requires_grad_()
    out = mamba_inner_fn(**arguments)
    arguments["conv1d_weight"].mul_(2)
    with pytest.raises(RuntimeError, match=r"^mamba_inner_fn: a tensor needed for the gradient"):
        out.sum().backward()


def test_a_complex_block_compiles_whole(device: str) -> None:
    arguments: dict[str, Any] = prepare(parity().cases[0], torch.float32, device)
    arguments["A"] = torch.complex(arguments["A"], Inputs().normal(4, 3).float().to(device))
    arguments["x_proj_weight"] = Inputs(1).normal(2 + 12, 4).float().to(device)
    compiled = torch.compile(mamba_inner_fn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), mamba_inner_fn(**arguments))


def test_shapes_alone() -> None:
    arguments = {
        name: value.to("meta").requires_grad_()
        for name, value in prepare(parity().cases[0], torch.float32, "cpu").items()
    }
    out = mamba_inner_fn(**arguments)
    assert out.shape == (2, 9, 5)
    out.sum().backward()
    assert arguments["A"].grad.shape == (4, 3)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("form", ["constant", "one group", "groups", "complex"])
def test_matrices_that_are_given(form: str, is_complex: bool) -> None:
    """In every form that the scan takes."""
    new = Inputs()
    arguments: Any = _make(2, 4, 7, new, constant=True)
    numbers = 2 if is_complex else 1

    def matrix() -> torch.Tensor:
        if form == "constant":
            return new.normal(4, 3)
        if form == "complex" and is_complex:
            return torch.complex(new.normal(2, 3, 7), new.normal(2, 3, 7))
        groups = (2,) if form == "groups" else (1,) if form == "one group" else ()
        return new.normal(2, *groups, 3, 7 * numbers)

    if is_complex:
        arguments["A"] = torch.complex(arguments["A"], new.normal(4, 3))
    arguments |= {"B": matrix(), "C": matrix()}
    torch.testing.assert_close(mamba_inner_fn(**arguments), plain(**arguments))


@pytest.mark.parametrize("groups", [(), (1,), (2,)])
def test_norms_of_matrices_that_are_given(groups: tuple[int, ...]) -> None:
    """As mamba-ssm's, which takes them of whatever B and C are."""
    new = Inputs()
    arguments: Any = _make(2, 4, 7, new, constant=True)
    B, C, weight = new.normal(2, *groups, 3, 7), new.normal(2, *groups, 3, 7), new.normal(3)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-2, keepdim=True) + 1e-6).sqrt() * weight[:, None]

    for function in (mamba_inner_fn, plain):
        out = function(**arguments | {"B": B, "C": C}, b_rms_weight=weight, c_rms_weight=weight)
        expected = function(**arguments | {"B": normed(B), "C": normed(C)})
        torch.testing.assert_close(out, expected)


def test_norms_of_what_has_no_rows() -> None:
    arguments: Any = _make(2, 4, 7, Inputs(), constant=True)
    with pytest.raises(
        ValueError,
        match=r"^mamba_inner_fn: c_rms_weight must be None beside a constant or complex C that is "
        r"given; got a tensor\. Normalise C first$",
    ):
        mamba_inner_fn(**arguments, c_rms_weight=torch.ones(3, dtype=torch.float64))
