"""Rows of corner pooling, polygons and segmentation.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks import mmcv_sides as peers
from benchmarks.cases import (
    BACKWARD,
    F16,
    F32,
    FLOOR,
    FORWARD,
    MMCV,
    OURS,
    PARITIES,
    PLAIN,
    SEED,
    Baseline,
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
from benchmarks.mmcv_sides import PeerCall, by_name, mmcv_sides

# --- corner_pool --------------------------------------------------------------------------------


def plain_corner_pool(input: Tensor, mode: str) -> Tensor:
    """What mmcv does: a cumulative maximum of a flipped map."""
    dim = 2 if mode in ("top", "bottom") else 3
    if mode in ("bottom", "right"):
        return torch.cummax(input, dim).values
    return torch.cummax(input.flip(dim), dim).values.flip(dim)


def corner_pool(
    shape: tuple[int, int, int, int],
    mode: str,
    direction: str = FORWARD,
    dtype: torch.dtype = F32,
    layout: str = "NCHW",
    **options: Any,
) -> Case:
    """One direction; the backward must read the map and its gradient, and write one."""
    names = ("input",)

    def make(device: torch.device) -> Work:
        features = data.normal(shape, SEED).to(device, dtype, copy=True)
        if layout == "channels_last":
            features = features.to(memory_format=torch.channels_last)
        inputs: Inputs = {"input": features.requires_grad_(direction == BACKWARD)}
        if direction == BACKWARD:
            inputs["grad"] = data.normal(shape, SEED + 1).to(device, dtype, copy=True)
        answer = bound(plain_corner_pool, names, mode)
        return Work(
            inputs,
            [
                side(OURS, lambda: bound(ours("corner_pool"), names, mode), direction),
                side(PLAIN, lambda: answer, direction),
                *mmcv_sides(lambda ops, i: partial(ops.CornerPool(mode), i["input"]), direction),
            ],
            oracle=oracle_of(answer, direction),
            floor_bytes=(2 if direction == FORWARD else 3) * nbytes(dtype) * features.numel(),
        )

    size = f"{'x'.join(map(str, shape))}, {mode}"
    return Case("corner_pool", size, name_of(dtype), direction, make, layout=layout, **options)


def corner_pool_rows() -> Iterator[Case]:
    """CornerNet's heads in every direction, then other dtypes, layouts and sizes."""
    sizes = workload("corner_pool", "top")
    shape = sizes["images"], sizes["channels"], sizes["height"], sizes["width"]
    goals = (Target("baseline", 3, 5, MMCV), FLOOR)
    yield corner_pool(shape, "top", targets=goals, baselines=(Baseline(MMCV, 136.0),), quick=True)
    for mode in ("bottom", "left", "right"):
        yield corner_pool(shape, mode, targets=(FLOOR,), quick=True)
    for mode in ("top", "left"):
        yield corner_pool(shape, mode, BACKWARD, targets=(FLOOR,), quick=True)
        for layout in ("NCHW", "channels_last"):
            yield corner_pool(shape, mode, FORWARD, F16, layout)
            yield corner_pool(shape, mode, BACKWARD, F16, layout)
        yield corner_pool(shape, mode, FORWARD, F32, "channels_last")
        yield corner_pool((2, 128, 64, 64), mode)
        yield corner_pool((1, 100, 37, 53), mode)
        yield corner_pool((1, 64, 512, 512), mode)


# --- polygons and regions -----------------------------------------------------------------------


def of_workload(
    operator: str,
    name: str,
    names: tuple[str, ...],
    size: str,
    written: int,
    sizes: dict[str, int] | None = None,
    dtype: torch.dtype = F32,
    peer: PeerCall | None = None,
    **options: Any,
) -> Case:
    """The arguments of a workload; `names` are its tensors, `written` the bytes of the result."""

    def make(device: torch.device) -> Work:
        (found,) = (w for w in PARITIES[operator].workloads if w.name == name)
        arguments = found.arguments({**found.sizes, **(sizes or {})}, dtype, "contiguous", device)
        rest = {key: value for key, value in arguments.items() if key not in names}
        inputs: Inputs = {key: arguments[key] for key in names}
        read = sum(value.numel() * value.element_size() for value in inputs.values())

        def bind(i: Inputs) -> Any:
            return partial(ours(operator), **{key: i[key] for key in names}, **rest)

        def call(ops: Any, i: Inputs) -> Any:
            assert peer is not None
            return peer(ops, {**i, **rest})

        sides = [side(OURS, lambda: bind), *mmcv_sides(peer and call, synchronises=True)]
        return Work(inputs, sides, floor_bytes=read + written)

    return Case(operator, size, name_of(dtype), FORWARD, make, **options)


