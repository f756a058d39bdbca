"""causal_conv1d in plain PyTorch: one shifted copy of the input for each weight."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Convolves each channel with a filter of its own that ends at the position in question.

    Args:
        x: (B, D, L).
        weight: (D, width).
        bias: (D,) or None.
        seq_idx: (B, L) int32, which sequence a position belongs to; below 0: padding.
        initial_states: (B, D, width - 1) or None: zeros.
        silu: whether an activation follows.

    Returns:
        (B, D, L).
    """
    width, length = weight.shape[1], x.shape[2]
    before = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    wide = torch.promote_types(x.dtype, torch.float32)
    extended = torch.cat([before, x], 2).to(wide)
    out = torch.zeros_like(x, dtype=wide) if bias is None else bias.to(wide)[:, None].expand_as(x)
    for j in range(width):
        seen = extended[:, :, j : j + length]
        if seq_idx is not None and length:
            from_ids = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1)
            joined = from_ids[:, j : j + length] == seq_idx
            seen = torch.where(joined[:, None], seen, 0)
        out = out + weight[:, j, None] * seen
    if silu:
        out = torch.nn.functional.silu(out)
    if seq_idx is not None:
        out = torch.where(seq_idx[:, None] >= 0, out, 0)
    return out.to(x.dtype)


def parity() -> Parity:
    """What causal_conv1d is tried on."""
    return Parity(
        op="causal_conv1d",
        tier="B",
        functions=("causal_conv1d_fn",),
        differentiable=("x", "weight", "bias", "initial_states"),
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_make, (2, 5, 13), 4)),
            Case("vectors", functools.partial(_make, (2, 3, 48), 4)),
            Case("channels_last", functools.partial(_make, (2, 8, 21), 4, columns=True)),
            Case("width_2", functools.partial(_make, (1, 3, 16), 2, activation=None)),
            Case("width_3_last", functools.partial(_make, (1, 4, 9), 3, columns=True)),
            Case("width_1", functools.partial(_make, (2, 4, 8), 1)),
            Case("wide", functools.partial(_make, (1, 3, 40), 9)),
            Case("wide_last", functools.partial(_make, (1, 4, 20), 9, columns=True)),
            Case("shorter_than_the_filter", functools.partial(_make, (2, 3, 2), 4)),
            Case("packed", functools.partial(_make, (2, 3, 24), 4, packed=True)),
            Case("packed_last", functools.partial(_make, (2, 4, 24), 4, packed=True, columns=True)),
            # More than one block's span and more than one of the CPU's.
            Case("long", functools.partial(_make, (1, 2, 1304), 4)),
            Case("long_last", functools.partial(_make, (1, 20, 1301), 3, columns=True)),
            Case("single", functools.partial(_make, (1, 1, 1), 2)),
            Case("empty", functools.partial(_make, (2, 3, 0), 4)),
            Case("no_channels", functools.partial(_make, (2, 0, 5), 3)),
        ),
        workloads=tuple(
            # The layer before the scan of Mamba-130M, in training.
            Workload(
                name,
                {"batch": 8, "channels": 1536, "length": 2048, "width": 4},
                functools.partial(_workload, name == "columns"),
            )
            for name in ("rows", "columns")
        ),
    )


def _in_columns(x: Tensor) -> Tensor:
    """The same values, channels contiguous."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _make(
    shape: tuple[int, int, int],
    width: int,
    new: Inputs,
    *,
    columns: bool = False,
    packed: bool = False,
    activation: str | None = "silu",
) -> dict[str, object]:
    batch, channels, length = shape
    x = new.normal(*shape)
    made: dict[str, object] = {
        "x": _in_columns(x) if columns else x,
        "weight": new.normal(channels, width) / 2,
        "bias": new.normal(channels) / 2,
        "initial_states": new.normal(batch, channels, width - 1),
        "activation": activation,
    }
    if packed:
        made["seq_idx"] = _sequences(new.integers(batch, length, high=7))
    return made


def _sequences(dice: Tensor) -> Tensor:
    """A new sequence where the dice show 0; the last positions of a row are padding."""
    ids = (dice == 0).int().cumsum(1).int()
    ids[:, dice.shape[1] - 2 :] = -1
    return ids


def _workload(columns: bool, sizes: Sizes) -> dict[str, object]:
    shape = sizes["batch"], sizes["channels"], sizes["length"]
    x = scenes.normal(shape, scenes.SEED)
    return {
        "x": _in_columns(x) if columns else x,
        "weight": scenes.normal((shape[1], sizes["width"]), scenes.SEED + 1) / 2,
        "bias": scenes.normal(shape[1:2], scenes.SEED + 2),
        "initial_states": scenes.normal((*shape[:2], sizes["width"] - 1), scenes.SEED + 3),
        "activation": "silu",
    }


def _fuzz(draw: Draw) -> dict[str, object]:
    # NaN and infinities times a weight of 0 depend on the order of sums.
    draw.undefined("special")
    batch, channels, length = draw.size(3), draw.size(9), draw.size(40)
    width = draw.option("width", 2, 3, 4, 7)
    x = draw.values(batch, channels, length)
    arguments: dict[str, object] = {
        "x": _in_columns(x) if draw.option("layout", False, True) else x,
        "weight": draw.uniform(channels, width, low=-1),
        "bias": draw.uniform(channels, low=-1),
        "initial_states": draw.values(batch, channels, width - 1),
        "activation": draw.option("activation", None, "silu"),
    }
    if draw.option("packed", False, True):
        arguments["seq_idx"] = _sequences(draw.integers(batch, length, high=5))
    return arguments
