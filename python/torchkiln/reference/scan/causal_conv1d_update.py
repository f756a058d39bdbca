"""causal_conv1d_update in plain PyTorch: the convolution of the state and the new inputs."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _decoding as decoding
from torchkiln.testing import _scenes as scenes

__all__ = ["causal_conv1d_update"]


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Goes on with a causal convolution from a state, which is changed in place.

    Args:
        x: (B, D, L).
        conv_state: (B or rows, D, S).
        weight: (D, width).
        bias: (D,) or None.
        cache_seqlens: (B,) int32 or None; given, the state is a ring.
        conv_state_indices: (B,) int32 or None, the row of each sequence; below 0: none.
        silu: whether an activation follows.

    Returns:
        (B, D, L).
    """
    width = weight.shape[1]
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for b in range(x.shape[0]):
        row = b if conv_state_indices is None else int(conv_state_indices[b])
        if row < 0 or (x.device.type != "cpu" and row >= len(conv_state)):
            continue
        state = conv_state[row]
        # Where each input lies in the state, the oldest one first.
        size = state.shape[1]
        seen = size if cache_seqlens is None else int(cache_seqlens[b])
        places = [(seen - size + i) % size for i in range(size)]
        if cache_seqlens is None:
            places = list(range(size))
        if x.shape[2] == 0:
            continue
        inputs = torch.cat([state[:, places], x[b]], 1)
        steps = inputs[:, size - width + 1 :].unfold(1, width, 1)
        sums = (steps.to(torch.promote_types(x.dtype, torch.float32)) * weight[:, None]).sum(2)
        if bias is not None:
            sums = sums + bias[:, None]
        out[b] = torch.nn.functional.silu(sums) if silu else sums
        if size == 0:
            continue
        if cache_seqlens is not None:
            end = seen + x.shape[2]
            places = [(end - size + i) % size for i in range(size)]
        state[:, places] = inputs[:, x.shape[2] :]
    return out


def parity() -> Parity:
    """What causal_conv1d_update is tried on."""
    return Parity(
        op="causal_conv1d_update",
        tier="B",
        function=decoding.convolved,
        reference=decoding.convolved_plainly,
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_make, 3, 5, None, 3, 4)),
            Case("several", functools.partial(_make, 2, 3, 5, 3, 4)),
            Case("longer_state", functools.partial(_make, 2, 3, 2, 7, 3)),
            Case("ring", functools.partial(_make, 3, 4, None, 5, 4, ring=True)),
            Case("ring_several", functools.partial(_make, 2, 3, 7, 4, 4, ring=True)),
            Case("rows", functools.partial(_make, 3, 4, None, 3, 4, rows=True)),
            Case("rows_ring", functools.partial(_make, 3, 4, 2, 4, 2, rows=True, ring=True)),
            # As Mamba's modules keep it: whole rows, of as many inputs as the filter is wide.
            Case("whole_rows", functools.partial(_make, 3, 8, None, 4, 4)),
            Case("whole_rows_odd", functools.partial(_make, 2, 5, 1, 4, 4)),
            Case("whole_rows_narrow", functools.partial(_make, 2, 12, None, 2, 2)),
            Case("whole_rows_chosen", functools.partial(_make, 3, 40, None, 4, 4, rows=True)),
            Case("wide", functools.partial(_make, 2, 3, 3, 9, 8)),
            Case("width_1", functools.partial(_make, 2, 3, 3, 0, 1)),
            Case("single", functools.partial(_make, 1, 1, None, 1, 2)),
            Case("no_sequences", functools.partial(_make, 0, 3, None, 3, 4)),
            Case("no_positions", functools.partial(_make, 2, 3, 0, 3, 4)),
        ),
        workloads=(
            # A step of Mamba-130M.
            Workload(
                "decode",
                {"batch": 64, "channels": 1536, "width": 4},
                lambda sizes: _workload(sizes),
                gradient=False,
            ),
        ),
    )


def _make(
    batch: int,
    channels: int,
    length: int | None,
    size: int,
    width: int,
    new: Inputs,
    *,
    ring: bool = False,
    rows: bool = False,
) -> dict[str, object]:
    made: dict[str, object] = {
        "x": new.normal(batch, channels) if length is None else new.normal(batch, channels, length),
        "conv_state": new.normal(batch + 3 if rows else batch, channels, size),
        "weight": new.normal(channels, width) / 2,
        "bias": new.normal(channels) / 2,
        "activation": "silu",
    }
    if ring:
        made["cache_seqlens"] = new.integers(batch, high=20).int()
    if rows:
        made["conv_state_indices"] = torch.tensor([batch + 1, -1, 0], dtype=torch.int32)[:batch]
    return made


def _workload(sizes: Sizes) -> dict[str, object]:
    batch, channels, width = sizes["batch"], sizes["channels"], sizes["width"]
    return {
        "x": scenes.normal((batch, channels), scenes.SEED),
        "conv_state": scenes.normal((batch, channels, width), scenes.SEED + 1),
        "weight": scenes.normal((channels, width), scenes.SEED + 2) / 2,
        "bias": scenes.normal((channels,), scenes.SEED + 3),
        "activation": "silu",
    }


def _fuzz(draw: Draw) -> dict[str, object]:
    # NaN and infinities times a weight of 0 depend on the order of sums.
    draw.undefined("special")
    draw.distinct.add("conv_state_indices")
    batch, channels, length = draw.size(3), draw.size(9), draw.size(5)
    width = draw.option("width", 2, 3, 4, 7)
    size = width - 1 + draw.pick(0, 1, 3)
    arguments: dict[str, object] = {
        "x": draw.values(batch, channels, length),
        "conv_state": draw.values(batch + 2, channels, size),
        "weight": draw.uniform(channels, width, low=-1),
        "bias": draw.uniform(channels, low=-1),
        "activation": draw.option("activation", None, "silu"),
        "conv_state_indices": torch.arange(batch, dtype=torch.int32) + draw.pick(-1, 0, 2),
    }
    if draw.chance(0.5):
        arguments["cache_seqlens"] = draw.integers(batch, high=100).int()
    return arguments
