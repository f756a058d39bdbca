"""SelectiveScan, Mamba and BidirectionalMamba: decoding, both directions, every rule."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn as torch_nn

from torchkiln import nn
from torchkiln.testing import Inputs

_RULES = ("mamba", "zoh", "foh", "bilinear", "tustin", "poly", "highorder", "rk4", "rk4_constant")


def _block(rule: str, *, reverse: bool = False) -> nn.Mamba:
    torch.manual_seed(0)
    block = nn.Mamba(6, d_state=4, discretization_method=rule, reverse=reverse)
    return block.double()


@pytest.mark.parametrize("rule", _RULES)
def test_rules_reach_the_scan_and_differentiate(rule: str) -> None:
    x = Inputs().normal(2, 7, 6).requires_grad_()
    out = _block(rule)(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all()
    if rule != "mamba":
        assert not torch.allclose(out, _block("mamba")(x))


@pytest.mark.parametrize("rule", [rule for rule in _RULES if rule != "poly"])
def test_steps_equal_the_whole(rule: str, device: str) -> None:
    block = _block(rule).to(device)
    x = Inputs().normal(2, 8, 6).to(device)
    whole = block(x)
    for prefix in (0, 1, 5):
        out, state = block.prefill(x[:, :prefix])
        torch.testing.assert_close(out, whole[:, :prefix])
        for k in range(prefix, 8):
            torch.testing.assert_close(block.step(x[:, k], state), whole[:, k])


def test_what_cannot_be_decoded() -> None:
    x = torch.zeros(1, 3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a rule that needs no later sample; got 'poly'"):
        _block("poly").prefill(x)
    with pytest.raises(ValueError, match=r"reverse must be False to decode; got True"):
        _block("mamba", reverse=True).prefill(x)


@pytest.mark.parametrize("rule", ["mamba", "poly"])
def test_reverse_is_the_flipped_sequence(rule: str) -> None:
    x = Inputs().normal(2, 7, 6)
    expected = _block(rule)(x.flip(1)).flip(1)
    torch.testing.assert_close(_block(rule, reverse=True)(x), expected)


@pytest.mark.parametrize("rule", ["mamba", "foh"])
def test_bidirectional_sums_both_directions(rule: str) -> None:
    """The rule reaches both."""
    torch.manual_seed(1)
    block = nn.BidirectionalMamba(6, d_state=4, discretization_method=rule).double()
    x = Inputs().normal(2, 7, 6)
    ahead = block.ahead(x)
    back = _block(rule)
    back.load_state_dict({**block.ahead.state_dict(), **block.back.state_dict()})
    torch.testing.assert_close(block(x), ahead + back(x.flip(1)).flip(1))
    block.divide = True
    torch.testing.assert_close(block(x), (ahead + back(x.flip(1)).flip(1)) / 2)
    if rule == "foh":
        for direction in (block.ahead, block.back):
            assert direction.discretization_method == "foh"


def test_parameters_have_the_peers_names() -> None:
    """Shapes of mamba-ssm's Mamba(d_model=6, d_state=4)."""
    assert {name: tuple(p.shape) for name, p in _block("mamba").state_dict().items()} == {
        "A_log": (12, 4),
        "D": (12,),
        "in_proj.weight": (24, 6),
        "conv1d.weight": (12, 1, 4),
        "conv1d.bias": (12,),
        "x_proj.weight": (9, 12),
        "dt_proj.weight": (12, 1),
        "dt_proj.bias": (12,),
        "out_proj.weight": (6, 12),
    }


def test_steps_start_between_their_bounds() -> None:
    scan = nn.SelectiveScan(256, dt_min=0.01, dt_max=0.2)
    steps = torch_nn.functional.softplus(scan.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.02
    assert 0.1 < steps.max() < 0.2001
    assert scan.dt_rank == math.ceil(256 / 16)
    assert repr(nn.SelectiveScan(8)).startswith("SelectiveScan(\n  discretization_method='mamba'")


def test_selective_scan_is_gated() -> None:
    scan = nn.SelectiveScan(8, d_state=4, discretization_method="zoh").double()
    x, z = Inputs().normal(2, 8, 5), Inputs(1).normal(2, 8, 5)
    torch.testing.assert_close(scan(x, z), scan(x) * torch_nn.functional.silu(z))


def test_mamba_under_autocast(device: str) -> None:
    torch.manual_seed(0)
    block = nn.Mamba(6, d_state=4).to(device)
    x = Inputs().normal(2, 7, 6).to(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block(x), rtol=0.1, atol=0.02)


def test_the_peers_arguments() -> None:
    """Those of mamba-ssm's Mamba, in its order."""
    names = list(inspect.signature(nn.Mamba).parameters)
    assert ", ".join(names[:16]) == (
        "d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, "
        "dt_init_floor, conv_bias, bias, use_fast_path, layer_idx, device, dtype"
    )
    block = nn.Mamba(
        6, dt_init="constant", dt_scale=2.0, dt_rank=4, layer_idx=3, dtype=torch.bfloat16
    )
    assert block.layer_idx == 3
    assert (block.dt_proj.weight == 1).all()
    dtypes = {name: value.dtype for name, value in block.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"A_log", "D"}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert block(torch.zeros(1, 3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    bound = nn.Mamba(64, dt_scale=0.5, dt_rank=4).dt_proj.weight.abs().max()
    assert 0.2 < bound <= 0.25


def test_blocks_on_the_meta_device() -> None:
    for block in (nn.Mamba(6, device="meta"), nn.BidirectionalMamba(6, device="meta")):
        assert {parameter.device.type for parameter in block.parameters()} == {"meta"}
        assert block(torch.zeros(2, 5, 6, device="meta")).shape == (2, 5, 6)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"discretization_method": "euler"}, r'"rk4_constant"; got \'euler\''),
        ({"discretization_method": ["foh"]}, r"got \['foh'\]"),
        ({"dt_rank": "foo"}, r'^Mamba: dt_rank must be "auto" or at least 1; got \'foo\''),
        ({"dt_rank": 0}, r"at least 1; got 0"),
        ({"dt_init": "zero"}, r'dt_init must be "random" or "constant"; got \'zero\''),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        nn.Mamba(6, **wrong)


@pytest.mark.parametrize(
    ("block", "x", "sentence"),
    [
        (
            nn.Mamba(6),
            (2, 5, 7),
            r"^Mamba: x must have shape \(batch, length, 6\); got \(2, 5, 7\)",
        ),
        (nn.BidirectionalMamba(6), (5, 6), r"^BidirectionalMamba: x must have .*; got \(5, 6\)"),
        (nn.SelectiveScan(6), (2, 5, 6), r"^SelectiveScan: x must have shape \(batch, 6, length\)"),
    ],
)
def test_wrong_shapes(block: torch_nn.Module, x: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        block(torch.zeros(x))


def test_a_step_is_one_position() -> None:
    block = _block("mamba")
    _, state = block.prefill(torch.zeros(1, 0, 6).double())
    with pytest.raises(ValueError, match=r"^Mamba.step: x must have shape \(batch, 6\); got"):
        block.step(torch.zeros(1, 1, 6).double(), state)


def test_the_names_of_the_namespace() -> None:
    """Classes only: no modules."""
    space: dict[str, Any] = {}
    exec("from torchkiln.nn import *", space)
    del space["__builtins__"]
    assert "Mamba" in space
    assert all(isinstance(value, type) for value in space.values())
