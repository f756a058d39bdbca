"""The six discretizations of the Vision Mamba fork by their names, in their standard forms.

`discretization_method` "zoh" is Mamba's own rule, as there; foh, bilinear, poly, highorder and rk4
are what those words mean, with right gradients on every path. docs/compat_mamba.md tells what the
fork computes instead. Import from here, or `install()` and import from
`mamba_ssm.ops.selective_scan_interface` as ever; not beside `torchkiln.compat.mamba.install()`.

Example:
    >>> import torch
    >>> from torchkiln.compat.visionmamba import selective_scan_fn
    >>> one = torch.ones(1, 1, 3)
    >>> selective_scan_fn(one, one, -one[0, :, :1], one, one, discretization_method="bilinear")
    tensor([[[0.6667, 0.8889, 0.9630]]])
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchkiln import ops
from torchkiln._backend import backend
from torchkiln.compat import mamba
from torchkiln.compat._replaced import Replaced, module
from torchkiln.ops._arguments import (
    dtype_name,
    require_choice,
    require_tensor,
    shape,
    under_autocast,
)
from torchkiln.ops.scan.mamba_inner import check_inner, check_others, in_turns, project

__all__ = [
    "DISCRETIZATIONS",
    "BiMambaInnerFn",
    "MambaInnerFn",
    "MambaInnerFnNoOutProj",
    "SelectiveScanFn",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "install",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "uninstall",
]

#: The fork's names, and ours.
DISCRETIZATIONS = {
    "zoh": "mamba",
    "foh": "foh",
    "bilinear": "bilinear",
    "poly": "poly",
    "highorder": "highorder",
    "rk4": "rk4",
}


def _discretization(method: str) -> str:
    require_choice("visionmamba", "discretization_method", method, DISCRETIZATIONS)
    return DISCRETIZATIONS[method]


def _chosen(use_cuda_kernel: bool | None) -> contextlib.AbstractContextManager[Any]:
    """Kernels, or plain PyTorch: by the argument, else by VIM_USE_CUDA_KERNEL, else kernels."""
    if use_cuda_kernel is None:
        word = os.environ.get("VIM_USE_CUDA_KERNEL", "1").lower()
        use_cuda_kernel = word not in ("0", "false", "no", "off")
    return contextlib.nullcontext() if use_cuda_kernel else backend("reference")


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
    discretization_method: str = "zoh",
    use_cuda_kernel: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The fork's signature; see `torchkiln.ops.selective_scan` for what each rule is."""
    with _chosen(use_cuda_kernel):
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
            _discretization(discretization_method),
            return_last_state=return_last_state,
        )


