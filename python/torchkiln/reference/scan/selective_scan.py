"""selective_scan in plain PyTorch: a loop over positions, from the definitions of the rules."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.scan import _golden as golden
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload

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


def _complex(pairs: Tensor) -> Tensor:
    """Of real and imaginary parts along the last dimension; half types become float32."""
    wide = pairs if pairs.dtype == torch.float64 else pairs.float()
    return torch.complex(*wide.unbind(-1))


def _by_channel(matrix: Tensor, like_A: Tensor, channels: int) -> Tensor:
    """B or C as (batch or 1, channels, N, length or 1); complex if A is."""
    if matrix.dim() < 4:
        constant = _complex(matrix) if like_A.is_complex() else matrix
        return constant[None, :, :, None]
    if like_A.is_complex():
        matrix = _complex(matrix.unflatten(-1, (matrix.shape[-1] // 2, 2)))
    return matrix.repeat_interleave(channels // matrix.shape[1], dim=1)


def _scan(
    v: Tensor, steps: Tensor, A: Tensor, state: Tensor, method: int
) -> tuple[list[Tensor], Tensor]:
    """All states, from samples v (batch, dim, N, length) and steps (batch, dim, 1, length)."""
    length = steps.shape[-1]

    def moved(values: Tensor, offset: int) -> Tensor:
        """At each position what lies so many further on; beyond the ends what lies there."""
        places = torch.arange(length, device=values.device) + offset
        return values[..., places.clamp(0, max(length - 1, 0))]

    ratio = torch.ones_like(steps)
    if method in _NEIGHBOUR:
        ratio = moved(steps, _NEIGHBOUR[method]) / steps
    alpha, weights = _RULES[method](steps * A[..., None], ratio)
    held = sum(weight * moved(v, offset) for offset, weight in weights.items())
    states = []
    for a, added in zip(alpha.unbind(-1), (steps * held).unbind(-1), strict=True):
        state = a * state + added
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
        A = _complex(A)
    channels, length = u.shape[1:]
    v = _by_channel(B.to(wide), A, channels) * u_wide[:, :, None]
    if initial_state is None:
        state = A.new_zeros((len(u), *A.shape))
    else:
        state = initial_state.to(wide)
        state = _complex(state) if is_complex else state
    if reverse:
        v, steps = v.flip(-1), steps.flip(-1)
    states, last = _scan(v, steps[:, :, None], A, state, method)
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


_METHOD_NAMES = (
    "mamba",
    "zoh",
    "foh",
    "bilinear",
    "tustin",
    "poly",
    "highorder",
    "rk4",
    "rk4_constant",
)
_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def parity() -> Parity:
    """What selective_scan is tried on. Every case has every tensor; `without` leaves some out."""
    return Parity(
        op="selective_scan",
        tier="C",
        differentiable=_NAMES,
        arrange=_arranged,
        label=_label,
        deterministic=False,
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _scan_of(new, 2, 4, 21, 3)),
            *(_rule(name) for name in _METHOD_NAMES[1:]),
            Case("poly_true_time", lambda new: _of_rule(new, "poly", true_time=True)),
            Case("highorder_true_time", lambda new: _of_rule(new, "highorder", true_time=True)),
            # More than a chunk of the kernels, and than a tile of states; the last one not full.
            Case("chunks", lambda new: _scan_of(new, 1, 3, 264, 2, groups=1, reverse=True)),
            Case("states", lambda new: _scan_of(new, 1, 2, 40, 19, groups=1)),
            # More than a panel of channels, and rows of 16 bytes.
            Case("panels", lambda new: _scan_of(new, 2, 22, 24, 2)),
            *(
                Case(f"chunks_{name}", functools.partial(_long, method=name))
                for name in ("poly", "highorder")
            ),
            # Few rows that are long enough to be split.
            Case("splits", lambda new: _scan_of(new, 1, 2, 4200, 1, groups=1, without=("z",))),
            # Of a rule whose splits have a product for each state.
            Case("splits_bilinear", lambda new: _of_rule(new, "bilinear", length=530)),
            Case("splits_complex", lambda new: _of_rule(new, "zoh", length=530, parts=2)),
            *(
                Case(f"splits_{name}_true_time", functools.partial(_split, method=name))
                for name in ("poly", "highorder")
            ),
            Case("deterministic", lambda new: _scan_of(new, 2, 22, 24, 2, deterministic=True)),
            Case("plain", lambda new: _scan_of(new, 2, 4, 21, 3, without=_NAMES[5:])),
            Case("no_softplus", lambda new: _scan_of(new, 1, 4, 21, 3, delta_softplus=False)),
            Case("constant", lambda new: _scan_of(new, 2, 4, 21, 3, constant="BC", groups=1)),
            Case("constant_B", lambda new: _of_rule(new, "foh", constant="B")),
            Case("constant_C", lambda new: _of_rule(new, "poly", constant="C", reverse=True)),
            Case("complex", lambda new: _scan_of(new, 2, 4, 21, 3, parts=2)),
            Case("complex_chunks", lambda new: _scan_of(new, 1, 2, 135, 5, parts=2, groups=1)),
            *(
                Case(f"complex_{name}", functools.partial(_of_rule, method=name, parts=2))
                for name in ("foh", "tustin", "poly", "rk4")
            ),
            Case(
                "complex_constant", lambda new: _of_rule(new, "highorder", parts=2, constant="BC")
            ),
            *(
                Case(name, functools.partial(_scan_of, batch=1, dim=2, length=5, groups=1, **form))
                for name, form in _MANY_STATES.items()
            ),
            *(
                Case(f"trained_{name}", functools.partial(_trained, method=name))
                for name in ("zoh", "foh", "poly", "highorder")
            ),
            *(
                Case(
                    f"trained_{name}_true_time",
                    functools.partial(_trained, method=name, true_time=True),
                )
                for name in ("poly", "highorder")
            ),
            *(_reversed(rule, parts) for rule in golden.GOLDEN for parts in (1, 2)),
            *(_golden(rule, parts) for rule in golden.GOLDEN for parts in (1, 2)),
            Case("steep", lambda new: _steep(new)),
            Case("steps_far_from_0", lambda new: _far_from_0(new)),
            Case("single", lambda new: _scan_of(new, 1, 1, 1, 1, groups=1)),
            Case("one_step_poly", lambda new: _of_rule(new, "poly", length=1)),
            Case("two_steps_highorder", lambda new: _of_rule(new, "highorder", length=2)),
            Case("no_batch", lambda new: _scan_of(new, 0, 4, 5, 3)),
            Case("no_length", lambda new: _scan_of(new, 2, 4, 0, 3)),
        ),
        workloads=(
            Workload("mamba", _MAMBA, lambda sizes: _workload(sizes, "mamba")),
            Workload("foh", _MAMBA, lambda sizes: _workload(sizes, "foh")),
            Workload("poly", _MAMBA, lambda sizes: _workload(sizes, "poly")),
        ),
    )


# A layer of a Mamba model of 130 million parameters.
_MAMBA = {"batch": 8, "dim": 768, "length": 1024, "states": 16}


def _rule(name: str) -> Case:
    return Case(name, functools.partial(_of_rule, method=name))


def _of_rule(new: Inputs, method: str, length: int = 21, **settings: Any) -> dict[str, object]:
    return _scan_of(new, 2, 4, length, 3, discretization=method, **settings)


def _long(new: Inputs, method: str) -> dict[str, object]:
    return _scan_of(new, 1, 2, 270, 2, groups=1, discretization=method, true_time=True)


def _split(new: Inputs, method: str) -> dict[str, object]:
    return _scan_of(new, 1, 4, 530, 9, discretization=method, true_time=True)


def _scan_of(
    new: Inputs,
    batch: int,
    dim: int,
    length: int,
    states: int,
    groups: int = 2,
    parts: int = 1,
    constant: str = "",
    **settings: object,
) -> dict[str, object]:
    """Arguments before `_arranged`: numbers of complex matrices have a last dimension of 2."""
    pair = (2,) if parts == 2 else ()

    def matrix(name: str) -> Tensor:
        shape = (dim, states) if name in constant else (batch, groups, states, length)
        return new.normal(*shape, *pair)

    A = -new.uniform(dim, states, *pair, low=0.2, high=1.5)
    return {
        "u": new.normal(batch, dim, length),
        "delta": new.uniform(batch, dim, length, low=-1.5, high=0.5).abs() + 0.1,
        "A": A,
        "B": matrix("B"),
        "C": matrix("C"),
        "D": new.normal(dim),
        "z": new.normal(batch, dim, length),
        "delta_bias": new.uniform(dim, low=-0.05, high=0.2),
        "initial_state": new.normal(batch, dim, states, *pair),
        "delta_softplus": True,
        "return_last_state": True,
        **settings,
    }


_MANY_STATES: dict[str, dict[str, Any]] = {
    "states_65": {"states": 65},
    "states_256": {"states": 256},
    "complex_states_65": {"states": 65, "parts": 2},
    "complex_states_256": {"states": 256, "parts": 2},
}


def _named(prefix: str, rule: tuple[str, bool], parts: int) -> str:
    name, true_time = rule
    return ("complex_" if parts == 2 else "") + prefix + name + ("_true_time" if true_time else "")


def _reversed(rule: tuple[str, bool], parts: int) -> Case:
    settings: dict[str, Any] = {
        "discretization": rule[0],
        "true_time": rule[1],
        "parts": parts,
        "reverse": True,
    }
    return Case(
        _named("reverse_", rule, parts), lambda new: _scan_of(new, 1, 2, 7, 2, 1, **settings)
    )


def _golden(rule: tuple[str, bool], parts: int) -> Case:
    """The example whose states are known as numbers; all of a real a, the last of a complex one."""
    states, last = golden.GOLDEN[rule]
    if parts == 1:
        known = torch.tensor(states, dtype=torch.float64).view(1, 1, 4)
        numbers = {"forward 0": (known, golden.REAL_ROUNDING)}
    else:
        known = torch.tensor([last.real, last.imag], dtype=torch.float64).view(1, 1, 1, 2)
        numbers = {"forward 1": (known, golden.COMPLEX_ROUNDING)}
    make = functools.partial(_example, rule=rule, parts=parts)
    return Case(_named("golden_", rule, parts), make, golden=numbers)


def _example(new: Inputs, rule: tuple[str, bool], parts: int) -> dict[str, object]:
    def row(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)

    def numbers(values: Tensor, imaginary: float = 0.0) -> Tensor:
        pairs = torch.stack([values, torch.full_like(values, imaginary)], -1)
        return pairs if parts == 2 else values

    a = golden.COMPLEX_A if parts == 2 else complex(golden.REAL_A)
    return {
        **_scan_of(new, 1, 1, 4, 1, groups=1),
        "u": row(*golden.INPUTS),
        "delta": row(*golden.STEPS),
        "A": numbers(row(a.real)[0], a.imag),
        "B": numbers(row(*golden.MATRIX)[None]),
        "C": numbers(row(1, 1, 1, 1)[None]),
        "delta_softplus": False,
        "discretization": rule[0],
        "true_time": rule[1],
        "without": _NAMES[5:],
    }


def _trained(new: Inputs, method: str, true_time: bool = False) -> dict[str, object]:
    """Steps and A as trained models have them: z from -1.6 to 0.

    In true time neighbouring steps differ less, as the weights grow with their ratio.
    """
    states = 16
    delta = 0.001 * 100 ** new.uniform(1, 2, 70)
    return {
        **_scan_of(new, 1, 2, 70, states, groups=1),
        "delta": new.uniform(1, 2, 70, low=0.02, high=0.1) if true_time else delta,
        "A": -torch.arange(1.0, states + 1, dtype=torch.float64).repeat(2, 1),
        "delta_softplus": False,
        "discretization": method,
        "true_time": true_time,
        "without": ("delta_bias",),
    }


def _steep(new: Inputs) -> dict[str, object]:
    """Steps of five units: |z| up to 80, where every exponential is gone."""
    case = _of_rule(new, "highorder", delta_softplus=False)
    return {
        **case,
        "delta": new.uniform(2, 4, 21, low=0.01, high=5),
        "A": -new.uniform(4, 3, high=16),
    }


def _far_from_0(new: Inputs) -> dict[str, object]:
    """Steps before softplus whose exponential float32 does not hold, in whole numbers."""
    case = _scan_of(new, 1, 2, 49, 3, groups=1, without=("delta_bias",))
    delta = torch.arange(-120.0, 125.0, 2.5).floor().double()
    return {**case, "delta": delta.view(1, 2, 49), "A": new.uniform(2, 3, low=-0.02, high=-0.01)}


def _arranged(without: tuple[str, ...] = (), **arguments: Any) -> dict[str, Any]:
    """The public function's arguments: pairs as complex numbers, without what is left out."""
    kept = {name: value for name, value in arguments.items() if name not in without}
    if _is_pairs(kept["A"]) and kept["A"].dim() == 3:
        for name in ("A", "B", "C", "initial_state"):
            tensor = kept.get(name)
            if tensor is not None and _is_pairs(tensor):
                kept[name] = tensor.flatten(-2) if tensor.dim() == 5 else _complex(tensor)
    return kept


