"""Operators that go on from a state, as functions that change none: for comparisons."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._backend import backend


def convolved(x: Tensor, conv_state: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_update` on a copy of the state, which is returned too."""
    from torchkiln import ops

    state = conv_state.clone()
    return ops.causal_conv1d_update(x, state, **arguments), state


def convolved_plainly(x: Tensor, conv_state: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """`convolved` in plain PyTorch."""
    with backend("reference"):
        return convolved(x, conv_state, **arguments)


def scanned(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    discretization: str = "mamba",
    true_time: bool = False,
    imaginary: Tensor | None = None,
    wide_state: bool = False,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """As many calls of the public function as x has positions, on a copy of the state.

    x, dt, B and C have the positions as a last dimension; a complex A is A + i imaginary, and then
    state, B and C have pairs in the dimension before N. A wide state is kept in float32 beside half
    types.
    """
    from torchkiln import ops

    for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C)):
        if tensor.dim() < 3 or tensor.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"scanned: {name} must have sequences, channels and the positions of x; "
                f"got {list(tensor.shape)}"
            )
    state = state.to(torch.promote_types(state.dtype, torch.float32)) if wide_state else state
    state = state.clone()
    if imaginary is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        A = torch.complex(A.to(wide), imaginary.to(wide))
        state = torch.complex(state.to(wide), 0.5 * state.to(wide))
        B, C = (torch.cat([m, 0.5 * m.flip(-2)], -2) for m in (B, C))
    history = None
    if discretization in ("foh", "tustin", "rk4", "highorder"):
        # Channels without positions, and B with groups.
        flat = x[..., :0].flatten(1, -2)
        first = B[..., :0] if B.dim() == 4 else B[:, None, :, :0]
        if imaginary is not None:
            first = torch.complex(first[..., ::2, :].float(), first[..., 1::2, :].float())
        flat, first = (tensor.new_empty(len(state), *tensor.shape[1:]) for tensor in (flat, first))
        history = ops.scan_history(flat, first, discretization, true_time=true_time, delta=flat)
    outs = [
        ops.selective_state_update(
            state,
            x[..., k],
            dt[..., k],
            A,
            B[..., k],
            C[..., k],
            discretization=discretization,
            true_time=true_time,
            history=history,
            **rest,
        )
        for k in range(x.shape[-1])
    ]
    out = torch.stack(outs, -1) if outs else torch.zeros_like(x)
    return out, torch.view_as_real(state) if state.is_complex() else state


def scanned_plainly(**arguments: Any) -> tuple[Tensor, Tensor]:
    """`scanned` in plain PyTorch."""
    with backend("reference"):
        return scanned(**arguments)
