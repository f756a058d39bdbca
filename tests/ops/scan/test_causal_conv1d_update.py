"""causal_conv1d_update: steps equal the whole convolution; rings, rows, states in place."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln.ops import causal_conv1d_fn, causal_conv1d_update
from torchkiln.reference.scan.causal_conv1d_update import parity
from torchkiln.testing import Inputs


class TestCausalConv1dUpdate(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"x": 0, "conv_state": 0}
    without: ClassVar = {
        "expanded": "the state of the typical case is changed in place",
    }
    failures = (
        Failure(
            "integers",
            {"x": lambda x: x.long()},
            TypeError,
            r"^causal_conv1d_update: x must be a floating-point tensor; got int64",
        ),
        Failure(
            "one_dimension",
            {"x": lambda x: x[0]},
            ValueError,
            r"^causal_conv1d_update: x must have shape \(B, D\) or \(B, D, L\); got \(5,\)",
        ),
        Failure(
            "short_state",
            {"conv_state": lambda s: s[:, :, :2]},
            ValueError,
            r"conv_state must hold at least the 3 inputs that the weight reaches back; got "
            r"\(3, 5, 2\)",
        ),
        Failure(
            "state_dtype",
            {"conv_state": lambda s: s.double()},
            TypeError,
            r"conv_state must have the dtype of x \(float32\); got float64",
        ),
        Failure(
            "state_shape",
            {"conv_state": lambda s: s[:2]},
            ValueError,
            r"conv_state must have shape \(3, 5, 3\); got \(2, 5, 3\)",
        ),
        Failure(
            "seqlens",
            {"cache_seqlens": torch.zeros(3).long()},
            TypeError,
            r"cache_seqlens must be int32; got int64",
        ),
        Failure(
            "indices",
            {"conv_state_indices": torch.zeros(4).int()},
            ValueError,
            r"conv_state_indices must have shape \(3,\); got \(4,\)",
        ),
        Failure(
            "activation",
            {"activation": "relu"},
            ValueError,
            r"activation must be None, \"silu\" or \"swish\"; got 'relu'",
        ),
    )


@given(seeds, st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_steps_equal_the_whole(seed: int, length: int, width: int, ring: bool) -> None:
    new = Inputs(seed)
    x, weight, bias = new.normal(2, 3, length), new.normal(3, width), new.normal(3)
    whole, end = causal_conv1d_fn(x, weight, bias, None, None, True, "silu")
    state = torch.zeros(2, 3, width - 1, dtype=torch.float64)
    for k in range(length):
        seen = torch.full((2,), k, dtype=torch.int32) if ring else None
        out = causal_conv1d_update(x[:, :, k], state, weight, bias, "silu", seen)
        torch.testing.assert_close(out, whole[:, :, k])
    if not ring:
        assert torch.equal(state, end)


def test_only_named_rows_change(device: str) -> None:
    state = Inputs().normal(5, 3, 3).to(device)
    before = state.clone()
    rows = torch.tensor([3, -1], dtype=torch.int32, device=device)
    x = Inputs(1).normal(2, 3).to(device)
    weight = Inputs(2).normal(3, 4).to(device)
    out = causal_conv1d_update(x, state, weight, conv_state_indices=rows)
    assert not out[1].any()
    changed = (state != before).any(2).any(1).tolist()
    assert changed == [False, False, False, True, False]
    assert torch.equal(state[3, :, -1], x[0])


def test_a_row_beyond_the_state() -> None:
    rows = torch.tensor([5], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"conv_state_indices must be below the number of states"):
        causal_conv1d_update(
            torch.zeros(1, 2), torch.zeros(5, 2, 3), torch.zeros(2, 4), conv_state_indices=rows
        )


def test_autograd_notices_the_change(device: str) -> None:
    x, weight = torch.ones(1, 2, device=device), torch.ones(2, 3, device=device)
    state = torch.ones(1, 2, 2, device=device)
    out = state * torch.ones(2, device=device, requires_grad=True)
    causal_conv1d_update(x, state, weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_expanded_state_is_refused() -> None:
    state = torch.zeros(1, 2, 3).expand(4, 2, 3)
    with pytest.raises(ValueError, match=r"conv_state must have memory for each element"):
        causal_conv1d_update(torch.zeros(4, 2), state, torch.zeros(2, 4))


def test_the_state_keeps_its_strides(device: str) -> None:
    state = Inputs().normal(2, 3, 4).to(device).transpose(1, 2).contiguous().transpose(1, 2)
    copy = state.contiguous()
    x, weight = Inputs(1).normal(2, 3).to(device), Inputs(2).normal(3, 3).to(device)
    assert torch.equal(
        causal_conv1d_update(x, state, weight), causal_conv1d_update(x, copy, weight)
    )
    assert torch.equal(state, copy)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("wide", [torch.float16, torch.float32])
def test_whole_rows_equal_others(device: str, width: int, wide: torch.dtype) -> None:
    """A state in rows of as many inputs as the filter is wide has a kernel of its own."""
    new = Inputs()
    x, state = new.normal(3, 8).half().to(device), new.normal(3, 8, width).half().to(device)
    weight, bias = new.normal(8, width).to(device, wide), new.normal(8).to(device, wide)
    # Lies elsewhere, and has a place more.
    other = torch.nn.functional.pad(state, (1, 0))
    out = causal_conv1d_update(x, state, weight, bias, "silu")
    assert torch.equal(out, causal_conv1d_update(x, other, weight, bias, "silu"))
    assert torch.equal(state, other[:, :, 1:])


def test_a_state_without_channels(device: str) -> None:
    """A contiguous one has a stride of 0, too."""
    state = torch.zeros(1, 0, 4, device=device).expand(3, 0, 4).contiguous()
    x, weight = torch.zeros(3, 0, device=device), torch.zeros(0, 4, device=device)
    assert state.stride(0) == 0
    assert causal_conv1d_update(x, state, weight).shape == (3, 0)
