"""Rows of what stands around a selective scan. causal-conv1d and mamba-ssm run where they are.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import data
from benchmarks import peer_sides as peers
from benchmarks.cases import (
    BACKWARD,
    BF16,
    CONV,
    F16,
    F32,
    FLOOR,
    FORWARD,
    MAMBA,
    OURS,
    PLAIN,
    SEED,
    Bind,
    Case,
    Target,
    bound,
    name_of,
    nbytes,
    oracle_of,
    ours,
    side,
    workload,
)
from benchmarks.harness import Inputs, Work

# --- causal_conv1d ------------------------------------------------------------------------------


def plain_conv(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a model without the extension does."""
    width, length = weight.shape[1], input.shape[2]
    out = functional.conv1d(input, weight[:, None], bias, padding=width - 1, groups=input.shape[1])
    return functional.silu(out[..., :length])


def has_peer(device: torch.device, module: str) -> bool:
    """Whether a peer runs beside ours."""
    return device.type == "cuda" and peers.can_import(module)


def causal_conv1d(
    shape: tuple[int, int, int],
    width: int,
    dtype: torch.dtype,
    direction: str = FORWARD,
    layout: str = "rows",
    **options: Any,
) -> Case:
    """With bias and silu; the backward must read x and its gradient, and write one."""
    names = ("input", "weight", "bias")

    def make(device: torch.device) -> Work:
        x = data.normal(shape, SEED).to(device, dtype, copy=True)
        if layout == "columns":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        inputs: Inputs = {
            "input": x.requires_grad_(direction == BACKWARD),
            "weight": data.normal((shape[1], width), SEED + 1).to(device, dtype),
            "bias": data.normal(shape[1:2], SEED + 2).to(device, dtype),
        }
        if direction == BACKWARD:
            inputs["grad"] = data.normal(shape, SEED + 3).to(device, dtype)
        answer = bound(plain_conv, names)
        own = bound(partial(ours("causal_conv1d_fn"), activation="silu"), names)
        sides = [side(OURS, lambda: own, direction), side(PLAIN, lambda: answer, direction)]
        if has_peer(device, peers.CONV_MODULE) and width in peers.CONV_WIDTHS:
            sides.append(side(CONV, lambda: bound(peers.causal_conv1d, names), direction))
        return Work(
            inputs,
            sides,
            oracle=oracle_of(answer, direction),
            floor_bytes=(2 if direction == FORWARD else 3) * nbytes(dtype) * x.numel(),
        )

    size = f"{'x'.join(map(str, shape))}, width {width}"
    return Case("causal_conv1d_fn", size, name_of(dtype), direction, make, layout=layout, **options)


def conv_rows() -> Iterator[Case]:
    """Mamba-130M's layer in both layouts, then Vision Mamba's and odd ones."""
    sizes = workload("causal_conv1d", "rows")
    shape = sizes["batch"], sizes["channels"], sizes["length"]
    for direction in (FORWARD, BACKWARD):
        for layout in ("rows", "columns"):
            for dtype in (F32, BF16):
                goals = (FLOOR, Target("speedup", 1, 1.2, CONV))
                yield causal_conv1d(shape, 4, dtype, direction, layout, targets=goals, quick=True)
        yield causal_conv1d((128, 384, 197), 4, F16, direction)
        yield causal_conv1d((1, 1536, 65_536), 4, BF16, direction)
        yield causal_conv1d((8, 768, 1024), 9, F32, direction)


# --- decoding -----------------------------------------------------------------------------------


def plain_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor,
) -> Tensor:  # fmt: skip
    """What a model without the extension does."""
    dt = functional.softplus(dt + dt_bias)[..., None]
    state.copy_(state * torch.exp(dt * A) + dt * x[..., None] * B[:, None])
    out = (state * C[:, None].to(state.dtype)).sum(-1) + D * x
    return (out * functional.silu(z)).to(x.dtype)


