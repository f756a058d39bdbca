"""Rows of the selective scan. mamba-ssm runs beside it where its extension module is.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peer_sides as peers
from benchmarks.cases import (
    BF16,
    BOTH,
    F16,
    F32,
    FORWARD,
    MAMBA,
    OURS,
    PARITIES,
    PLAIN,
    Baseline,
    Bind,
    Case,
    Target,
    name_of,
    nbytes,
    oracle_of,
    ours,
    side,
)
from benchmarks.harness import Inputs, Work

METHODS = ("mamba", "zoh", "foh", "bilinear", "tustin", "poly", "highorder", "rk4", "rk4_constant")

# The reference has a number for each batch, channel, position and state, in float64.
MOST_STATES = 2**27
# Batch, channels, length, states.
Size = tuple[int, int, int, int]
# Microseconds of mamba-ssm e9594ce, forward and forward + backward.
PEER: dict[tuple[Size, torch.dtype], tuple[float, float]] = {
    ((8, 768, 1024, 16), F32): (229, 822),
    ((8, 768, 1024, 16), F16): (116, 646),
    ((8, 768, 1024, 16), BF16): (120, 717),
    ((1, 1536, 8192, 16), F32): (495, 1599),
    ((1, 1536, 8192, 16), F16): (279, 1288),
    ((1, 1536, 8192, 16), BF16): (271, 1296),
    ((64, 192, 197, 16), F32): (110, 632),
    ((64, 192, 197, 16), F16): (109, 558),
    ((64, 192, 197, 16), BF16): (109, 535),
    ((4, 2048, 2048, 16), F32): (594, 1976),
    ((4, 2048, 2048, 16), F16): (304, 1544),
    ((4, 2048, 2048, 16), BF16): (306, 1527),
}


def inputs_of(size: Size, device: torch.device, dtype: torch.dtype, grad: bool) -> Inputs:
    """Those of the workload; what is differentiated is named input for the harness."""
    (found,) = (w for w in PARITIES["selective_scan"].workloads if w.name == "mamba")
    sizes = dict(zip(("batch", "dim", "length", "states"), size, strict=True))
    made = found.arguments(sizes, dtype, "contiguous", device)
    weights = ("A", "D", "delta_bias")
    inputs = {
        name: value.float() if name in weights else value
        for name, value in made.items()
        if isinstance(value, Tensor) and name != "initial_state"
    }
    inputs["input"] = inputs.pop("u")
    return {name: value.requires_grad_(grad) for name, value in inputs.items()}


def scan_bind(scan: Callable[..., Any], direction: str, **settings: Any) -> Bind:
    """The call of one direction."""
    names = ("input", "delta", "A", "B", "C", "D", "z", "delta_bias")

    def bind(inputs: Inputs) -> Callable[[], Tensor]:
        call = partial(scan, *(inputs[name] for name in names), True, **settings)
        return call if direction == FORWARD else lambda: call().sum()

    return bind


def reference_scan(*tensors: Tensor, discretization: str) -> Tensor:
    """A loop over positions in PyTorch."""
    import torchkiln

    with torchkiln.backend("reference"):
        return ours("selective_scan")(*tensors, discretization=discretization)  # type: ignore[no-any-return]


def selective_scan(
    size: Size, dtype: torch.dtype, direction: str, method: str = "mamba", **options: Any
) -> Case:
    """One rule. Bytes: the inputs once, the output; in the backward their gradients too."""
    batch, dim, length, states = size
    is_both = direction == BOTH

    def make(device: torch.device) -> Work:
        sides = [
            side(
                OURS,
                lambda: scan_bind(ours("selective_scan"), direction, discretization=method),
                direction,
            )
        ]
        has_peer = device.type == "cuda" and peers.can_import(peers.SCAN_MODULE)
        if method == "mamba" and has_peer:
            sides.append(side(MAMBA, lambda: scan_bind(peers.selective_scan, direction), direction))
        plain = scan_bind(reference_scan, direction, discretization=method)
        if device.type == "cpu":
            sides.append(side(PLAIN, lambda: plain, direction))
        rows, matrices = batch * dim * length, 2 * batch * states * length
        moved = (4 * rows + matrices) + (is_both and 8 * rows + 2 * matrices)
        has_oracle = direction == FORWARD and rows * states <= MOST_STATES
        return Work(
            inputs_of(size, device, dtype, is_both),
            sides,
            oracle=oracle_of(plain) if has_oracle else None,
            floor_bytes=nbytes(dtype) * moved,
        )

    label = "x".join(map(str, size))
    return Case("selective_scan", label, name_of(dtype), direction, make, data=method, **options)


def gpu_rows() -> Iterator[Case]:
    """The peer's table, then every rule, then the longest row."""
    for (size, dtype), (forward, both) in PEER.items():
        for direction, us, aim in ((FORWARD, forward, 2), (BOTH, both, 2.5)):
            goal = (Target("baseline", 1.2, aim, MAMBA),)
            yield selective_scan(
                size, dtype, direction, targets=goal, baselines=(Baseline(MAMBA, us),), quick=True
            )
    for method in METHODS[1:]:
        for direction in (FORWARD, BOTH):
            for dtype in (F32, F16):
                yield selective_scan((8, 768, 1024, 16), dtype, direction, method, quick=True)
    for direction in (FORWARD, BOTH):
        yield selective_scan((1, 1536, 262_144, 16), BF16, direction, quick=True)
        yield selective_scan((1, 64, 262_144, 16), BF16, direction)
        yield selective_scan((4096, 256, 16, 16), BF16, direction)


def cpu_rows(threads: int) -> Iterator[Case]:
    """Against a loop in PyTorch."""
    goal = (Target("speedup", 50, 150, PLAIN),)
    yield selective_scan(
        (1, 1536, 2048, 16), F32, FORWARD, device="cpu", threads=threads, quick=True, targets=goal
    )
    yield selective_scan(
        (1, 1536, 2048, 16), F32, FORWARD, "foh", device="cpu", threads=threads, quick=True
    )
    yield selective_scan((1, 1536, 2048, 16), F32, BOTH, device="cpu", threads=threads, quick=True)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small."""
    for direction in (FORWARD, BOTH):
        yield selective_scan((1, 8, 33, 4), F32, direction, "foh", device="cpu", quick=True)


GPU_TABLES = (gpu_rows,)
