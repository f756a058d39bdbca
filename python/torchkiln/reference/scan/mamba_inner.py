"""mamba_inner_fn in plain PyTorch."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from torchkiln.reference.scan.causal_conv1d import causal_conv1d
from torchkiln.reference.scan.selective_scan import _METHOD_NAMES, selective_scan
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes


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
    """A Mamba block after its first projection; arguments as for the operator.

    Returns:
        (batch, length, E), or (batch, dim, length) without `out_proj_weight`.
    """
    if reverse:
        xz = xz.flip(2)
    x, z = xz.chunk(2, dim=1)
    # Tokens in rows from here on.
    tokens = causal_conv1d(x, conv1d_weight[:, 0], conv1d_bias, silu=True).transpose(1, 2)
    rank, n = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    rows = tokens @ x_proj_weight.t()
    delta = rows[..., :rank] @ delta_proj_weight.t()
    if dt_rms_weight is not None:
        delta = functional.rms_norm(delta, delta.shape[-1:], dt_rms_weight, b_c_dt_rms_eps)

    def matrix(columns: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        columns = columns if bias is None else columns + bias
        if norm is not None:
            columns = functional.rms_norm(columns, columns.shape[-1:], norm, b_c_dt_rms_eps)
        if A.is_complex():
            return columns.reshape(*columns.shape[:2], -1, 2).permute(0, 2, 1, 3).flatten(2)
        return columns.transpose(1, 2)

    def normed(given: Tensor, norm: Tensor | None) -> Tensor:
        if norm is None:
            return given
        return functional.rms_norm(given.mT, given.shape[-2:-1], norm, b_c_dt_rms_eps).mT

    if B is None:
        B = matrix(rows[..., rank : rank + n], B_proj_bias, b_rms_weight)
    else:
        B = normed(B, b_rms_weight)
    if C is None:
        C = matrix(rows[..., rows.shape[-1] - n :], C_proj_bias, c_rms_weight)
    else:
        C = normed(C, c_rms_weight)
    out, *_ = selective_scan(
        tokens.transpose(1, 2),
        delta.transpose(1, 2),
        torch.view_as_real(A) if A.is_complex() else A,
        _for_scan(B, A.is_complex()),
        _for_scan(C, A.is_complex()),
        D,
        z,
        delta_bias,
        delta_softplus,
        _METHOD_NAMES.index(discretization),
    )
    if reverse:
        out = out.flip(2)
    if out_proj_weight is None:
        return out
    return functional.linear(out.transpose(1, 2), out_proj_weight, out_proj_bias)


def _for_scan(matrix: Tensor, is_complex: bool) -> Tensor:
    """Constant as (dim, N), in pairs beside a complex A; else (batch, groups, N, length)."""
    if matrix.dim() == 2 and is_complex:
        imaginary = matrix.imag if matrix.is_complex() else torch.zeros_like(matrix)
        return torch.stack([matrix.real, imaginary], -1)
    if matrix.dim() == 2:
        return matrix
    if matrix.is_complex():
        matrix = torch.view_as_real(matrix.resolve_conj()).flatten(-2)
    return matrix if matrix.dim() == 4 else matrix[:, None]


def parity() -> Parity:
    """What mamba_inner_fn is tried on."""
    return Parity(
        op="mamba_inner_fn",
        tier="C",
        function="mamba_inner_fn",
        reference=mamba_inner_fn,
        # A half type is rounded between the operators inside: docs and tests under autocast.
        dtypes=(torch.float32, torch.float64),
        differentiable=(
            "xz",
            "conv1d_weight",
            "conv1d_bias",
            "x_proj_weight",
            "delta_proj_weight",
            "out_proj_weight",
            "A",
            "D",
            "delta_bias",
        ),
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_make, 2, 4, 9)),
            Case("all_kept", functools.partial(_make, 2, 3, 7, checkpoint_lvl=0)),
            Case("norms", functools.partial(_make, 2, 3, 7, norms=True)),
            Case("reverse", functools.partial(_make, 1, 3, 8, reverse=True, discretization="foh")),
            Case("bilinear", functools.partial(_make, 1, 3, 8, discretization="bilinear")),
            Case("constant_matrices", functools.partial(_make, 2, 3, 6, constant=True)),
            Case("single", functools.partial(_make, 1, 1, 1)),
            Case("empty", functools.partial(_make, 0, 3, 5)),
        ),
        workloads=(
            # Mamba-130M in training, one layer.
            Workload("layer", {"batch": 8, "channels": 1536, "length": 2048}, _workload),
        ),
    )


def _make(
    batch: int,
    dim: int,
    length: int,
    new: Inputs,
    *,
    norms: bool = False,
    constant: bool = False,
    **settings: object,
) -> dict[str, object]:
    states, rank = 3, 2
    columns = rank if constant else rank + 2 * states
    made: dict[str, object] = {
        "xz": new.normal(batch, 2 * dim, length),
        "conv1d_weight": new.normal(dim, 1, 4) / 2,
        "conv1d_bias": new.normal(dim) / 2,
        "x_proj_weight": new.normal(columns, dim) / dim**0.5,
        "delta_proj_weight": new.normal(dim, rank) / 2,
        "out_proj_weight": new.normal(5, dim) / dim**0.5,
        "out_proj_bias": new.normal(5),
        "A": -new.uniform(dim, states, low=0.5, high=3),
        "D": new.normal(dim),
        "delta_bias": new.normal(dim) / 2,
        **settings,
    }
    if constant:
        made |= {"B": new.normal(dim, states), "C": new.normal(dim, states)}
    if norms:
        made |= {
            "B_proj_bias": new.normal(states),
            "C_proj_bias": new.normal(states),
            "b_rms_weight": new.uniform(states, low=0.5, high=2),
            "c_rms_weight": new.uniform(states, low=0.5, high=2),
            "dt_rms_weight": new.uniform(dim, low=0.5, high=2),
        }
    return made


def _workload(sizes: Sizes) -> dict[str, object]:
    batch, dim, length = sizes["batch"], sizes["channels"], sizes["length"]
    states, rank = 16, max(dim // 32, 1)
    seeds = iter(range(scenes.SEED, scenes.SEED + 20))

    def normal(*shape: int) -> Tensor:
        return scenes.normal(shape, next(seeds))

    return {
        "xz": normal(batch, 2 * dim, length),
        "conv1d_weight": normal(dim, 1, 4) / 2,
        "conv1d_bias": normal(dim) / 2,
        "x_proj_weight": normal(rank + 2 * states, dim) / dim**0.5,
        "delta_proj_weight": normal(dim, rank) / rank**0.5,
        "out_proj_weight": normal(max(dim // 2, 1), dim) / dim**0.5,
        "out_proj_bias": None,
        "A": -torch.arange(1.0, states + 1).repeat(dim, 1),
        "D": torch.ones(dim),
        "delta_bias": normal(dim) - 4,
    }


def _fuzz(draw: Draw) -> dict[str, object]:
    # What one value does to all others after it has no right answer beyond the range.
    draw.undefined("special", "scaled", "beyond")
    return _make(
        draw.size(3),
        draw.size(5, least=1),
        draw.size(12),
        draw,
        discretization=draw.option("rule", "mamba", "zoh", "tustin", "highorder"),
        checkpoint_lvl=draw.pick(0, 1),
        reverse=draw.chance(0.5),
    )
