"""selective_state_update in plain PyTorch: one turn of the loop of selective_scan."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.scan.selective_scan import _NEIGHBOUR, _RULES, _softplus
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _decoding as decoding
from torchkiln.testing import _scenes as scenes

__all__ = ["selective_state_update"]


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
    method: int = 0,
    is_complex: bool = False,
    x_history: Tensor | None = None,
    B_history: Tensor | None = None,
    dt_history: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """One position of a selective scan; changes the state, and the rings of earlier samples.

    Args:
        state: (rows, D, N) or (rows, H, D, N); of a complex A with a last dimension of 2.
        x: (B, D) or (B, H, D).
        dt: like x.
        A: (D, N) or (H, D, N); complex ones with a last dimension of 2, as B and C.
        B: (B, G, N).
        C: (B, G, N).
        D: (D,) or (H, D).
        z: like x.
        dt_bias: like D.
        dt_softplus: whether the steps go through softplus.
        state_batch_indices: (B,) int32; below 0: no state.
        method: number of the rule.
        is_complex: whether A is.
        x_history: (rows, slots, channels).
        B_history: (rows, slots, G, N).
        dt_history: (rows, slots, channels).
        seen: (rows,) int32, samples before this one; negative ones count as 0.

    Returns:
        Shape of x.
    """
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    # Half types are what is stored; exponentials and sums are wide.
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(wide) for tensor in (x, dt, A, B, C))
    D, z, dt_bias = (None if tensor is None else tensor.to(wide) for tensor in (D, z, dt_bias))
    A = _complex(A) if is_complex else A
    for b in range(x.shape[0]):
        row = b if state_batch_indices is None else int(state_batch_indices[b])
        if row < 0 or (x.device.type != "cpu" and row >= len(state)):
            continue
        step = dt[b] if dt_bias is None else dt[b] + dt_bias
        step = _softplus(step) if dt_softplus else step
        count = 0 if seen is None else max(int(seen[row]), 0)

        def earlier(ring: Tensor, own: Tensor, offset: int, k: int = count, r: int = row) -> Tensor:
            """The sample before the own one by so many; before the first one, that."""
            index = max(k + offset, 0)
            return own if index >= k else ring[r, index % ring.shape[1]].reshape(own.shape)

        ratio = torch.ones_like(step)
        if _NEIGHBOUR.get(method) and dt_history is not None:
            ratio = earlier(dt_history, step, -1) / step
        alpha, weights = _RULES[method](step[..., None] * A, ratio[..., None])
        held: Any = 0
        for offset, weight in weights.items():
            u, matrix = x[b], B[b]
            if offset and x_history is not None and B_history is not None:
                u, matrix = earlier(x_history, u, offset), earlier(B_history, matrix, offset)
            held = held + weight * u[..., None] * _by_channel(matrix, x[b], is_complex)
        before = _complex(state[row]) if is_complex else state[row]
        new = alpha * before + step[..., None] * held
        state[row] = torch.view_as_real(new) if is_complex else new
        products = new * _by_channel(C[b], x[b], is_complex)
        y = 2 * products.real.sum(-1) if is_complex else products.sum(-1)
        y = y if D is None else y + D * x[b]
        out[b] = y if z is None else y * torch.nn.functional.silu(z[b])
        for ring, own in ((x_history, x[b]), (B_history, B[b]), (dt_history, step)):
            if ring is not None:
                ring[row, count % ring.shape[1]] = own.reshape(ring.shape[2:])
    return out


def _complex(pairs: Tensor) -> Tensor:
    """Complex numbers of pairs; torch knows none of the half types."""
    wide = pairs if pairs.dtype == torch.float64 else pairs.float()
    return torch.view_as_complex(wide.contiguous())


def _by_channel(matrix: Tensor, x: Tensor, is_complex: bool) -> Tensor:
    """B or C of one sequence, (G, N), as (channels or heads, [1,] N)."""
    matrix = _complex(matrix) if is_complex else matrix
    matrix = matrix.repeat_interleave(x.shape[0] // matrix.shape[0], dim=0)
    return matrix if x.dim() == 1 else matrix[:, None]


_LOOKING_BACK = ("foh", "tustin", "rk4", "highorder")
# Of several steps.
_ROUNDED: dict[str, Any] = {
    "tier": "C",
    "reason": "a state of a half type is rounded at each step: 1e-3 after three in bfloat16",
}


def parity() -> Parity:
    """What selective_state_update is tried on."""
    return Parity(
        op="selective_state_update",
        tier="B",
        function=decoding.scanned,
        reference=decoding.scanned_plainly,
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_make, (3, 5), 4)),
            Case("many_states", functools.partial(_make, (2, 3), 40)),
            Case("heads", functools.partial(_make, (2, 4, 3), 8, groups=2)),
            Case("groups", functools.partial(_make, (2, 6), 5, groups=3)),
            Case("rows", functools.partial(_make, (3, 4), 4, rows=True)),
            Case("plain", functools.partial(_make, (2, 3), 4, bare=True)),
            Case("complex", functools.partial(_make, (2, 3), 4, is_complex=True)),
            *(
                Case(
                    rule,
                    functools.partial(_make, (2, 3), 4, length=4, discretization=rule),
                    **_ROUNDED,
                )
                for rule in ("zoh", "bilinear", "rk4_constant", *_LOOKING_BACK)
            ),
            *(
                Case(
                    f"{rule}_complex",
                    functools.partial(
                        _make, (2, 4), 3, length=4, discretization=rule, is_complex=True, groups=2
                    ),
                    **_ROUNDED,
                )
                for rule in ("zoh", "highorder")
            ),
            Case(
                "highorder_true_time",
                functools.partial(
                    _make, (2, 3), 4, length=5, discretization="highorder", true_time=True
                ),
                **_ROUNDED,
            ),
            Case(
                "foh_rows",
                functools.partial(_make, (3, 4), 4, length=3, discretization="foh", rows=True),
                **_ROUNDED,
            ),
            Case("single", functools.partial(_make, (1, 1), 1)),
            Case("no_sequences", functools.partial(_make, (0, 3), 4)),
            Case("no_states", functools.partial(_make, (2, 3), 0)),
        ),
        workloads=(
            # A step of Mamba-130M.
            Workload(
                "decode", {"batch": 64, "channels": 1536, "states": 16}, _workload, gradient=False
            ),
        ),
    )


def _make(
    shape: tuple[int, ...],
    states: int,
    new: Inputs,
    *,
    length: int = 1,
    groups: int = 0,
    discretization: str = "mamba",
    true_time: bool = False,
    is_complex: bool = False,
    rows: bool = False,
    bare: bool = False,
) -> dict[str, object]:
    batch, channels = shape[0], shape[1:]
    of_group = (groups, states) if groups else (states,)
    made: dict[str, object] = {
        "state": new.normal(batch + 3 if rows else batch, *channels, states),
        "x": new.normal(*shape, length),
        "dt": new.normal(*shape, length),
        "A": -new.uniform(*channels, states, low=0.1, high=4),
        "B": new.normal(batch, *of_group, length),
        "C": new.normal(batch, *of_group, length),
        "dt_softplus": True,
        "discretization": discretization,
        "true_time": true_time,
    }
    if is_complex:
        made["imaginary"] = new.normal(*channels, states)
    if rows:
        made["state_batch_indices"] = torch.tensor([batch + 1, -1, 0], dtype=torch.int32)[:batch]
    if not bare:
        made["D"], made["dt_bias"] = new.normal(*channels), new.normal(*channels)
        made["z"] = new.normal(*shape)
    return made


def _workload(sizes: Sizes) -> dict[str, object]:
    batch, channels, states = sizes["batch"], sizes["channels"], sizes["states"]
    seeds = iter(range(scenes.SEED, scenes.SEED + 20))
    return {
        "state": scenes.normal((batch, channels, states), next(seeds)),
        "x": scenes.normal((batch, channels, 1), next(seeds)),
        "dt": scenes.normal((batch, channels, 1), next(seeds)) - 4,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": scenes.normal((batch, states, 1), next(seeds)),
        "C": scenes.normal((batch, states, 1), next(seeds)),
        "D": torch.ones(channels),
        "z": scenes.normal((batch, channels), next(seeds)),
        "dt_bias": scenes.normal((channels,), next(seeds)),
        "dt_softplus": True,
    }


def _fuzz(draw: Draw) -> dict[str, object]:
    # Products of large values; NaN and infinities times a weight of 0.
    draw.undefined("special", "scaled")
    batch, channels, states = draw.size(3), draw.size(9, least=1), draw.size(20)
    # A state of a half type is rounded after each step, as mamba-ssm rounds it. From the second
    # step on the result has that rounding, which a sum that cancels shows whole; so many steps are
    # compared where the state is wider than the inputs, or they are no half types.
    wide = draw.option("wide state", False, True)
    is_half = draw.dtype in (torch.float16, torch.bfloat16)
    length = draw.pick(1, 2, 5) if wide or not is_half else 1
    return {
        "state": draw.values(batch, channels, states),
        "x": draw.values(batch, channels, length),
        "dt": draw.uniform(batch, channels, length, low=0.001, high=0.5),
        "A": -draw.uniform(channels, states, low=0.1, high=4),
        "B": draw.values(batch, states, length),
        "C": draw.values(batch, states, length),
        "discretization": draw.option(
            "rule", "mamba", "zoh", "bilinear", "rk4_constant", *_LOOKING_BACK
        ),
        "wide_state": wide,
    }
