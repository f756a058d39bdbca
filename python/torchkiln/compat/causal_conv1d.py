"""torchkiln in place of causal-conv1d: import from here, or `install()` and import as ever.

An installed causal-conv1d keeps all else that it has; without one, `causal_conv1d` holds these
functions only.

Example:
    >>> from torchkiln.compat import causal_conv1d as drop_in
    >>> drop_in.install()
    >>> from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    >>> drop_in.uninstall()
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln import ops
from torchkiln._backend import backend
from torchkiln.compat._replaced import Replaced, module
from torchkiln.ops._arguments import require_integers, require_optional_tensor, sum_dtype

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "install",
    "uninstall",
]


def _check(activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError("activation must be None, silu, or swish")


def _beside(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """Weights as our operators take them: the peer's may have any of its dtypes."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dtype == x.dtype:
        return weight
    return weight.to(sum_dtype(x.dtype))


def _int32(op: str, name: str, indices: Tensor | None) -> Tensor | None:
    """The peer's indices, of any integer type."""
    if indices is None:
        return None
    require_integers(op, **{name: indices})
    return indices.int()


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As causal-conv1d's; layouts, widths and states go together as they like."""
    _check(activation)
    require_optional_tensor("causal_conv1d", initial_states=initial_states)
    if isinstance(x, Tensor) and initial_states is not None:
        initial_states = initial_states.to(x.dtype)
    sequences = _int32("causal_conv1d", "seq_idx", seq_idx)
    taken = _beside(x, weight), _beside(x, bias), sequences, initial_states
    result = ops.causal_conv1d_fn(x, *taken, return_final_states, activation)  # type: ignore[arg-type]
    if not isinstance(result, tuple) or final_states_out is None:
        return result
    out, states = result
    # A buffer that took part in the graph would hold on to that of every earlier call.
    with torch.no_grad():
        final_states_out.copy_(states)
    return out, states if states.requires_grad else final_states_out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """As causal-conv1d's; on the CPU, too."""
    _check(activation)
    weight, bias = _beside(x, weight), _beside(x, bias)  # type: ignore[assignment]
    op = "causal_conv1d_update"
    seqlens = _int32(op, "cache_seqlens", cache_seqlens)
    rows = _int32(op, "conv_state_indices", conv_state_indices)
    return ops.causal_conv1d_update(x, conv_state, weight, bias, activation, seqlens, rows)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As causal-conv1d's, in plain PyTorch."""
    with backend("reference"):
        return causal_conv1d_fn(
            x,
            weight,
            bias,
            None,
            initial_states,
            return_final_states,
            final_states_out,
            activation,
        )


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """As causal-conv1d's, in plain PyTorch."""
    with backend("reference"):
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


_NAMES = {
    function.__name__: function
    for function in (
        causal_conv1d_fn,
        causal_conv1d_ref,
        causal_conv1d_update,
        causal_conv1d_update_ref,
    )
}
_TOP = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
_replaced = Replaced(
    [module("causal_conv1d.causal_conv1d_interface", _NAMES)],
    [module("causal_conv1d", {"__path__": [], **_TOP})],
)
install = _replaced.install
uninstall = _replaced.uninstall