def selective_scan_ref(
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
    discretization_method: str = "zoh",
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` in plain PyTorch."""
    steps = delta_bias, delta_softplus, return_last_state
    return selective_scan_fn(u, delta, A, B, C, D, z, *steps, discretization_method, False)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    discretization_method: str = "zoh",
) -> Tensor:
    """`torchkiln.ops.mamba_inner_fn` by any of the rules; the fork's is always "zoh"."""
    return ops.mamba_inner_fn(
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
        delta_softplus,
        checkpoint_lvl,
        discretization=_discretization(discretization_method),
    )


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int | None = None,
    discretization_method: str = "zoh",
) -> Tensor:
    """`mamba_inner_fn` that returns the scan's result, (batch, dim, length)."""
    return mamba_inner_fn(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        None,
        None,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
        1 if checkpoint_lvl is None else checkpoint_lvl,
        discretization_method,
    )


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    discretization_method: str = "zoh",
) -> Tensor:
    """Both directions of one convolution and one set of projections, with A and A_b, added."""
    op = "bimamba_inner_fn"
    check_inner(op, xz, conv1d_weight, x_proj_weight, delta_proj_weight, A, B, C)
    columns = check_others(
        op,
        xz,
        A,
        (out_proj_weight, out_proj_bias),
        {"conv1d_bias": conv1d_bias, "D": D, "delta_bias": delta_bias},
        {"B_proj_bias": B_proj_bias, "C_proj_bias": C_proj_bias},
    )
    require_tensor(op, out_proj_weight=out_proj_weight)
    _check_A_b(A_b, A)
    rule = _discretization(discretization_method)
    if under_autocast(xz):
        dtype = torch.get_autocast_dtype(xz.device.type)
        x_proj_weight, delta_proj_weight = x_proj_weight.to(dtype), delta_proj_weight.to(dtype)
    x, z = xz.chunk(2, dim=1)
    u: Any = ops.causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    rank = delta_proj_weight.shape[1]
    rows = project(x_proj_weight, u.to(x_proj_weight.dtype))

    def matrix(part: Tensor, bias: Tensor | None) -> Tensor:
        part = part if bias is None else part + bias[:, None].to(part.dtype)
        return in_turns(part) if A.is_complex() else part

    B = matrix(rows[:, rank : rank + columns], B_proj_bias) if B is None else B
    C = matrix(rows[:, -columns:], C_proj_bias) if C is None else C
    delta = project(delta_proj_weight, rows[:, :rank])
    ahead, back = (
        ops.selective_scan(
            u, delta, own, B, C, D, z, delta_bias, delta_softplus, rule, reverse=reverse
        )
        for own, reverse in ((A, False), (A_b, True))
    )
    assert isinstance(ahead, Tensor)
    assert isinstance(back, Tensor)
    return functional.linear((ahead + back).transpose(1, 2), out_proj_weight, out_proj_bias)


def _check_A_b(A_b: Tensor, A: Tensor) -> None:
    require_tensor("bimamba_inner_fn", A_b=A_b)
    if A_b.shape != A.shape:
        raise ValueError(
            f"bimamba_inner_fn: A_b must have the shape of A {shape(A)}; got {shape(A_b)}"
        )
    if A_b.is_complex() != A.is_complex():
        kind = "complex" if A.is_complex() else "real"
        raise TypeError(
            f"bimamba_inner_fn: A_b must be {kind} like A; got {dtype_name(A_b)}. "
            "Convert one of them"
        )


def bimamba_inner_ref(*args: Any, **kwargs: Any) -> Tensor:
    """`bimamba_inner_fn`, with its arguments, in plain PyTorch."""
    with backend("reference"):
        return bimamba_inner_fn(*args, **kwargs)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    discretization_method: str = "zoh",
) -> Tensor:
    """`mamba_inner_fn` in plain PyTorch: the steps always go through softplus."""
    from torchkiln.reference.scan.mamba_inner import mamba_inner_fn as plain

    ahead = xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight
    rest: Any = out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias
    return plain(*ahead, *rest, discretization=_discretization(discretization_method))


class SelectiveScanFn(mamba._Applied):
    """`SelectiveScanFn.apply` is `selective_scan_fn`."""

    function = staticmethod(selective_scan_fn)


class MambaInnerFn(mamba._Applied):
    """`MambaInnerFn.apply` is `mamba_inner_fn`."""

    function = staticmethod(mamba_inner_fn)


class MambaInnerFnNoOutProj(mamba._Applied):
    """`MambaInnerFnNoOutProj.apply` is `mamba_inner_fn_no_out_proj`."""

    function = staticmethod(mamba_inner_fn_no_out_proj)


class BiMambaInnerFn(mamba._Applied):
    """`BiMambaInnerFn.apply` is `bimamba_inner_fn`; its `checkpoint_lvl` has no effect."""

    @staticmethod
    def function(*args: Any) -> Tensor:
        """Of the arguments up to `delta_softplus`, `checkpoint_lvl`, `discretization_method`."""
        count = 16  # up to delta_softplus
        return bimamba_inner_fn(*args[:count], *args[count + 1 :])


_NAMES = {
    function.__name__: function
    for function in (
        BiMambaInnerFn,
        MambaInnerFn,
        MambaInnerFnNoOutProj,
        SelectiveScanFn,
        bimamba_inner_fn,
        bimamba_inner_ref,
        mamba_inner_fn,
        mamba_inner_fn_no_out_proj,
        mamba_inner_ref,
        selective_scan_fn,
        selective_scan_ref,
    )
}
_replaced = Replaced(
    [
        module(
            "mamba_ssm.ops.selective_scan_interface",
            {**mamba._INTERFACE, **_NAMES},
        ),
        module("mamba_ssm.ops.triton.selective_state_update", mamba._UPDATE),
    ],
    [
        module(
            "mamba_ssm",
            {
                "__path__": [],
                "mamba_inner_fn": mamba_inner_fn,
                "selective_scan_fn": selective_scan_fn,
            },
        ),
        module("mamba_ssm.ops", {"__path__": []}),
        module("mamba_ssm.ops.triton", {"__path__": []}),
    ],
)
install = _replaced.install
uninstall = _replaced.uninstall
