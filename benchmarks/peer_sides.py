"""Peers of deformable operators and scans as functions, called as their own Python code calls them.

They are what the projects build beside their Python code: the extension modules selective_scan_cuda
(mamba-ssm e9594ce), causal_conv1d_cuda (causal-conv1d 0d2252d) and deformable_aggregation_ext
(SparseDrive ec0225d), and the package deformops (3.0.1). A side exists where its module can be
imported.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCAN_MODULE, CONV_MODULE = "selective_scan_cuda", "causal_conv1d_cuda"
AGGREGATION_MODULE = "deformable_aggregation_ext"
STATE_UPDATE_MODULE = "mamba_ssm.ops.triton.selective_state_update"
DEFORMOPS_MODULE = "deformops.registry"
MODULES = (SCAN_MODULE, STATE_UPDATE_MODULE, CONV_MODULE, AGGREGATION_MODULE, DEFORMOPS_MODULE)


@functools.cache
def module(name: str) -> Any:
    """Looked up once: calls are timed."""
    return importlib.import_module(name)


@functools.cache
def can_import(name: str) -> bool:
    """Whether a module is there, and all that it needs."""
    try:
        module(name)
    except Exception:
        return False
    return True


# --- mamba-ssm ----------------------------------------------------------------------------------


class _SelectiveScan(torch.autograd.Function):
    """selective_scan_interface.py's, of B and C with groups and with a gate."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, delta_softplus = arguments
        out, states, out_z = module(SCAN_MODULE).fwd(*tensors, delta_softplus)
        ctx.save_for_backward(*tensors, states, out)
        ctx.delta_softplus = delta_softplus
        return out_z  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, states, out = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        # No memory for the gradient of z is given, and the gated output is not computed again.
        gradients = module(SCAN_MODULE).bwd(
            *tensors, grad, states, out, None, ctx.delta_softplus, False
        )
        du, ddelta, dA, dB, dC, dD, ddelta_bias, dz = gradients
        return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, None


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    """u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L); A, D, delta_bias in float32."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    out: Tensor = _SelectiveScan.apply(*tensors, delta_softplus)  # type: ignore[no-untyped-call]
    return out


def selective_state_update() -> Callable[..., Tensor]:
    """mamba-ssm's kernel in Triton."""
    function = module(STATE_UPDATE_MODULE).selective_state_update
    return functools.partial(function, dt_softplus=True)


# --- causal-conv1d ------------------------------------------------------------------------------

# Its kernels take no other ones.
CONV_WIDTHS = (2, 3, 4)


class _CausalConv1d(torch.autograd.Function):
    """causal_conv1d_interface.py's with silu, without a state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty_like(x)
        module(CONV_MODULE).causal_conv1d_fwd(x, weight, bias, None, None, out, None, True)
        ctx.save_for_backward(x, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        grad = grad if 1 in (grad.stride(2), grad.stride(1)) else grad.contiguous()
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        dbias = torch.zeros_like(bias, dtype=torch.float32)
        module(CONV_MODULE).causal_conv1d_bwd(
            x, weight, bias, grad, None, None, None, dx, dweight, dbias, None, True
        )
        return dx, dweight.type_as(weight), dbias.type_as(bias)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X (B, D, L), either of the last two next to each other; weight (D, width); then silu."""
    return _CausalConv1d.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X (B, D); the state (B, D, S) is changed; then silu."""
    x = x.unsqueeze(-1)
    out = torch.empty_like(x)
    module(CONV_MODULE).causal_conv1d_update(x, conv_state, weight, bias, out, True, None, None)
    return out.squeeze(-1)


# --- SparseDrive --------------------------------------------------------------------------------


class _DeformableAggregation(torch.autograd.Function):
    """deformable_aggregation.py's. Its kernels run on the default stream."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        features, shapes, starts, location, weights = (x.contiguous() for x in tensors)
        given = features.float(), shapes.int(), starts.int(), location.float(), weights.float()
        ctx.save_for_backward(*given)
        extension = module(AGGREGATION_MODULE)
        return extension.deformable_aggregation_forward(*given)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        gradients = [torch.zeros_like(given[i]) for i in (0, 3, 4)]
        extension = module(AGGREGATION_MODULE)
        extension.deformable_aggregation_backward(*given, grad.contiguous(), *gradients)
        return gradients[0], None, None, gradients[1], gradients[2]


def deformable_aggregation(
    features: Tensor, shapes: Tensor, starts: Tensor, location: Tensor, weights: Tensor
) -> Tensor:
    """(B, rows, C), (cameras, levels, 2), (cameras, levels), (B, Q, P, cameras, 2), weights."""
    tensors = (features, shapes, starts, location, weights)
    out: Tensor = _DeformableAggregation.apply(*tensors)  # type: ignore[no-untyped-call]
    return out


# --- deformops ----------------------------------------------------------------------------------


@functools.cache
def has_deformops_kernels() -> bool:
    """Whether deformops' own library of CUDA kernels is there, beside those in Triton."""
    registry = module(DEFORMOPS_MODULE)
    try:
        registry.msda.load(registry.Backend.CUDA)
    except Exception:
        return False
    return True


def deformops_attention(with_kernels: bool = False) -> Callable[..., Tensor]:
    """Deformops' attention by the backend that it chooses itself, or by its CUDA kernels.

    Takes value, sizes and begins of levels, locations, and weights, which are used as they are.
    """
    registry = module(DEFORMOPS_MODULE)
    backend = registry.Backend.CUDA if with_kernels else None
    return functools.partial(registry.msda, method="linear", backend=backend)
