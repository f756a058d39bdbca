"""Selective scan: a linear recurrence with input-dependent steps, by nine discretizations."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops._arguments import (
    dtype_name,
    require_choice,
    require_optional_tensor,
    require_tensor,
    sum_dtype,
    under_autocast,
)

__all__ = ["selective_scan"]

# Values of the schema's `method`.
METHODS = {
    "mamba": 0,
    "zoh": 1,
    "foh": 2,
    "bilinear": 3,
    "tustin": 4,
    "poly": 5,
    "highorder": 6,
    "rk4": 7,
    "rk4_constant": 8,
}
# Those whose weights differ when steps are not equal.
TRUE_TIME = {"poly": 9, "highorder": 10}

# Steps between two states that are kept for the backward, which has the initial one already;
# kCheckpoint of selective_scan.h.
_CHECKPOINT = 32


def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    method: int = 0,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    with_checkpoints: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, length = u.shape
    chunks = (length + _CHECKPOINT - 1) // _CHECKPOINT
    weights = sum_dtype(u.dtype)
    state = u.new_empty((batch, dim, *A.shape[1:]), dtype=weights)
    kept = (batch, dim, torch.sym_max(chunks - 1, 0), *A.shape[1:]) if with_checkpoints else (0,)
    return u.new_empty(u.shape), state, u.new_empty(kept, dtype=weights)


def _fake_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    method: int,
    reverse: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = sum_dtype(u.dtype)

    def like(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape)

    return (
        like(u),
        like(delta),
        like(A),
        like(B),
        like(C),
        u.new_empty((u.shape[1] if D is not None else 0,), dtype=weights),
        u.new_empty(u.shape if z is not None else (0,)),
        u.new_empty((u.shape[1] if delta_bias is not None else 0,), dtype=weights),
        u.new_empty((0,), dtype=weights) if initial_state is None else like(initial_state),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, softplus, method, initial_state, reverse, _, deterministic = inputs
    ctx.save_for_backward(*tensors, initial_state, output[2])
    ctx.mark_non_differentiable(output[2])
    # Zeros for what is kept would take as much memory once more.
    ctx.set_materialize_grads(False)
    ctx.settings = softplus, method, reverse, deterministic


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None, _: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    grads = _selective_scan_backward(
        grad_out, grad_last_state, *tensors, checkpoints, *ctx.settings
    )
    *of_inputs, of_state = (
        None if x is None else grad for x, grad in zip(tensors, grads, strict=True)
    )
    return (*of_inputs, None, None, of_state)


_selective_scan_backward = operator("_selective_scan_backward", fake=_fake_backward)
_selective_scan = operator(
    "selective_scan", fake=_fake, setup_context=_setup_context, backward=_backward
)


def method_of(op: str, discretization: str, true_time: bool) -> int:
    """The schema's number of a rule."""
    require_choice(op, "discretization", discretization, METHODS)
    if true_time and discretization in TRUE_TIME:
        return TRUE_TIME[discretization]
    return METHODS[discretization]