def state_update(
    batch: int, dtype: torch.dtype, rule: str = "mamba", channels: int = 1536, **options: Any
) -> Case:
    """One position; the state must be read and written."""
    states = 16

    def make(device: torch.device) -> Work:
        def normal(*shape: int) -> Tensor:
            return data.normal(shape, SEED + len(inputs)).to(device, dtype)

        inputs: Inputs = {}
        inputs["state"] = normal(batch, channels, states).float()
        inputs["x"] = normal(batch, channels)
        inputs["dt"] = normal(batch, channels)
        inputs["A"] = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
        inputs["B"], inputs["C"] = normal(batch, states), normal(batch, states)
        inputs["D"] = torch.ones(channels, device=device)
        inputs["z"] = normal(batch, channels)
        # mamba-ssm's function fails without it.
        inputs["dt_bias"] = torch.full((channels,), -4.0, device=device)
        names = tuple(inputs)
        plain = bound(plain_state_update, names)

        def own(i: Inputs) -> Callable[[], Any]:
            step = partial(ours("selective_state_update"), dt_softplus=True, discretization=rule)
            if rule != "mamba":
                nothing = i["x"].new_empty(batch, channels, 0)
                history = ours("scan_history")(nothing, i["B"][..., None][..., :0], rule)
                step = partial(step, history=history)
            return partial(step, *(i[name] for name in names))

        sides = [side(OURS, lambda: own)]
        if rule == "mamba":
            sides.append(side(PLAIN, lambda: plain))
            if has_peer(device, peers.STATE_UPDATE_MODULE):
                sides.append(side(MAMBA, lambda: bound(peers.selective_state_update(), names)))
        moved = 8 * inputs["state"].numel() + 4 * nbytes(dtype) * inputs["x"].numel()
        return Work(inputs, sides, floor_bytes=moved)

    size = f"{batch}x{channels}x{states}"
    options = {"data": rule, **options}
    return Case("selective_state_update", size, name_of(dtype), FORWARD, make, **options)


def conv_update(batch: int, dtype: torch.dtype, channels: int = 1536, **options: Any) -> Case:
    """One position of the convolution."""
    width = 4

    def make(device: torch.device) -> Work:
        inputs: Inputs = {
            "x": data.normal((batch, channels), SEED).to(device, dtype),
            "conv_state": data.normal((batch, channels, width), SEED + 1).to(device, dtype),
            "weight": data.normal((channels, width), SEED + 2).to(device, dtype),
            "bias": data.normal((channels,), SEED + 3).to(device, dtype),
        }
        names = tuple(inputs)
        own: Bind = bound(partial(ours("causal_conv1d_update"), activation="silu"), names)
        moved = nbytes(dtype) * (2 * inputs["conv_state"].numel() + 2 * inputs["x"].numel())
        sides = [side(OURS, lambda: own)]
        if has_peer(device, peers.CONV_MODULE):
            sides.append(side(CONV, lambda: bound(peers.causal_conv1d_update, names)))
        return Work(inputs, sides, floor_bytes=moved)

    size = f"{batch}x{channels}, width {width}"
    return Case("causal_conv1d_update", size, name_of(dtype), FORWARD, make, **options)


def decode_rows() -> Iterator[Case]:
    """From one sequence to many."""
    for batch in (1, 64, 256):
        for dtype in (F32, BF16):
            goals = (Target("speedup", 1, 1.5, MAMBA),)
            yield state_update(batch, dtype, targets=goals, quick=True)
        yield conv_update(batch, BF16, quick=True)
    for rule in ("zoh", "foh", "bilinear", "highorder", "rk4"):
        yield state_update(64, BF16, rule)


# --- the tables ---------------------------------------------------------------------------------


def cpu_rows(threads: int) -> Iterator[Case]:
    """Ours against PyTorch's."""
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    goal = (Target("speedup", 1, 2, PLAIN),)
    for direction in (FORWARD, BACKWARD):
        for layout in ("rows", "columns"):
            size = (1, 1536, 2048)
            yield causal_conv1d(size, 4, F32, direction, layout, targets=goal, **options)
    yield state_update(8, F32, targets=goal, **options)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    for direction in (FORWARD, BACKWARD):
        yield causal_conv1d((2, 8, 13), 4, F32, direction, **options)
    yield state_update(2, F32, channels=8, **options)
    yield state_update(2, F32, "foh", channels=8, **options)
    yield conv_update(2, F32, 8, **options)


GPU_TABLES = (conv_rows, decode_rows)
