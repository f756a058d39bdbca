"""torchkiln in place of mamba-ssm's operators: import from here, or `install()` and import as ever.

With an installed mamba-ssm that is imported afterwards, its models run on our operators and all
else of it stays; without one, `mamba_ssm` holds the operators only. Its models need
`causal_conv1d`, too: `torchkiln.compat.causal_conv1d.install()`. What differs is in
docs/compat_mamba.md.

Example:
    >>> from torchkiln.compat import mamba as drop_in
    >>> drop_in.install()
    >>> from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
    >>> drop_in.uninstall()
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchkiln import ops
from torchkiln._backend import backend
from torchkiln.compat._replaced import Replaced, module
from torchkiln.ops._arguments import (
    require_floating,
    require_integers,
    require_optional_tensor,
    require_tensor,
    sum_dtype,
)

__all__ = [
    "MambaInnerFn",
    "SelectiveScanFn",
    "install",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "rms_norm_forward",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "uninstall",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As mamba-ssm's: exact exponential for A, delta * B for the input; any device."""
    return ops.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        return_last_state=return_last_state,
    )


def selective_scan_ref(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As mamba-ssm's, in plain PyTorch; arguments of `selective_scan_fn`."""
    with backend("reference"):
        return selective_scan_fn(*args, **kwargs)


#: As mamba-ssm's; two keyword arguments more.
mamba_inner_fn = ops.mamba_inner_fn


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """As mamba-ssm's, in plain PyTorch: the steps always go through softplus."""
    from torchkiln.reference.scan.mamba_inner import mamba_inner_fn as plain

    return plain(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
    )


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-6,
    is_rms_norm: bool = True,
) -> Tensor:
    """As mamba-ssm's: a norm over the last dimension."""
    if not is_rms_norm:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = functional.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """As mamba-ssm's; on the CPU, too. Inputs may have any floating dtypes."""
    op = "selective_state_update"
    require_tensor(op, state=state, A=A, B=B, C=C)
    require_floating(op, x=x, dt=dt)
    require_optional_tensor(op, D=D, z=z, dt_bias=dt_bias)
    dtype = x.dtype
    for other in (dt, B, C, z):
        if other is not None and other.is_floating_point():
            dtype = torch.promote_types(dtype, other.dtype)
    if state.dtype in (torch.float64, torch.complex128):
        dtype = torch.float64
    elif state.is_floating_point() and state.dtype not in (dtype, torch.float32):
        dtype = torch.float32
    step = state
    if state.is_floating_point() and state.dtype not in (dtype, torch.float32):
        step = state.to(dtype)

    # What is not real goes on as it is: complex numbers are taken, integers refused.
    def like_x(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or not tensor.is_floating_point() else tensor.to(dtype)

    def beside(tensor: Tensor | None) -> Any:
        wide = sum_dtype(dtype)
        if tensor is None or not tensor.is_floating_point() or tensor.dtype in (dtype, wide):
            return tensor
        return tensor.to(wide)

    if state_batch_indices is not None:
        require_integers(op, state_batch_indices=state_batch_indices)
        state_batch_indices = state_batch_indices.int()
    out = ops.selective_state_update(
        step,
        like_x(x),
        like_x(dt),
        beside(A),
        like_x(B),
        like_x(C),
        beside(D),
        like_x(z),
        beside(dt_bias),
        dt_softplus,
        state_batch_indices,
    )
    if step is not state:
        state.copy_(step)
    return out.to(x.dtype)


def selective_state_update_ref(*args: Any, **kwargs: Any) -> Tensor:
    """As mamba-ssm's, in plain PyTorch; arguments of `selective_state_update`."""
    with backend("reference"):
        return selective_state_update(*args, **kwargs)


class _Applied:
    """A function where the peer has an autograd.Function: only `apply` is used of those."""

    function: Callable[..., Any]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Calls the function; it differentiates itself."""
        return cls.function(*args)


class SelectiveScanFn(_Applied):
    """`SelectiveScanFn.apply` is `selective_scan_fn`."""

    function = staticmethod(selective_scan_fn)


class MambaInnerFn(_Applied):
    """`MambaInnerFn.apply` is `mamba_inner_fn`."""

    function = staticmethod(mamba_inner_fn)


_INTERFACE = {
    "MambaInnerFn": MambaInnerFn,
    "SelectiveScanFn": SelectiveScanFn,
    "mamba_inner_fn": mamba_inner_fn,
    "mamba_inner_ref": mamba_inner_ref,
    "rms_norm_forward": rms_norm_forward,
    "selective_scan_fn": selective_scan_fn,
    "selective_scan_ref": selective_scan_ref,
}
_UPDATE = {
    "selective_state_update": selective_state_update,
    "selective_state_update_ref": selective_state_update_ref,
}
_TOP = {"selective_scan_fn": selective_scan_fn, "mamba_inner_fn": mamba_inner_fn}
_replaced = Replaced(
    [
        module("mamba_ssm.ops.selective_scan_interface", _INTERFACE),
        module("mamba_ssm.ops.triton.selective_state_update", _UPDATE),
    ],
    [
        module("mamba_ssm", {"__path__": [], **_TOP}),
        module("mamba_ssm.ops", {"__path__": []}),
        module("mamba_ssm.ops.triton", {"__path__": []}),
    ],
)
install = _replaced.install
uninstall = _replaced.uninstall
