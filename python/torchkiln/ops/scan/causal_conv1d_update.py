"""One or a few more positions of a causal convolution, from a state that is kept."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.scan.causal_conv1d import is_silu

__all__ = ["causal_conv1d_update"]


def _fake(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    return x.new_empty(x.shape)


_causal_conv1d_update = operator("causal_conv1d_update", fake=_fake)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Goes on with `causal_conv1d_fn` from the inputs kept in a state, which is changed in place.

    Args:
        x: (B, D) one position, or (B, D, L) several; float16, bfloat16, float32 or float64.
        conv_state: (B, D, S), S at least width - 1, dtype of `x`, any strides: the last S inputs,
            the newest one at the end, `final_states` of `causal_conv1d_fn` for example.
        weight: (D, width), width from 1 to 32; dtype of `x`, or float32 beside a half type.
        bias: (D,), dtypes as for `weight`.
        activation: None, "silu" or "swish", which are one.
        cache_seqlens: (B,) int32, how many inputs came before: the state is a ring then, in which
            input k lies at k modulo S, and nothing is shifted. The caller counts on.
        conv_state_indices: (B,) int32: `conv_state` is (rows, D, S), and this is the row of each
            sequence, no row twice. Below 0 (on CUDA from `rows` on, too): there is none, the
            result is 0.

    Returns:
        The shape and dtype of `x`, contiguous.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, width or activation, or different devices.
        IndexError: for a row beyond the state, on the CPU.

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Source:
        The recurrent form of the convolution in Gu and Dao, "Mamba", 2023, section 3.4.

    Example:
        >>> import torch
        >>> from torchkiln.ops import causal_conv1d_update
        >>> state = torch.tensor([[[2.0, 3.0]]])
        >>> causal_conv1d_update(torch.tensor([[4.0]]), state, torch.tensor([[100.0, 10.0, 1.0]]))
        tensor([[234.]])
        >>> state
        tensor([[[3., 4.]]])
    """
    silu = is_silu("causal_conv1d_update", activation)
    is_one = isinstance(x, Tensor) and x.dim() == 2
    out = _causal_conv1d_update(
        x.unsqueeze(2) if is_one else x,
        conv_state,
        weight,
        bias,
        cache_seqlens,
        conv_state_indices,
        silu,
    )
    return out.squeeze(2) if is_one else out