def _label(arguments: Mapping[str, Any]) -> str:
    """The rule and the direction of the scan."""
    label = str(arguments.get("discretization", "mamba"))
    label += " true_time" if arguments.get("true_time") else ""
    return label + (" reverse" if arguments.get("reverse") else "")


def _is_pairs(tensor: object) -> bool:
    if not isinstance(tensor, Tensor):  # what is wrong goes to the function
        return False
    return tensor.is_floating_point() and tensor.dim() > 2 and tensor.shape[-1] == 2


def _workload(sizes: Sizes, discretization: str) -> dict[str, object]:
    """As a trained model has them: steps log-uniform in [0.001, 0.1], A = -(1 ... N)."""
    new = Inputs()
    batch, dim, length, states = (sizes[name] for name in ("batch", "dim", "length", "states"))
    steps = 0.001 * 100 ** new.uniform(batch, dim, length)
    made = {
        "u": new.normal(batch, dim, length),
        "delta": steps + torch.log(-torch.expm1(-steps)),
        "A": -torch.arange(1, states + 1, dtype=torch.float64).repeat(dim, 1),
        "B": new.normal(batch, 1, states, length),
        "C": new.normal(batch, 1, states, length),
        "D": new.normal(dim),
        "z": new.normal(batch, dim, length),
        "delta_bias": torch.zeros(dim, dtype=torch.float64),
        "initial_state": new.normal(batch, dim, states),
    }
    return {
        **{name: tensor.float() for name, tensor in made.items()},
        "delta_softplus": True,
        "discretization": discretization,
    }


def _fuzz(draw: Draw) -> dict[str, object]:
    groups = draw.pick(1, 1, 2, 3)
    batch, dim, length = draw.size(3), groups * draw.size(6, 1), draw.size(40)
    arguments = _scan_of(
        draw,
        batch,
        dim,
        length,
        draw.pick(1, 2, 5, 9, 17),
        groups,
        draw.option("parts", 1, 2),
        draw.pick("", "", "B", "C", "BC"),
        delta_softplus=draw.chance(0.5),
        return_last_state=draw.chance(0.5),
        reverse=draw.chance(0.4),
        discretization=draw.option("discretization", *_METHOD_NAMES),
        true_time=draw.option("true_time", False, False, True),
    )
    arguments["without"] = tuple(name for name in _NAMES[5:] if draw.chance(0.4))
    for name in ("u", "B", "C", "z", "D", "initial_state"):
        value = arguments[name]
        if isinstance(value, Tensor):
            draw.strange(value)
    # States that overflow on the way, or meet infinities, depend on the order of sums.
    draw.undefined("special", "scaled")
    return arguments
