"""What lies between the two projections of a Mamba block: convolution, small projections, scan."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from torchkiln.ops._arguments import (
    require_floating,
    require_optional_tensor,
    require_pair,
    require_tensor,
    shape,
    under_autocast,
)
from torchkiln.ops.scan.causal_conv1d import causal_conv1d_fn
from torchkiln.ops.scan.selective_scan import selective_scan

__all__ = ["mamba_inner_fn"]


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
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    discretization: str = "mamba",
    reverse: bool = False,
) -> Tensor:
    """A Mamba block after its first projection.

    x, z = xz; x through a causal convolution and silu; out of that step, B and C by
    `x_proj_weight`; the selective scan, gated by z; then `out_proj_weight`.

    Args:
        xz: (batch, 2 dim, length), floating.
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim,) or None.
        x_proj_weight: (R + the rows of B and C that are not given, dim), R the rank of the step;
            B and C have N rows each, 2 N with a complex A, real and imaginary parts in turns.
        delta_proj_weight: (dim, R).
        out_proj_weight: (E, dim); None: the scan's result is returned.
        out_proj_bias: (E,) or None.
        A: (dim, N), real or complex.
        B: as for `selective_scan`; None: out of x.
        C: as for `selective_scan`; None: out of x.
        D: (dim,) or None.
        delta_bias: (dim,) or None.
        B_proj_bias: added to B where that comes out of x.
        C_proj_bias: added to C where that comes out of x.
        delta_softplus: whether the steps go through softplus.
        checkpoint_lvl: 0 keeps all for the backward; 1 computes the convolution's result and the
            steps again, which saves two tensors of (batch, dim, length).
        b_rms_weight: (N,), 2 N with a complex A, weight of a root-mean-square norm of B, which is
            taken of a given B, too, but must be None beside a constant or complex one; None: no
            norm.
        c_rms_weight: (N,), of C.
        dt_rms_weight: (dim,), of the steps before bias and softplus.
        b_c_dt_rms_eps: of these norms.
        discretization: as for `selective_scan`.
        reverse: whether convolution and scan go from the last position to the first.

    Returns:
        (batch, length, E), or (batch, dim, length) without `out_proj_weight`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, discretization or level.
        RuntimeError: of the backward, where a tensor was changed in place since the forward.

    Differentiable: all tensors. Deterministic: as `selective_scan`. Autocast: the projections are
    in autocast's dtype.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
        section 3.4.

    Example:
        >>> import torch
        >>> from torchkiln.ops import mamba_inner_fn
        >>> xz, conv, project = torch.ones(1, 8, 5), torch.ones(4, 1, 4), torch.ones(7, 4)
        >>> step, out = torch.ones(4, 1), torch.ones(6, 4)
        >>> mamba_inner_fn(xz, conv, None, project, step, out, None, -torch.ones(4, 3)).shape
        torch.Size([1, 5, 6])
    """
    op = "mamba_inner_fn"
    check_inner(op, xz, conv1d_weight, x_proj_weight, delta_proj_weight, A, B, C)
    columns = check_others(
        op,
        xz,
        A,
        (out_proj_weight, out_proj_bias),
        {
            "conv1d_bias": conv1d_bias,
            "D": D,
            "delta_bias": delta_bias,
            "dt_rms_weight": dt_rms_weight,
        },
        {
            "B_proj_bias": B_proj_bias,
            "C_proj_bias": C_proj_bias,
            "b_rms_weight": b_rms_weight,
            "c_rms_weight": c_rms_weight,
        },
    )
    for name, given, norm in (("B", B, b_rms_weight), ("C", C, c_rms_weight)):
        if norm is not None and given is not None and (A.is_complex() or given.dim() == 2):
            raise ValueError(
                f"{op}: {name.lower()}_rms_weight must be None beside a constant or complex {name} "
                f"that is given; got a tensor. Normalise {name} first"
            )
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{op}: checkpoint_lvl must be 0 or 1; got {checkpoint_lvl!r}")
    if under_autocast(xz):
        dtype = torch.get_autocast_dtype(xz.device.type)
        x_proj_weight, delta_proj_weight = x_proj_weight.to(dtype), delta_proj_weight.to(dtype)
    x, z = xz.chunk(2, dim=1)
    rank = delta_proj_weight.shape[1]

    def convolve() -> Tensor:
        ahead = x.flip(2) if reverse else x
        out = causal_conv1d_fn(ahead, conv1d_weight[:, 0], conv1d_bias, activation="silu")
        assert isinstance(out, Tensor)
        return out.flip(2) if reverse else out

    def steps(projected: Tensor) -> Tensor:
        delta = project(delta_proj_weight, projected[:, :rank])
        return delta if dt_rms_weight is None else _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)

    def matrix(rows: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        rows = rows if bias is None else rows + bias[:, None].to(rows.dtype)
        rows = rows if norm is None else _rms_norm(rows, norm, b_c_dt_rms_eps)
        return in_turns(rows) if A.is_complex() else rows

    u = convolve()
    forgotten = _Forgotten() if checkpoint_lvl == 1 and _may_forget() else None
    if forgotten is not None:
        forgotten.add(u, convolve, x, conv1d_weight, conv1d_bias)
    with forgotten.hooks() if forgotten is not None else contextlib.nullcontext():
        projected = project(x_proj_weight, u.to(x_proj_weight.dtype))
        delta = steps(projected)
        if forgotten is not None:
            again = partial(steps, projected.detach())
            forgotten.add(delta, again, delta_proj_weight, dt_rms_weight)
        if B is None:
            B = matrix(projected[:, rank : rank + columns], B_proj_bias, b_rms_weight)
        elif b_rms_weight is not None:
            B = _rms_norm(B, b_rms_weight, b_c_dt_rms_eps)
        if C is None:
            C = matrix(projected[:, -columns:], C_proj_bias, c_rms_weight)
        elif c_rms_weight is not None:
            C = _rms_norm(C, c_rms_weight, b_c_dt_rms_eps)
        # Where autocast made them differ, selective_scan takes their common dtype.
        out: Any = selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization, reverse=reverse
        )
    if out_proj_weight is None:
        return out  # type: ignore[no-any-return]
    return functional.linear(out.transpose(1, 2), out_proj_weight, out_proj_bias)


def project(weight: Tensor, x: Tensor) -> Tensor:
    """(rows, dim) by (batch, dim, length). Nothing is transposed or copied; matmul would fold x."""
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)


def in_turns(rows: Tensor) -> Tensor:
    """(batch, 2 N, length) as the real and imaginary parts of complex (batch, N, length)."""
    pairs: Tensor = rows.unflatten(1, (-1, 2))
    return pairs.movedim(2, 3).flatten(2)


def _rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of (..., rows, length) over the rows, in float32 for the half types."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    normed = wide * torch.rsqrt(wide.square().mean(-2, keepdim=True) + eps)
    return (normed * weight[:, None].to(wide.dtype)).to(rows.dtype)


def _may_forget() -> bool:
    """Where torch traces or transforms, it decides itself what is computed again."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class _Kept:
    """A tensor at the version that it had: hooks switch off torch's own look at it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version(tensor)

    def get(self) -> Tensor:
        """The tensor; raises where it is another one by now."""
        now = _version(self._tensor)
        if now != self._version:
            raise RuntimeError(
                "mamba_inner_fn: a tensor needed for the gradient has been modified by an inplace "
                f"operation: it has shape {shape(self._tensor)} and is at version {now}; expected "
                f"version {self._version}. Change a clone of it, or change it after the backward"
            )
        return self._tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Recipe:
    """How a tensor is computed again, and what from."""

    def __init__(self, compute: Callable[[], Tensor], inputs: Sequence[Tensor | None]) -> None:
        self._compute = compute
        self._inputs = [_Kept(tensor) for tensor in inputs if tensor is not None]

    def again(self) -> Tensor:
        """The tensor as it was."""
        for tensor in self._inputs:
            tensor.get()
        with torch.no_grad():
            return self._compute()


class _Forgotten:
    """Tensors that the backward computes again instead of keeping them."""

    def __init__(self) -> None:
        self._recipes: dict[int, tuple[int, _Recipe]] = {}

    def add(self, tensor: Tensor, compute: Callable[[], Tensor], *inputs: Tensor | None) -> None:
        """From now on `tensor`, which lives as long as the hooks, is not kept.

        Args:
            tensor: what is computed again.
            compute: computes it.
            inputs: what `compute` reads; nobody may change it in between.
        """
        self._recipes[_memory(tensor)] = tensor.numel(), _Recipe(compute, inputs)

    def hooks(self) -> saved_tensors_hooks:
        """The context in which nothing that was added is kept."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Any:
        numel, recipe = self._recipes.get(_memory(tensor), (-1, None))
        if recipe is None or tensor.numel() != numel or numel == 0:
            return _Kept(tensor)
        return recipe, tensor.shape, tensor.stride()


