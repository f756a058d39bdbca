"""Rows of deformable aggregation: a ring of cameras, points all over all images, and a map head.

The peers are SparseDrive's extension, which is a side where it can be imported, and the sequence
around grid_sample that the same project falls back to. Both were measured together on another H200:
where the extension is no side, its time there is scaled by grid_sample's, which every row has.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import data
from benchmarks import peer_sides as peers
from benchmarks.cases import (
    BF16,
    BOTH,
    F16,
    F32,
    FORWARD,
    OURS,
    PARITIES,
    SEED,
    SPARSEDRIVE,
    Baseline,
    Case,
    Target,
    name_of,
    nbytes,
    ours,
)
from benchmarks.harness import Call, Inputs, Side, Work, on_default_stream
from torchkiln import backend

OPERATOR = "deformable_aggregation"
GRID_SAMPLE = "grid_sample"
DETECTION, MAP = (900, 13), (100, 300)

# Microseconds of SparseDrive ec0225d's extension and of its fallback in float32, forward and
# forward + backward, by scene, images, queries and points (another H200, torch 2.11).
TABLE = {
    ("ring", 1, DETECTION): {FORWARD: (556, 1318), BOTH: (2420, 3443)},
    ("ring", 6, DETECTION): {FORWARD: (3280, 6622), BOTH: (14439, 20721)},
    ("ring", 1, MAP): {FORWARD: (1405, 2629), BOTH: (5816, 7849)},
    ("uniform", 1, DETECTION): {FORWARD: (750, 1352), BOTH: (12666, 5729)},
    ("uniform", 6, DETECTION): {FORWARD: (4436, 7400), BOTH: (75731, 32935)},
    ("uniform", 1, MAP): {FORWARD: (4185, 3423), BOTH: (34899, 14846)},
}
# What must be reached and what is aimed at, against the extension.
GOALS = {
    ("ring", 6, DETECTION): {FORWARD: (5, 10), BOTH: (4, 8)},
    ("ring", 1, MAP): {FORWARD: (4, 8), BOTH: (4, 8)},
}
# Against grid_sample, where that is the better peer.
GOALS_OF_GRID_SAMPLE = {("uniform", 6, DETECTION): {BOTH: (5, 8)}}
# Where float16 is compared with float32.
OF_HALF = (("ring", 6, DETECTION), ("uniform", 6, DETECTION), ("ring", 1, MAP))

Scene = tuple[str, int, tuple[int, int]]


def targets_of(scene: Scene, direction: str, memory: int) -> tuple[Target, ...]:
    """Those of a float32 row; `memory` is that of outputs and gradients."""
    found = []
    if direction in GOALS_OF_GRID_SAMPLE.get(scene, {}):
        found = [Target("speedup", *GOALS_OF_GRID_SAMPLE[scene][direction], GRID_SAMPLE)]
    if direction in GOALS.get(scene, {}):
        found.append(Target("baseline", *GOALS[scene][direction], SPARSEDRIVE))
    if direction == BOTH and found:
        found.append(Target("memory", 0.1 * memory, 0.03 * memory))
    return tuple(found)


def grid_sample(levels: list[Tensor], location: Tensor, weights: Tensor) -> Tensor:
    """The published fallback: all samples of all maps, then two sums."""
    batch, queries, points, cameras = location.shape[:4]
    grid = (2 * location - 1).movedim(3, 1).flatten(0, 1)
    each = [F.grid_sample(x.flatten(0, 1), grid, align_corners=False) for x in levels]
    groups = weights.shape[-1]
    shape = (batch, cameras, len(levels), groups, -1, queries, points)
    # Query, point, camera, level, group, channel.
    samples = torch.stack(each, 1).reshape(shape).permute(0, 5, 6, 1, 2, 3, 4)
    return (samples * weights[..., None]).sum((3, 4)).sum(2).flatten(2)


def levels_of(inputs: Inputs) -> list[Tensor]:
    """The levels among the inputs; each stands by itself, because the harness copies tensors."""
    return [value for name, value in inputs.items() if name.startswith("level ")]


def native(form: str, options: Mapping[str, Any]) -> Callable[[Inputs], Tensor]:
    """Our operator, on the one tensor or on the levels."""
    function = ours(OPERATOR)

    def call(i: Inputs) -> Tensor:
        indices = (i["shapes"], i["starts"]) if form == "one" else ()
        maps = i["features"] if form == "one" else levels_of(i)
        output: Tensor = function(maps, i["location"], i["weights"], *indices, **options)
        return output

    return call


def by_reference(call: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """The same call, by the definition."""

    def run(inputs: Inputs) -> Tensor:
        with backend("reference"):
            return call(inputs)

    return run


def differentiated(call: Callable[[Inputs], Tensor], inputs: Inputs, direction: str) -> Call:
    """The call of one direction; gradients of maps, places and weights."""
    if direction == FORWARD:
        return lambda: call(inputs)
    maps = levels_of(inputs) or [inputs["features"]]
    leaves = [*maps, inputs["location"], inputs["weights"]]
    return lambda: torch.autograd.grad(call(inputs), leaves, inputs["grad"])


def as_levels(features: Tensor, sizes: list[tuple[int, int]], cameras: int) -> list[Tensor]:
    """(bs, M, C, H, W) views of the one tensor's rows."""
    areas = [height * width for height, width in sizes]
    parts = features.unflatten(1, (cameras, sum(areas))).split(areas, 2)
    return [x.unflatten(2, size).movedim(4, 2) for x, size in zip(parts, sizes, strict=True)]


