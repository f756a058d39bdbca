"""Rows of multi-scale deformable attention: Deformable DETR's encoder and decoder.

mmcv's and deformops' times stand in a table below; both are sides, too, where they are installed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks import peer_sides as peers
from benchmarks.cases import (
    BF16,
    BOTH,
    DEFORMOPS,
    F16,
    F32,
    FORWARD,
    MMCV,
    OURS,
    SEED,
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
from benchmarks.mmcv_sides import is_built
from torchkiln import backend
from torchkiln.reference.deformable import multi_scale_deformable_attention as reference

OPERATOR = "multi_scale_deformable_attention"
COMPOSITION = "grid_sample"
FUSED, UNFUSED = f"{OPERATOR}_fused", f"{OURS}, unfused"

# By workload, images, dtype and direction: microseconds of mmcv and of the better of deformops' two
# implementations, measured together on another H200 (mmcv a8073c74b, deformops 3.0.1, torch 2.11).
PEERS = {
    ("encoder", 1, F32, FORWARD): (264, 105),
    ("encoder", 1, F32, BOTH): (1159, 735),
    ("encoder", 1, F16, FORWARD): (368, 80),
    ("encoder", 1, F16, BOTH): (3576, 933),
    ("encoder", 2, F32, FORWARD): (516, 191),
    ("encoder", 2, F32, BOTH): (2286, 1214),
    ("encoder", 2, F16, FORWARD): (730, 145),
    ("encoder", 2, F16, BOTH): (5829, 1179),
    ("encoder", 6, F32, FORWARD): (1552, 516),
    ("encoder", 6, F32, BOTH): (7171, 2972),
    ("encoder", 6, F16, FORWARD): (2190, 394),
    ("encoder", 6, F16, BOTH): (17376, 2336),
    ("decoder", 1, F32, FORWARD): (27, 26),
    ("decoder", 1, F32, BOTH): (91, 128),
}
# What must be reached against mmcv and what is aimed at.
GOALS = {
    (F32, FORWARD): (3, 5),
    (F32, BOTH): (2.5, 4),
    (F16, FORWARD): (6, 10),
    (F16, BOTH): (6, 12),
}

NAMES = {
    OPERATOR: ("value", "sampling_locations", "attention_weights"),
    FUSED: ("value", "sampling_offsets", "attention_logits"),
}
WORKLOADS = {parity.op: {w.name: w for w in parity.workloads} for parity in reference.parities()}
TINY = {"images": 1, "heads": 2, "channels": 8, "shrink": 12}


def goals(workload: str, images: int, dtype: torch.dtype, direction: str) -> dict[str, Any]:
    """Faster than mmcv by its goal, and faster than deformops."""
    found = PEERS.get((workload, images, dtype, direction))
    if found is None:
        return {}
    must, aim = GOALS[dtype, direction] if workload == "encoder" else (1, 1.4)
    targets = Target("baseline", must, aim, MMCV), Target("baseline", 1, 1.4, DEFORMOPS)
    baselines = tuple(Baseline(*named) for named in zip((MMCV, DEFORMOPS), found, strict=True))
    return {"targets": targets, "baselines": baselines, "quick": True}


def by_names(find: Callable[[], Callable[..., Tensor]]) -> Bind:
    """Passes the inputs by name."""
    function = find()
    return lambda i: partial(function, **{name: x for name, x in i.items() if name != "grad"})


def mmcv_function() -> Callable[..., Tensor]:
    """Mmcv's kernel, without its limit on the batch."""
    path = "mmcv.ops.multi_scale_deform_attn"
    apply = importlib.import_module(path).MultiScaleDeformableAttnFunction.apply

    def call(**tensors: Tensor) -> Tensor:
        return apply(*tensors.values(), 64)  # type: ignore[no-any-return]

    return call


def deformops_function(with_kernels: bool = False) -> Callable[..., Tensor]:
    """Deformops takes the same tensors, by position."""
    function = peers.deformops_attention(with_kernels)

    def call(**tensors: Tensor) -> Tensor:
        return function(*tensors.values())

    return call


def peer_functions(device: torch.device) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """What runs beside the plain form."""
    found: dict[str, Callable[[], Callable[..., Tensor]]] = {}
    if is_built():
        found[MMCV] = mmcv_function
    if device.type == "cuda" and peers.can_import(peers.DEFORMOPS_MODULE):
        found[DEFORMOPS] = deformops_function
        if peers.has_deformops_kernels():
            found[f"{DEFORMOPS}, CUDA"] = partial(deformops_function, True)
    return {**found, COMPOSITION: composition}


def composition() -> Callable[..., Tensor]:
    """What runs where there is no kernel: grid_sample, level by level."""
    path = "torchkiln.compat.mmcv._ops.multi_scale_deform_attn"
    function = importlib.import_module(path).multi_scale_deformable_attn_pytorch

    def call(**tensors: Tensor) -> Tensor:
        own = {name: value for name, value in tensors.items() if name != "level_start_index"}
        return function(*own.values())  # type: ignore[no-any-return]

    return call


