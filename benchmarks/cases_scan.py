"""Rows of the selective scan. mamba-ssm runs beside it where its extension module is.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import data, plain
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
    SEED,
    Baseline,
    Case,
    Target,
    name_of,
    nbytes,
    ours,
)
from benchmarks.harness import Call, Inputs, Side, Work
from torchkiln import backend

NAMES = ("input", "delta", "A", "B", "C", "D", "z", "delta_bias")
METHODS = ("mamba", "zoh", "foh", "bilinear", "tustin", "poly", "highorder", "rk4", "rk4_constant")

# The reference has a number for each batch, channel, position and state, in float64.
MOST_STATES = 2**27
# Batch, channels, length, states.
Size = tuple[int, int, int, int]
SIZE = (8, 768, 1024, 16)
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
    """Those of the workload and, for a backward, the gradient of the output."""
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
    inputs = {name: value.requires_grad_(grad) for name, value in inputs.items()}
    if grad:
        shape = inputs["input"].shape
        inputs["grad"] = data.normal(shape, SEED).to(device, dtype, copy=True)
    return inputs


def differentiated(scan: Callable[..., Tensor], inputs: Inputs, direction: str) -> Call:
    """The call of one direction; the output and the gradients of all inputs are its result."""
    leaves = [inputs[name] for name in NAMES]
    if direction == FORWARD:
        return partial(scan, *leaves)

    def both() -> tuple[Tensor, ...]:
        out = scan(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs["grad"])

    return both


def native(method: str, true_time: bool, deterministic: bool) -> Callable[..., Tensor]:
    """Our operator."""
    return partial(
        ours("selective_scan"),
        delta_softplus=True,
        discretization=method,
        true_time=true_time,
        deterministic=deterministic,
    )


def by_reference(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same call, by the definition."""

    def call(*tensors: Tensor) -> Tensor:
        with backend("reference"):
            return scan(*tensors)

    return call


def selective_scan(
    size: Size,
    dtype: torch.dtype,
    direction: str,
    method: str = "mamba",
    true_time: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> Case:
    """One rule. Bytes: the inputs once, the output; in the backward their gradients too."""
    batch, dim, length, states = size
    is_both = direction == BOTH

    def make(device: torch.device) -> Work:
        own = native(method, true_time, deterministic)
        functions: dict[str, Callable[..., Tensor]] = {OURS: own}
        if method == "mamba" and not deterministic:
            if device.type == "cuda" and peers.can_import(peers.SCAN_MODULE):
                functions[MAMBA] = partial(peers.selective_scan, delta_softplus=True)
            if device.type == "cpu":
                functions[PLAIN] = plain.selective_scan
        rows, matrices = batch * dim * length, 2 * batch * states * length
        moved = (4 * rows + matrices) + (is_both and 8 * rows + 2 * matrices)
        has_oracle = direction == FORWARD and rows * states <= MOST_STATES
        return Work(
            inputs_of(size, device, dtype, is_both),
            [
                Side(name, partial(differentiated, function, direction=direction))
                for name, function in functions.items()
            ],
            oracle=(lambda i: differentiated(by_reference(own), i, FORWARD)())
            if has_oracle
            else None,
            floor_bytes=nbytes(dtype) * moved,
        )

    label = "x".join(map(str, size))
    notes = {"true time": true_time, "deterministic": deterministic}
    name = ", ".join([method, *(note for note, is_so in notes.items() if is_so)])
    return Case("selective_scan", label, name_of(dtype), direction, make, data=name, **options)


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
                yield selective_scan(SIZE, dtype, direction, method, quick=True)
    for method in ("poly", "highorder"):
        for direction in (FORWARD, BOTH):
            yield selective_scan(SIZE, F32, direction, method, true_time=True, quick=True)
    for dtype in (F32, F16):
        yield selective_scan(SIZE, dtype, BOTH, deterministic=True, quick=True)
    for direction in (FORWARD, BOTH):
        yield selective_scan((1, 1536, 262_144, 16), BF16, direction, quick=True)
        yield selective_scan((1, 64, 262_144, 16), BF16, direction)
        yield selective_scan((4096, 256, 16, 16), BF16, direction)


def cpu_rows(threads: int) -> Iterator[Case]:
    """Against a loop in PyTorch; goals.py says what all threads must reach."""
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    size = (1, 1536, 2048, 16)
    for direction in (FORWARD, BOTH):
        yield selective_scan(size, F32, direction, **options)
    yield selective_scan(size, F32, FORWARD, "foh", **options)


def tiny_rows() -> Iterator[Case]:
    """Every form once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    for direction in (FORWARD, BOTH):
        for method in ("mamba", "foh"):
            yield selective_scan((2, 8, 33, 4), F32, direction, method, **options)
    yield selective_scan((2, 8, 33, 4), F32, BOTH, deterministic=True, **options)
    yield selective_scan((2, 8, 33, 4), F32, FORWARD, "highorder", true_time=True, **options)


GPU_TABLES = (gpu_rows,)