def make_inputs(
    made: Mapping[str, Any], form: str, dtype: torch.dtype, device: torch.device, direction: str
) -> Inputs:
    """What all sides get; the peers' fallback makes its levels of it outside of the timing."""
    cameras, sizes = made["sampling_location"].shape[3], made["sizes"]
    features = made["features"].to(device, dtype, copy=True)
    shaped = [torch.empty(1, cameras, 1, *size, device=device) for size in sizes]
    _, shapes, starts = ours("feature_maps_format")(shaped)
    inputs: Inputs = {
        "location": made["sampling_location"].to(device, copy=True),
        "weights": made["weights"].to(device, dtype, copy=True),
        "shapes": shapes.clone(),
        "starts": starts.clone(),
    }
    if form == "one":
        inputs["features"] = features
    else:
        for number, level in enumerate(as_levels(features, sizes, cameras)):
            # Views of rows have neighbouring channels, but gaps between cameras.
            by_rows = level.movedim(2, 4).contiguous().movedim(4, 2)
            inputs[f"level {number}"] = by_rows if form == "channels_last" else level.contiguous()
    if direction == BOTH:
        output = (*made["sampling_location"].shape[:2], features.shape[2])
        inputs["grad"] = data.normal(output, SEED + 2).to(device, dtype, copy=True)
        for leaf in (*levels_of(inputs), inputs.get("features"), inputs["location"]):
            if leaf is not None:
                leaf.requires_grad_()
        inputs["weights"].requires_grad_()
    return inputs


