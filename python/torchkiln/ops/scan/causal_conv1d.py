"""Depthwise convolution along a sequence that sees the past only."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator

__all__ = ["causal_conv1d_fn"]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _fake(x, weight),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial_states is None else x.new_empty(initial_states.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    x, weight, bias, initial = _causal_conv1d_backward(grad_out, *tensors, ctx.silu)
    return (
        x,
        weight,
        None if tensors[2] is None else bias,
        None,
        None if tensors[4] is None else initial,
    )


_causal_conv1d_backward = operator("_causal_conv1d_backward", fake=_fake_backward)
# Under autocast inputs stay as they are: sums are in float32 anyway.
_causal_conv1d = operator(
    "causal_conv1d", fake=_fake, setup_context=_setup_context, backward=_backward
)


def is_silu(op: str, activation: str | None) -> bool:
    """Whether an `activation` argument asks for one."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: activation must be None, "silu" or "swish"; got {activation!r}')
    return activation is not None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel with a filter of its own that ends at the position in question.

    `out[b, d, k] = act(bias[d] + sum_j weight[d, j] * x[b, d, k - (width - 1) + j])`

    Args:
        x: (B, D, L), float16, bfloat16, float32 or float64. Nothing is copied where the positions
            or the channels are contiguous.
        weight: (D, width), width from 1 to 32; dtype of `x`, or float32 beside a half type.
        bias: (D,), dtypes as for `weight`.
        seq_idx: (B, L) int32, which sequence a position belongs to, where several are packed into
            one row: a position sees those of its own sequence only. Below 0: padding, result 0.
        initial_states: (B, D, width - 1), dtype of `x`: what lies left of the first position, in
            the sequence of that position. None: zeros.
        return_final_states: whether the last width - 1 inputs are returned too: the
            `initial_states` of what follows. With `seq_idx` those of the last position's sequence.
        activation: None, "silu" or "swish", which are one.

    Returns:
        (B, D, L), dtype and layout of `x`; with `return_final_states` also (B, D, width - 1).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, width or activation, or different devices.

    Differentiable: x, weight, bias, initial_states. Deterministic: yes. Autocast: as without.

    Note:
        Sums are in float32 for the half types. Widths of 2 to 4 are prewarmed; another one is
        compiled when it is met.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
        section 3.4.

    Example:
        >>> import torch
        >>> from torchkiln.ops import causal_conv1d_fn
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> causal_conv1d_fn(x, torch.tensor([[10.0, 1.0]]))
        tensor([[[ 1., 12., 23.]]])
        >>> _, state = causal_conv1d_fn(x, torch.tensor([[10.0, 1.0]]), return_final_states=True)
        >>> state
        tensor([[[3.]]])
    """
    silu = is_silu("causal_conv1d", activation)
    out = _causal_conv1d(x, weight, bias, seq_idx, initial_states, silu)
    if not return_final_states:
        return out
    return out, _final_states(x, weight.shape[1] - 1, seq_idx, initial_states)


def _final_states(
    x: Tensor, reach: int, seq_idx: Tensor | None, initial_states: Tensor | None
) -> Tensor:
    """The last inputs, a copy: updates change it in place."""
    length = x.shape[2]
    if length >= reach:
        states = x[:, :, length - reach :]
    else:
        before = x.new_zeros(*x.shape[:2], reach) if initial_states is None else initial_states
        states = torch.cat([before[:, :, length:], x], 2)
    if seq_idx is None or length == 0:
        return states.clone(memory_format=torch.contiguous_format)
    # The initial state belongs to the first position's sequence.
    places = torch.arange(length - reach, length, device=x.device).clamp(min=0)
    return torch.where((seq_idx[:, places] == seq_idx[:, -1:])[:, None], states, 0)