def _weight(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A floating tensor in the dtype of weights; whatever else as it is, for plan() to refuse."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def parts_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Real and imaginary part of a number, real ones too, as a last dimension of 2."""
    is_double = dtype == torch.float64
    wide = tensor.to(torch.complex128 if is_double else torch.complex64)
    return torch.view_as_real(wide.resolve_conj())


def _input_matrix(name: str, tensor: Tensor, is_complex: bool, u: Tensor) -> Tensor:
    """B or C as the schema takes it: constant like A, or (batch, groups, N, length)."""
    if tensor.dim() == 2:
        dtype = sum_dtype(u.dtype)
        return parts_of(tensor, dtype) if is_complex else _weight(tensor, dtype)  # type: ignore[return-value]
    if tensor.is_complex() and is_complex:
        parts = torch.view_as_real(tensor.resolve_conj())
        if parts.dtype != u.dtype:
            raise TypeError(
                f"selective_scan: {name} must have parts of the dtype of u ({dtype_name(u)}); got "
                f"{dtype_name(tensor)}. Use torch.view_as_real({name}).flatten(-2).to(u.dtype)"
            )
        tensor = parts.flatten(-2)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    discretization: str = "mamba",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    *,
    true_time: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a diagonal state space model whose step, input and output maps depend on the input.

    With d_k = delta_k + delta_bias (through softplus if asked for), q = A d_k and v_k = B_k u_k:

        h_k = alpha(q) h_{k-1} + d_k sum_j w_j(q) v_{k+j}
        out_k = (sum_n C_{k,n} h_{k,n} + D u_k) * silu(z_k)

    With a complex A the sum over n is 2 Re(sum_n C_{k,n} h_{k,n}): each state stands for itself and
    its conjugate, and the output is real.

    | discretization | alpha | input term | exact for |
    |---|---|---|---|
    | mamba | exp(q) | v_k (Mamba's own rule) | - |
    | zoh | exp(q) | v_k held over the step | constant input |
    | foh | exp(q) | linear through v_{k-1}, v_k | linear input |
    | bilinear | (1+q/2)/(1-q/2) | v_k | - |
    | tustin | (1+q/2)/(1-q/2) | mean of v_{k-1}, v_k | - |
    | poly | exp(q) | quadratic through v_{k-1}, v_k, v_{k+1}: not causal | quadratic input |
    | highorder | exp(q) | quadratic through v_{k-2}, v_{k-1}, v_k | quadratic input |
    | rk4 | Runge-Kutta of order 4 | linear through v_{k-1}, v_k | - |
    | rk4_constant | Runge-Kutta of order 4 | v_k held over the step | - |

    Samples beyond either end repeat the first or last one. The Runge-Kutta rules are stable only
    for q in [-2.785, 0]; the others for every A with a negative real part.

    Args:
        u: (batch, dim, length), float16, bfloat16, float32 or float64.
        delta: steps, like u.
        A: (dim, N), real or complex; N up to 256.
        B: (dim, N) constant; (batch, N, length) or (batch, G, N, length) with the dtype of u,
            where dim is a multiple of G and channel i is in group i // (dim / G). With a complex
            A, where B is not constant: complex64 beside float32, complex128 beside float64; or,
            beside any dtype, 2 * length real numbers of that dtype, real and imaginary parts in
            turns.
        C: like B, in any of its forms; where both are in groups, in as many.
        D: (dim,).
        z: like u; the output is multiplied by silu(z).
        delta_bias: (dim,).
        delta_softplus: whether the steps go through softplus.
        discretization: see above.
        initial_state: (batch, dim, N), complex if A is; None: 0. The gradient reads it again, and
            is refused where it was changed in place, as by `selective_state_update`.
        return_last_state: whether the state after the last step is returned, too.
        reverse: whether the scan goes from the last position to the first.
        true_time: whether the quadratic rules (poly, highorder) take the lengths of neighbouring
            steps into account; without it their weights are those of equal steps. The weights grow
            without bound where neighbouring steps differ much, and steps must be above 0.
        deterministic: whether two runs of the gradient give the same bits; None follows
            `torch.use_deterministic_algorithms`.

    Returns:
        (batch, dim, length), dtype of u; with return_last_state also (batch, dim, N), float32
        (complex64 for a complex A; float64 and complex128 for float64).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, discretization or device, or N above 256.

    Differentiable: u, delta, A, B, C, D, z, delta_bias, initial_state; through both results. A, D,
    delta_bias, initial_state and constant B and C may have any real dtype and are computed with in
    float32 (float64 for float64). Deterministic: forward yes; backward on CUDA adds the gradients
    of variable B and C, and in the half types that of A, by atomics unless `deterministic`, which
    takes more memory. Autocast: nothing is cast; where u, delta, z and variable B and C differ they
    get their common dtype.

    Note:
        Real sums are float32 for the half types. For the gradient a state is kept for every 32
        positions but the first; all others are computed again.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023; the
        rules: exponential integrators with polynomial holds, and docs/selective_scan.md.

    Example:
        >>> import torch
        >>> from torchkiln.ops import selective_scan
        >>> u, delta = torch.ones(1, 1, 4), torch.full((1, 1, 4), 0.5)
        >>> A, B, C = -torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1)
        >>> selective_scan(u, delta, A, B, C, discretization="zoh")
        tensor([[[0.3935, 0.6321, 0.7769, 0.8647]]])
    """
    require_tensor("selective_scan", u=u, delta=delta, A=A, B=B, C=C)
    require_optional_tensor(
        "selective_scan", D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    method = method_of("selective_scan", discretization, true_time)
    deterministic = deterministic_default(deterministic)
    weights = sum_dtype(u.dtype)
    is_complex = A.is_complex()
    if under_autocast(u):
        u, delta, z, B, C = _common_dtype(u, delta, z, B, C)
    B, C = _input_matrix("B", B, is_complex, u), _input_matrix("C", C, is_complex, u)
    if is_complex:
        initial_state = None if initial_state is None else parts_of(initial_state, weights)
    tensors = u, delta, A, B, C, D, z, delta_bias, initial_state
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    out, last_state, _ = _selective_scan(
        u,
        delta,
        parts_of(A, weights) if is_complex else _weight(A, weights),
        B,
        C,
        _weight(D, weights),
        z,
        _weight(delta_bias, weights),
        delta_softplus,
        method,
        _weight(initial_state, weights),
        reverse,
        needs_grad,
        deterministic,
    )
    if not return_last_state:
        return out
    return out, torch.view_as_complex(last_state) if is_complex else last_state


def _common_dtype(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All but the constant matrices (two dimensions) and what is absent, in one floating dtype."""
    taking_part = [
        tensor
        for tensor in tensors
        if tensor is not None and tensor.dim() > 2 and tensor.is_floating_point()
    ]
    dtype = taking_part[0].dtype if taking_part else None
    for tensor in taking_part:
        dtype = torch.promote_types(dtype, tensor.dtype)  # type: ignore[arg-type]
    return tuple(
        tensor.to(dtype) if any(tensor is other for other in taking_part) else tensor  # type: ignore[union-attr]
        for tensor in tensors
    )