def convex_iou(n: int, m: int, dtype: torch.dtype = F32, **options: Any) -> Case:
    """Points of a dense detector against the objects of an image."""
    return of_workload(
        "convex_iou",
        "dense",
        ("pointsets", "polygons"),
        f"{n}x{m}",
        nbytes(dtype) * n * m,
        {"n": n, "m": m},
        dtype,
        by_name("convex_iou", "pointsets", "polygons"),
        **options,
    )


def convex_giou(n: int, **options: Any) -> Case:
    """Value and gradient of pairs that overlap."""
    names = ("pointsets", "polygons")
    written = 4 * 19 * n
    peer, sizes = by_name("convex_giou", *names), {"n": n}
    return of_workload(
        "convex_giou", "positives", names, f"{n} pairs", written, sizes, peer=peer, **options
    )


def min_area_polygons(n: int, **options: Any) -> Case:
    """Nine points each."""
    names = ("pointsets",)
    peer, sizes, written = by_name("min_area_polygons", *names), {"n": n}, 4 * 8 * n
    return of_workload(
        "min_area_polygons", "dense", names, f"{n} pointsets", written, sizes, peer=peer, **options
    )


def points_in_polygons(n: int, m: int, dtype: torch.dtype = F32, **options: Any) -> Case:
    """Points of a dense detector in the objects of an image; a byte a pair is written."""
    return of_workload(
        "points_in_polygons",
        "dense",
        ("points", "polygons"),
        f"{n}x{m}",
        n * m,
        {"points": n, "polygons": m},
        dtype,
        **options,
    )


def contour_expand(side: int, masks: int, **options: Any) -> Case:
    """PSENet's maps."""
    sizes = {"masks": masks, "height": side, "width": side}
    size = f"{side}x{side}, {masks} masks"
    written = 4 * side * side
    names, peer = ("masks", "labels"), peers.contour_expand
    return of_workload(
        "contour_expand", "psenet", names, size, written, sizes, peer=peer, **options
    )


def pixel_group(side: int, **options: Any) -> Case:
    """PAN's maps."""
    names = ("scores", "mask", "embeddings", "labels", "contour")
    sizes = {"height": side, "width": side}
    written = 4 * side * side
    size, peer = f"{side}x{side}", peers.pixel_group
    return of_workload("pixel_group", "pan", names, size, written, sizes, peer=peer, **options)


def polygon_rows() -> Iterator[Case]:
    """Dense detectors of rotated objects, then others."""
    yield convex_iou(21_824, 100, quick=True)
    yield convex_iou(21_824, 100, F16)
    yield convex_iou(2000, 37)
    yield convex_giou(4096, quick=True)
    yield convex_giou(100)
    yield min_area_polygons(21_824, quick=True)
    yield min_area_polygons(1000)
    yield points_in_polygons(21_824, 100, quick=True)
    yield points_in_polygons(21_824, 100, F16)
    yield points_in_polygons(2000, 37)


def region_rows() -> Iterator[Case]:
    """Detectors of text, then others."""
    yield contour_expand(736, 7, quick=True)
    yield contour_expand(184, 7)
    yield pixel_group(184, quick=True)
    yield pixel_group(736)


# --- the tables ---------------------------------------------------------------------------------


def cpu_rows(threads: int) -> Iterator[Case]:
    """Ours against PyTorch's."""
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    for mode in ("top", "left"):
        for direction in (FORWARD, BACKWARD):
            yield corner_pool((2, 64, 128, 128), mode, direction, **options)
    yield convex_iou(2000, 100, **options)
    yield convex_giou(4096, **options)
    yield min_area_polygons(21_824, **options)
    yield points_in_polygons(21_824, 100, **options)
    yield contour_expand(736, 7, **options)
    yield pixel_group(184, **options)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    for direction in (FORWARD, BACKWARD):
        yield corner_pool((1, 2, 9, 11), "left", direction, **options)
    yield convex_iou(20, 6, **options)
    yield convex_giou(9, **options)
    yield min_area_polygons(20, **options)
    yield points_in_polygons(20, 6, **options)
    yield contour_expand(130, 3, **options)
    yield pixel_group(130, **options)


GPU_TABLES = (corner_pool_rows, polygon_rows, region_rows)
