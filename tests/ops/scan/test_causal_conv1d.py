"""causal_conv1d_fn: layouts, packed sequences, states, widths, dtypes of the weights."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import backend, reference
from torchkiln.ops import causal_conv1d_fn
from torchkiln.reference.scan.causal_conv1d import parity
from torchkiln.testing import Inputs


class TestCausalConv1d(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"x": 2}
    failures = (
        Failure(
            "integers",
            {"x": lambda x: x.long()},
            TypeError,
            r"^causal_conv1d: x must be a floating-point tensor; got int64",
        ),
        Failure(
            "two_dimensions",
            {"x": lambda x: x[0]},
            ValueError,
            r"^causal_conv1d: x must have shape \(B, D, L\); got \(5, 13\)",
        ),
        Failure(
            "weight_rows",
            {"weight": lambda w: w[:3]},
            ValueError,
            r"weight must have shape \(5, 4\); got \(3, 4\)",
        ),
        Failure(
            "weight_dtype",
            {"weight": lambda w: w.half()},
            TypeError,
            r"weight must have the dtype of x \(float32\), or float32 beside a half type; got "
            r"float16",
        ),
        Failure(
            "width",
            {"weight": torch.zeros(5, 33)},
            ValueError,
            r"weight must have a width from 1 to 32; got 33\. Use torch\.nn\.functional\.conv1d",
        ),
        Failure(
            "bias",
            {"bias": torch.zeros(4)},
            ValueError,
            r"bias must have shape \(5,\); got \(4,\)",
        ),
        Failure(
            "sequences_dtype",
            {"seq_idx": torch.zeros(2, 13).long()},
            TypeError,
            r"seq_idx must be int32; got int64\. Convert it with seq_idx\.int\(\)",
        ),
        Failure(
            "sequences_shape",
            {"seq_idx": torch.zeros(2, 12).int()},
            ValueError,
            r"seq_idx must have shape \(2, 13\); got \(2, 12\)",
        ),
        Failure(
            "initial_shape",
            {"initial_states": torch.zeros(2, 5, 4)},
            ValueError,
            r"initial_states must have shape \(2, 5, 3\); got \(2, 5, 4\)",
        ),
        Failure(
            "activation",
            {"activation": "relu"},
            ValueError,
            r"activation must be None, \"silu\" or \"swish\"; got 'relu'",
        ),
    )


def test_reference_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    weight = torch.tensor([[100.0, 10.0, 1.0]], dtype=torch.float64)
    before = torch.tensor([[[7.0, 8.0]]], dtype=torch.float64)
    assert reference.causal_conv1d(x, weight).tolist() == [[[1, 12, 123]]]
    assert reference.causal_conv1d(x, weight, None, None, before).tolist() == [[[781, 812, 123]]]
    ids = torch.tensor([[0, 1, 1]], dtype=torch.int32)
    assert reference.causal_conv1d(x, weight, None, ids, before).tolist() == [[[781, 2, 23]]]


def test_the_reference_of_half_types_sums_widely() -> None:
    new = Inputs()
    x, weight = new.normal(2, 3, 40).half(), new.normal(3, 32).half()
    expected = causal_conv1d_fn(x.double(), weight.double())
    with backend("reference"):
        torch.testing.assert_close(causal_conv1d_fn(x, weight), expected.half())


def test_equals_torchs_convolution(device: str) -> None:
    x, weight = Inputs().normal(2, 6, 33).to(device), Inputs(1).normal(6, 4).to(device)
    expected = torch.nn.functional.conv1d(x, weight[:, None], padding=3, groups=6)[..., :33]
    torch.testing.assert_close(causal_conv1d_fn(x, weight), expected)


@pytest.mark.parametrize("shape", [(2, 16, 40), (2, 6, 13)])
def test_layout_stays(shape: tuple[int, int, int], device: str) -> None:
    x, weight = Inputs().normal(*shape).to(device, torch.float32), torch.ones(shape[1], 4)
    weight = weight.to(device)
    last = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    outputs = [causal_conv1d_fn(each, weight) for each in (x.requires_grad_(), last)]
    assert outputs[1].stride() == last.stride()
    torch.testing.assert_close(outputs[0], outputs[1])
    (grad,) = torch.autograd.grad(outputs[0].square().sum(), x)
    (grad_last,) = torch.autograd.grad(outputs[1].square().sum(), last)
    assert grad_last.stride() == last.stride()
    torch.testing.assert_close(grad, grad_last)


def test_half_of_a_projection_is_not_copied(device: str) -> None:
    """Mamba's x is a view of x and z."""
    xz = Inputs().normal(2, 8, 16).to(device, torch.float32)
    weight = Inputs(1).normal(4, 4).to(device, torch.float32)
    out = causal_conv1d_fn(xz[:, :4], weight, activation="silu")
    assert torch.equal(out, causal_conv1d_fn(xz[:, :4].contiguous(), weight, activation="silu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_stay_in_float32(dtype: torch.dtype, device: str) -> None:
    x = Inputs().normal(2, 6, 30).to(device, dtype).requires_grad_()
    weight = Inputs(1).normal(6, 4).to(device, torch.float32).requires_grad_()
    bias = Inputs(2).normal(6).to(device, torch.float32).requires_grad_()
    out = causal_conv1d_fn(x, weight, bias, activation="silu")
    assert out.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = reference.causal_conv1d(exact[0], exact[1], exact[2], silu=True)
    torch.testing.assert_close(out, expected.to(dtype))
    direction = Inputs(3).normal(*x.shape).to(device, dtype)
    grads = torch.autograd.grad(out, (x, weight, bias), direction)
    wanted = torch.autograd.grad(expected, exact, direction.double())
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(grads[1].double(), wanted[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[2].double(), wanted[2], rtol=1e-4, atol=1e-4)


@given(seeds, st.integers(0, 12), st.integers(0, 12), st.integers(1, 5))
def test_two_halves_equal_the_whole(seed: int, first: int, second: int, width: int) -> None:
    new = Inputs(seed)
    x, weight, bias = new.normal(2, 3, first + second), new.normal(3, width), new.normal(3)
    before = new.normal(2, 3, width - 1)
    whole, last = causal_conv1d_fn(x, weight, bias, None, before, True, "silu")
    one, state = causal_conv1d_fn(x[..., :first], weight, bias, None, before, True, "silu")
    two, end = causal_conv1d_fn(x[..., first:], weight, bias, None, state, True, "silu")
    torch.testing.assert_close(torch.cat([one, two], 2), whole)
    assert torch.equal(end, last)


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_packed_sequences_equal_single_ones(seed: int, first: int, second: int) -> None:
    new = Inputs(seed)
    x, weight, before = new.normal(1, 3, first + second), new.normal(3, 4), new.normal(1, 3, 3)
    ids = torch.tensor([[4] * first + [2] * second], dtype=torch.int32)
    out, state = causal_conv1d_fn(x, weight, None, ids, before, True)
    one = causal_conv1d_fn(x[..., :first], weight, initial_states=before)
    two, end = causal_conv1d_fn(x[..., first:], weight, return_final_states=True)
    torch.testing.assert_close(out, torch.cat([one, two], 2))
    assert torch.equal(state, end)


def test_gradients_pass_through_the_final_state(device: str) -> None:
    x = Inputs().normal(2, 3, 5).to(device).requires_grad_()
    before = Inputs(1).normal(2, 3, 3).to(device).requires_grad_()
    weight = Inputs(2).normal(3, 4).to(device)
    _, state = causal_conv1d_fn(x, weight, None, None, before, True)
    grad, grad_before = torch.autograd.grad(state.sum(), (x, before), materialize_grads=True)
    assert grad[0, 0].tolist() == [0, 0, 1, 1, 1]
    assert not grad_before.any()
    _, state = causal_conv1d_fn(x[..., :1], weight, None, None, before, True)
    (grad_before,) = torch.autograd.grad(state.sum(), before)
    assert grad_before[0, 0].tolist() == [0, 1, 1]
