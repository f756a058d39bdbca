"""selective_scan in plain PyTorch: a loop over positions, from the definitions of the rules."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["selective_scan"]

# From here on the closed forms of phi lose nothing.
_SERIES_END = 1.0
_SERIES_TERMS = 22


def _phi(z: Tensor, top: int) -> list[Tensor]:
    """phi_0 to phi_top: phi_0 = exp(z), phi_{j+1} = (phi_j - 1/j!) / z, phi_j(0) = 1/j!."""
    is_small = z.abs() < _SERIES_END
    # Neither branch may see what the other is for: its gradient would be NaN.
    small, large = torch.where(is_small, z, 0.0), torch.where(is_small, 1.0, z)
    phis = [z.exp()]
    closed = large.exp()
    for j in range(1, top + 1):
        closed = (closed - 1 / math.factorial(j - 1)) / large
        series = torch.zeros_like(z)
        for i in reversed(range(_SERIES_TERMS)):
            series = series * small + 1 / math.factorial(i + j)
        phis.append(torch.where(is_small, series, closed))
    return phis


# Each rule: (z, ratio) to alpha and the weights by offset. The ratio is that of the step whose
# length shapes the rule beside this one: the next one for poly, the one before for highorder.
_Rule = Callable[[Tensor, Tensor], tuple[Tensor, dict[int, Tensor]]]


def _mamba(z: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    return z.exp(), {0: torch.ones_like(z)}


def _zoh(z: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    phi = _phi(z, 1)
    return phi[0], {0: phi[1]}


def _foh(z: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    phi = _phi(z, 2)
    return phi[0], {-1: phi[1] - phi[2], 0: phi[2]}


def _bilinear(z: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    return (1 + z / 2) / (1 - z / 2), {0: 1 / (1 - z / 2)}


def _tustin(z: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    half = 1 / (2 - z)
    return (1 + z / 2) / (1 - z / 2), {-1: half, 0: half}


def _quadratic(nodes: dict[int, Tensor], phi: list[Tensor]) -> dict[int, Tensor]:
    """Weights of the parabola through samples at these places; the step goes from 0 to 1.

    The integrals of exp(z(1-s)) against 1, s and s^2 are phi_1, phi_2 and 2 phi_3.
    """
    weights = {}
    for offset, place in nodes.items():
        first, second = (other for key, other in nodes.items() if key != offset)
        product = (place - first) * (place - second)
        moments = 2 * phi[3] - (first + second) * phi[2] + first * second * phi[1]
        weights[offset] = moments / product
    return weights


def _poly(z: Tensor, ratio: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    phi, zero = _phi(z, 3), torch.zeros_like(ratio)
    return phi[0], _quadratic({-1: zero, 0: zero + 1, 1: 1 + ratio}, phi)


def _highorder(z: Tensor, ratio: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    phi, zero = _phi(z, 3), torch.zeros_like(ratio)
    return phi[0], _quadratic({-2: -ratio, -1: zero, 0: zero + 1}, phi)


def _runge_kutta(z: Tensor) -> Tensor:
    return 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24


def _rk4(z: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    before = (3 + 2 * z + 3 * z**2 / 4 + z**3 / 4) / 6
    return _runge_kutta(z), {-1: before, 0: (3 + z + z**2 / 4) / 6}


def _rk4_constant(z: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    return _runge_kutta(z), {0: 1 + z / 2 + z**2 / 6 + z**3 / 24}


# In the order of the schema's numbers; after them poly and highorder in true time.
_RULES: tuple[_Rule, ...] = (
    _mamba,
    _zoh,
    _foh,
    _bilinear,
    _tustin,
    _poly,
    _highorder,
    _rk4,
    _rk4_constant,
    _poly,
    _highorder,
)
# The step whose length the true-time rules compare with their own.
_NEIGHBOUR = {9: 1, 10: -1}


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20, x, torch.log1p(torch.where(x > 20, 0.0, x).exp()))


def _by_channel(matrix: Tensor, like_A: Tensor, channels: int) -> Tensor:
    """B or C as (batch or 1, channels, N, length or 1); complex if A is."""
    if matrix.dim() < 4:
        constant = torch.view_as_complex(matrix) if like_A.is_complex() else matrix
        return constant[None, :, :, None]
    if like_A.is_complex():
        matrix = torch.view_as_complex(matrix.unflatten(-1, (-1, 2)).contiguous())
    return matrix.repeat_interleave(channels // matrix.shape[1], dim=1)


def _scan(
    v: Tensor, steps: Tensor, A: Tensor, state: Tensor, method: int
) -> tuple[list[Tensor], Tensor]:
    """All states, from samples v (batch, dim, N, length) and steps (batch, dim, length)."""
    length, states = steps.shape[-1], []

    def at(values: Tensor, k: int) -> Tensor:
        return values[..., min(max(k, 0), length - 1)]

    for k in range(length):
        step = steps[..., k, None]
        ratio = torch.ones_like(step)
        if method in _NEIGHBOUR:
            ratio = at(steps, k + _NEIGHBOUR[method])[..., None] / step
        alpha, weights = _RULES[method](step * A, ratio)
        held = sum(weight * at(v, k + offset) for offset, weight in weights.items())
        state = alpha * state + step * held
        states.append(state)
    return states, state


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
    method: int = 0,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    with_checkpoints: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selective scan.

    Args:
        u: (batch, dim, length).
        delta: like u.
        A: (dim, N), or (dim, N, 2) real and imaginary parts.
        B: like A, or (batch, G, N, length), of complex numbers (batch, G, N, 2 * length).
        C: like A or as the other form of B.
        D: (dim,).
        z: like u.
        delta_bias: (dim,).
        delta_softplus: whether the steps go through softplus.
        method: number of the discretization.
        initial_state: (batch, dim, N), or (batch, dim, N, 2).
        reverse: from the last position to the first.
        with_checkpoints: whether the operator keeps states for its gradient; not needed here.
        deterministic: as of the operator; everything is here.

    Returns:
        The output; the last state; an empty tensor.
    """
    dtype = u.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u_wide, steps = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        steps = steps + delta_bias.to(wide)[:, None]
    if delta_softplus:
        steps = _softplus(steps)
    A = A.to(wide)
    is_complex = A.dim() == 3
    if is_complex:
        A = torch.view_as_complex(A.contiguous())
    channels, length = u.shape[1:]
    v = _by_channel(B.to(wide), A, channels) * u_wide[:, :, None]
    if initial_state is None:
        state = A.new_zeros((len(u), *A.shape))
    else:
        state = initial_state.to(wide)
        state = torch.view_as_complex(state.contiguous()) if is_complex else state
    if reverse:
        v, steps = v.flip(-1), steps.flip(-1)
    states, last = _scan(v, steps, A, state, method)
    y = u_wide * 0
    if length:
        path = torch.stack(states, -1)
        path = path.flip(-1) if reverse else path
        products = _by_channel(C.to(wide), A, channels) * path
        y = 2 * products.real.sum(2) if is_complex else products.sum(2)
    if D is not None:
        y = y + D.to(wide)[:, None] * u_wide
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    last = torch.view_as_real(last.resolve_conj()) if is_complex else last
    return y.to(dtype), last, u.new_empty(0, dtype=wide)