def unfused(
    *,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: Tensor,
    **tensors: Tensor,
) -> Tensor:
    """What a model does around the plain form: places from centres and offsets, and a softmax."""
    sizes = spatial_shapes.flip(-1)[None, None, None, :, None]
    places = reference_points[:, :, None, :, None] + sampling_offsets / sizes
    weights = attention_logits.flatten(-2).softmax(-1).view_as(attention_logits)
    return ours(OPERATOR)(  # type: ignore[no-any-return]
        spatial_shapes=spatial_shapes,
        sampling_locations=places,
        attention_weights=weights,
        **tensors,
    )


def by_reference(operator: str) -> Callable[..., Tensor]:
    """Our operator by its definition."""

    def call(**tensors: Tensor) -> Tensor:
        with backend("reference"):
            return ours(operator)(**tensors)  # type: ignore[no-any-return]

    return call


def row(
    direction: str,
    workload: str,
    dtype: torch.dtype = F32,
    operator: str = OPERATOR,
    sizes: Mapping[str, int] | None = None,
    deterministic: bool = False,
    **options: Any,
) -> Case:
    """One row; sizes are those of the workload where none are given."""
    found = WORKLOADS[operator][workload]
    all_sizes = {**found.sizes, **(sizes or {})}
    function = partial(ours(operator), deterministic=deterministic)

    def make(device: torch.device) -> Work:
        made = found.make(all_sizes)
        inputs: Inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None, copy=True)
            for name, value in made.items()
        }
        output_shape = (*made[NAMES[operator][1]].shape[:2], made["value"].shape[2:].numel())
        if direction == BOTH:
            inputs["grad"] = data.normal(output_shape, SEED).to(device, dtype, copy=True)
            for name in NAMES[operator]:
                inputs[name].requires_grad_()
        functions: dict[str, Callable[[], Callable[..., Tensor]]] = {OURS: lambda: function}
        if operator == OPERATOR and not deterministic:
            functions |= peer_functions(device)
        if operator == FUSED:
            functions[UNFUSED] = lambda: unfused
        leaves = NAMES[operator]
        moved = sum(inputs[name].numel() for name in NAMES[operator])
        output = torch.Size(output_shape).numel()
        return Work(
            inputs,
            [
                side(name, partial(by_names, find), direction, leaves=leaves)
                for name, find in functions.items()
            ],
            oracle=oracle_of(by_names(lambda: by_reference(operator)), direction, leaves),
            # Both directions read all; the gradient reads its own and writes as much as it reads.
            floor_bytes=nbytes(dtype) * (moved + output) * (1 if direction == FORWARD else 3),
        )

    described = f"{workload}, " + ", ".join(f"{name} {n}" for name, n in all_sizes.items())
    kind = "deterministic" if deterministic else ""
    return Case(operator, described, name_of(dtype), direction, make, data=kind, **options)


def gpu_rows() -> Iterator[Case]:
    """The peers' table; then bfloat16, the fused form, the fixed order, and odd sizes."""
    for workload, images, dtype, direction in PEERS:
        options = goals(workload, images, dtype, direction)
        yield row(direction, workload, dtype, sizes={"images": images}, **options)
    for direction in (FORWARD, BOTH):
        yield row(direction, "encoder", BF16, sizes={"images": 6}, quick=True)
        yield row(direction, "decoder", F16, quick=True)
        for dtype in (F32, F16):
            yield row(direction, "encoder", dtype, FUSED, quick=True)
            yield row(direction, "decoder", dtype, FUSED)
        yield row(direction, "encoder", sizes={"channels": 30})
        yield row(direction, "encoder", sizes={"heads": 16, "channels": 16, "points": 8})
    for dtype in (F32, F16):
        yield row(BOTH, "encoder", dtype, deterministic=True, quick=True)
        yield row(BOTH, "decoder", dtype, deterministic=True, quick=True)


GPU_TABLES = (gpu_rows,)


def cpu_rows(threads: int) -> Iterator[Case]:
    """A quarter of the encoder's sides; mmcv's CPU version is the composition of grid_sample."""
    must, aim = (1, 2) if threads == 1 else (3, 6)
    options: dict[str, Any] = {
        "device": "cpu",
        "threads": threads,
        "targets": (Target("speedup", must, aim, COMPOSITION),),
        "sizes": {"images": 1, "shrink": 4},
        "quick": True,
    }
    for direction in (FORWARD, BOTH):
        yield row(direction, "encoder", **options)


def tiny_rows() -> Iterator[Case]:
    """Both forms, small: tries the harness where there is no GPU."""
    for operator in NAMES:
        for direction in (FORWARD, BOTH):
            options: dict[str, Any] = {"device": "cpu", "quick": True}
            yield row(direction, "encoder", F32, operator, TINY, **options)
            yield row(direction, "decoder", F32, operator, {**TINY, "queries": 9}, **options)