def _memory(tensor: Tensor) -> int:
    """What tells a tensor that fills its memory from others; on meta, too."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Kept):
        return packed.get()
    recipe, size, stride = packed
    again: Tensor = recipe.again().as_strided(size, stride)
    return again


def check_inner(
    op: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
) -> None:
    """What the operators inside would say in words of their own."""
    require_floating(
        op,
        xz=xz,
        conv1d_weight=conv1d_weight,
        x_proj_weight=x_proj_weight,
        delta_proj_weight=delta_proj_weight,
    )
    require_tensor(op, A=A)
    require_optional_tensor(op, B=B, C=C)
    if xz.dim() != 3 or xz.shape[1] % 2:
        raise ValueError(f"{op}: xz must have shape (B, 2 D, L); got {shape(xz)}")
    dim = xz.shape[1] // 2
    if conv1d_weight.dim() != 3 or conv1d_weight.shape[:2] != (dim, 1):
        raise ValueError(
            f"{op}: conv1d_weight must have shape ({dim}, 1, width); got {shape(conv1d_weight)}"
        )
    if delta_proj_weight.dim() != 2 or delta_proj_weight.shape[0] != dim:
        raise ValueError(
            f"{op}: delta_proj_weight must have shape ({dim}, R); got {shape(delta_proj_weight)}"
        )
    if A.dim() != 2 or A.shape[0] != dim:
        raise ValueError(f"{op}: A must have shape ({dim}, N); got {shape(A)}")
    rows = delta_proj_weight.shape[1] + _columns(A) * ((B is None) + (C is None))
    if x_proj_weight.shape != (rows, dim):
        raise ValueError(
            f"{op}: x_proj_weight must have shape ({rows}, {dim}); got {shape(x_proj_weight)}"
        )
    if not under_autocast(xz):
        require_pair(op, xz=xz, x_proj_weight=x_proj_weight)
        require_pair(op, xz=xz, delta_proj_weight=delta_proj_weight)


def _columns(A: Tensor) -> int:
    """Numbers of B, or C, at a position."""
    return A.shape[1] * (2 if A.is_complex() else 1)


def check_others(
    op: str,
    xz: Tensor,
    A: Tensor,
    out_proj: tuple[Tensor | None, Tensor | None],
    of_channels: Mapping[str, Tensor | None],
    of_columns: Mapping[str, Tensor | None],
) -> int:
    """Checks what may be None, and returns the numbers that B, or C, has at a position."""
    dim, columns = xz.shape[1] // 2, _columns(A)
    sized = [(name, tensor, dim) for name, tensor in of_channels.items()]
    sized += [(name, tensor, columns) for name, tensor in of_columns.items()]
    for name, tensor, size in sized:
        if tensor is None:
            continue
        require_floating(op, **{name: tensor})
        if tensor.shape != (size,):
            raise ValueError(f"{op}: {name} must have shape ({size},); got {shape(tensor)}")
    weight, bias = out_proj
    if weight is not None:
        _check_out_proj(op, xz, weight, bias)
    elif bias is not None:
        raise ValueError(f"{op}: out_proj_bias must be None without out_proj_weight; got a tensor")
    return columns


def _check_out_proj(op: str, xz: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dim = xz.shape[1] // 2
    require_floating(op, out_proj_weight=weight)
    if weight.dim() != 2 or weight.shape[1] != dim:
        raise ValueError(f"{op}: out_proj_weight must have shape (E, {dim}); got {shape(weight)}")
    if bias is not None:
        require_floating(op, out_proj_bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: out_proj_bias must have shape ({len(weight)},); got {shape(bias)}"
            )
    if not under_autocast(xz):
        require_pair(op, xz=xz, out_proj_weight=weight)
        if bias is not None:
            require_pair(op, xz=xz, out_proj_bias=bias)