def row(
    scene: Scene,
    direction: str,
    dtype: torch.dtype = F32,
    form: str = "one",
    sizes: Mapping[str, int] | None = None,
    with_targets: bool = False,
    note: str = "",
    own: Mapping[str, Any] | None = None,
    **options: Any,
) -> Case:
    """One row.

    Args:
        scene: "ring" or "uniform", images, and queries and points.
        direction: FORWARD or BOTH.
        dtype: of maps and weights; places are float32.
        form: "one" tensor, or levels "NCHW" or "channels_last".
        sizes: others than the workload's.
        with_targets: whether the issue has some for it.
        note: behind the size.
        own: arguments of our operator that the peers do not know.
        options: of `Case`.
    """
    kind, images, (queries, points) = scene
    workload = "uniform" if kind == "uniform" else "detection"
    (found,) = (w for w in PARITIES[OPERATOR].workloads if w.name == workload)
    sizes = {
        **found.sizes, "images": images, "queries": queries, "points": points, **(sizes or {})
    }  # fmt: skip
    rows = sizes["cameras"] * sum(
        max(1, sizes["height"] >> i) * max(1, sizes["width"] >> i) for i in range(sizes["levels"])
    )
    pairs = images * queries * points * sizes["cameras"]
    elements = {
        "maps": images * rows * sizes["channels"],
        "output": images * queries * sizes["channels"],
        "weights": pairs * sizes["levels"] * sizes["groups"],
    }
    memory = sum(elements.values()) * nbytes(dtype) + 8 * pairs

    def make(device: torch.device) -> Work:
        made = found.make(sizes)
        call = native(form, own or {})

        def composed(inputs: Inputs) -> Call:
            place = inputs["location"].detach()
            # It has no gate: what lies just outside an image is moved to where it sees nothing.
            seen = ((place > 0) & (place < 1)).all(-1, keepdim=True)
            place = torch.where(seen, place, 3.0).requires_grad_(direction == BOTH)
            given = {**inputs, "location": place}
            if form == "one":
                levels = as_levels(inputs["features"].detach(), made["sizes"], sizes["cameras"])
                own_levels = {
                    f"level {i}": x.contiguous().requires_grad_(direction == BOTH)
                    for i, x in enumerate(levels)
                }
                given |= own_levels

            def run(i: Inputs) -> Tensor:
                return grid_sample(levels_of(i), i["location"].to(dtype), i["weights"])

            return differentiated(run, given, direction)

        def peer(inputs: Inputs) -> Call:
            names = ("features", "shapes", "starts", "location", "weights")

            def run(i: Inputs) -> Tensor:
                return peers.deformable_aggregation(*(i[name] for name in names))

            return differentiated(run, inputs, direction)

        def as_ours(out: Any) -> Any:
            if form != "one" or direction == FORWARD:
                return out
            *maps, location, weights = out
            return [ours("feature_maps_format")(maps)[0], location, weights]

        sides = [Side(OURS, lambda i: differentiated(call, i, direction))]
        if not own:
            sides.append(Side(GRID_SAMPLE, composed, result=as_ours))
        # It computes in float32, and numbers samples with 32 bits.
        is_peers = form == "one" and dtype == F32 and not own
        is_peers &= pairs * sizes["levels"] * sizes["channels"] < 2**31
        if is_peers and device.type == "cuda" and peers.can_import(peers.AGGREGATION_MODULE):
            sides.append(on_default_stream(Side(SPARSEDRIVE, peer)))
        return Work(
            make_inputs(made, form, dtype, device, direction),
            sides,
            oracle=lambda i: differentiated(by_reference(call), i, direction)(),
            floor_bytes=memory,
        )

    size = f"{images} images, {queries} queries, {points} points{note}"
    targets = targets_of(scene, direction, memory) if with_targets else ()
    if with_targets:
        extension, composed = TABLE[scene][direction]
        options["baselines"] = (Baseline(SPARSEDRIVE, extension, composed, GRID_SAMPLE),)
    return Case(
        OPERATOR, size, name_of(dtype), direction, make, layout="" if form == "one" else form,
        data=kind, targets=targets, **options,
    )  # fmt: skip


def gpu_rows() -> Iterator[Case]:
    """The table's scenes in float32, float16 beside them; the other forms on the training batch."""
    for scene in TABLE:
        for direction in (FORWARD, BOTH):
            yield row(scene, direction, with_targets=True, quick=True)
            yield row(scene, direction, F16, quick=scene in OF_HALF)
    ring: Scene = ("ring", 6, DETECTION)
    for direction in (FORWARD, BOTH):
        for form in ("NCHW", "channels_last"):
            yield row(ring, direction, F32, form, quick=form == "channels_last")
        yield row(ring, direction, BF16)
        yield row(ring, direction, note=", softmax", own={"softmax": True})
    for scene in (ring, ("uniform", 6, DETECTION), ("ring", 1, MAP)):
        fixed = {"deterministic": True}
        yield row(scene, BOTH, note=", deterministic", own=fixed, quick=True)
    # More samples than SparseDrive's extension can number.
    yield row(("ring", 16, MAP), FORWARD)


GPU_TABLES = (gpu_rows,)


def cpu_rows(threads: int) -> Iterator[Case]:
    """A tenth of the queries, with one thread or with all (0)."""
    goal = (Target("speedup", 1, 2, GRID_SAMPLE),)
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    for direction in (FORWARD, BOTH):
        case = row(("ring", 1, (90, 13)), direction, F32, **options)
        yield Case(**{**case.__dict__, "targets": goal})


def tiny_rows() -> Iterator[Case]:
    """Every form, small: tries the harness where there is no GPU."""
    sizes = {"height": 8, "width": 12, "levels": 2, "channels": 16, "groups": 2, "cameras": 3}
    options: dict[str, Any] = {"sizes": sizes, "device": "cpu", "quick": True}
    for kind in ("ring", "uniform"):
        for direction in (FORWARD, BOTH):
            for form in ("one", "NCHW", "channels_last"):
                yield row((kind, 2, (5, 4)), direction, F32, form, **options)
    yield row(("ring", 2, (5, 4)), BOTH, own={"softmax": True}, note=", softmax", **options)
