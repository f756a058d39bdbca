"""Deformable aggregation in plain PyTorch: grid_sample on each level, as Sparse4D without CUDA.

Other than there, a point that a camera does not see adds nothing, as in the CUDA version.

Source: Lin et al., "Sparse4D v2: Recurrent Temporal Fusion with Sparse Model", 2023, section 3.3.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["deformable_aggregation"]

_OP = "deformable_aggregation"


def deformable_aggregation(
    feature_maps: Tensor | Sequence[Tensor],
    sampling_location: Tensor,
    weights: Tensor,
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    camera_first: bool = False,
    softmax: bool = False,
    wide_output: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Samples each map by grid_sample, and sums.

    Args:
        feature_maps: (bs, N, C); or the levels, (bs, M, C, H, W) each.
        sampling_location: (bs, Q, P, M, 2).
        weights: (bs, Q, P, M, L, G); (bs, Q, M, L, P, G) with `camera_first`.
        spatial_shape: (M, L, 2) height and width of each map in the one tensor; None for levels.
        scale_start_index: (M, L) its first row; None for levels.
        camera_first: see `weights`.
        softmax: whether weights are logits.
        wide_output: whether half types give float32.
        deterministic: makes no difference.

    Returns:
        (bs, Q, C), and an empty tensor in place of the normalizer, which no gradient needs here.
    """
    first = feature_maps if isinstance(feature_maps, Tensor) else feature_maps[0]
    dtype = first.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights, location = weights.to(wide), sampling_location.to(wide)
    if camera_first:
        weights = weights.movedim(4, 2)
    if softmax:
        weights = weights.flatten(2, 4).softmax(2).reshape(weights.shape)
    batch, queries, _, cameras, levels, groups = weights.shape
    channels = first.shape[2]
    seen = ((location > 0) & (location < 1)).all(-1)
    grid = 2 * torch.where(seen[..., None], location, 0.5) - 1
    total = weights.new_zeros(batch, queries, groups, channels // groups)
    for camera in range(cameras):
        for level in range(levels):
            map = _map(feature_maps, spatial_shape, scale_start_index, camera, level).to(wide)
            if map.numel() == 0:
                continue
            sampled = F.grid_sample(map, grid[:, :, :, camera], align_corners=False)
            sampled = sampled.movedim(1, 3).unflatten(3, (groups, -1))
            terms = sampled * weights[:, :, :, camera, level, :, None]
            inside = seen[:, :, :, camera, None, None]
            total = total + torch.where(inside, terms, 0.0).sum(2)
    result = total.flatten(2)
    return result if wide_output else result.to(dtype), result.new_empty(0)


def _map(
    feature_maps: Tensor | Sequence[Tensor],
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    camera: int,
    level: int,
) -> Tensor:
    """(bs, C, H, W) of one camera and level."""
    if spatial_shape is None or scale_start_index is None:
        return feature_maps[level][:, camera]
    assert isinstance(feature_maps, Tensor)
    height, width = spatial_shape[camera, level].tolist()
    first = int(scale_start_index[camera, level])
    rows = feature_maps[:, first : first + height * width]
    pixels: Tensor = rows.unflatten(1, (height, width))
    return pixels.movedim(3, 1)


# ---- cases ----


_Sizes = tuple[tuple[tuple[int, int], ...], ...]


def _made_indices(sizes: _Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shapes and first rows of the maps."""
    shapes = torch.tensor(sizes, dtype=torch.int64, device=device).reshape(len(sizes), -1, 2)
    areas = [height * width for camera in sizes for height, width in camera]
    starts = [sum(areas[:i]) for i in range(len(areas))]
    return shapes, torch.tensor(starts, dtype=torch.int64, device=device).reshape(len(sizes), -1)


_kept_indices = functools.cache(_made_indices)


def _indices(sizes: _Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept where they are real tensors: a graph that is captured makes none of lists."""
    is_plain = (
        all(type(side) is int for camera in sizes for level in camera for side in level)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )
    return (_kept_indices if is_plain else _made_indices)(sizes, device)


def _arrange(
    features: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
    sizes: Sequence[tuple[int, int]],
    form: str = "one",
    **options: Any,
) -> dict[str, Any]:
    """The rows of all cameras, in the form that is tried: they are differentiated as one tensor.

    In the form "shared", all cameras have the maps of the first; the rows of others are no map's.
    """
    cameras = sampling_location.shape[3] if sampling_location.dim() == 5 else 1
    points = {"sampling_location": sampling_location, "weights": weights}
    if not all(isinstance(size, tuple) and min(size) > 0 for size in sizes):
        raise ValueError(f"{_OP}: sizes must be heights and widths; got {sizes}")
    areas = [height * width for height, width in sizes]
    if features.dtype == torch.float64:
        options.pop("output_dtype", None)  # only half types may give float32
    if form in ("one", "shared"):
        shapes, starts = _indices((tuple(sizes),) * cameras, features.device)
        if form == "shared":
            starts = starts[:1].expand_as(starts)
        own = {"spatial_shape": shapes, "scale_start_index": starts}
        return {"feature_maps": features, **points, **own, **options}
    if features.dim() != 3 or features.shape[1] != cameras * sum(areas):
        raise ValueError(f"{_OP}: features must have the rows of all maps; got {features.shape}")
    parts = features.unflatten(1, (cameras, sum(areas))).split(areas, 2)
    levels = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
    if form == "channels_last":
        levels = [level.contiguous().movedim(4, 2) for level in levels]
    else:
        levels = [level.movedim(4, 2).contiguous() for level in levels]
    return {"feature_maps": levels, **points, **options}


def _arguments(
    new: Inputs,
    queries: int = 5,
    points: int = 3,
    cameras: int = 3,
    channels: int = 16,
    groups: int = 2,
    sizes: Sequence[tuple[int, int]] = ((6, 9), (3, 4)),
    **options: Any,
) -> dict[str, Any]:
    rows = cameras * sum(height * width for height, width in sizes)
    order = options.get("weights_order", "pmlg")
    lengths = {"p": points, "m": cameras, "l": len(sizes), "g": groups}
    shape = [lengths[axis] for axis in order]
    # On a grid that every dtype can hold: places, unlike values, must not be rounded apart.
    location = new.uniform(2, queries, points, cameras, 2, low=-0.25, high=1.25)
    location = (location * 64 + 0.5).floor().add(0.3125).div(64).bfloat16().double()
    return {
        "features": new.normal(2, rows, channels),
        "sampling_location": location,
        "weights": new.normal(2, queries, *shape),
        "sizes": list(sizes),
        "deterministic": True,
        **options,
    }


def _edges(new: Inputs) -> dict[str, Any]:
    """Points on the border of the image, beside it, nowhere, and in the first and last pixels."""
    nan, inf = math.nan, math.inf
    places = [[0, 0.5], [1, 0.5], [0.5, 0], [0.5, 1], [nan, 0.5], [0.5, nan], [inf, 0.5]]
    places += [[-inf, 0.5], [0.015625, 0.015625], [0.984375, 0.984375], [0.5, 0.984375]]
    arguments = _arguments(new, queries=1, points=len(places), cameras=1, sizes=[(4, 5), (1, 1)])
    location = torch.tensor(places, dtype=torch.float64).reshape(1, 1, len(places), 1, 2)
    return {**arguments, "sampling_location": location.expand(2, -1, -1, -1, -1).clone()}


def _one_place(new: Inputs) -> dict[str, Any]:
    """More samples in one place than a block sorts in shared memory."""
    arguments = _arguments(new, 8, 300, 1, 2, 1, sizes=[(5, 6)])
    return {**arguments, "sampling_location": torch.full((2, 8, 300, 1, 2), 0.40625).double()}


def _nobody_sees(new: Inputs) -> dict[str, Any]:
    arguments = _arguments(new)
    return {**arguments, "sampling_location": arguments["sampling_location"] + 2}


def parity() -> Parity:
    """What deformable_aggregation is tried on."""
    return Parity(
        op="deformable_aggregation",
        tier="B",
        fuzz=_fuzz,
        arrange=_arrange,
        differentiable=("features", "sampling_location", "weights"),
        cases=(
            Case("typical", _arguments),
            Case("levels", lambda new: _arguments(new, form="contiguous")),
            Case("levels_channels_last", lambda new: _arguments(new, form="channels_last")),
            Case("softmax", lambda new: _arguments(new, softmax=True, weights_order="mlpg")),
            Case("camera_first", lambda new: _arguments(new, weights_order="mlpg")),
            # More pairs than a block looks at, more channels than it sums, more taps than it lists.
            Case(
                "many_points",
                lambda new: _arguments(new, 2, 150, 2, 40, 1, softmax=True, sizes=[(5, 7)] * 3),
            ),
            # More samples around a pixel than a block of the maps' gradient keeps for itself.
            Case("crowded", lambda new: _arguments(new, 8, 200, 2, 8, 1, sizes=[(3, 4), (2, 3)])),
            # The same of many queries with few points each.
            Case(
                "crowded_queries",
                lambda new: _arguments(new, 120, 4, 2, 8, 1, sizes=[(3, 4), (2, 3)]),
            ),
            Case("one_place", _one_place),
            Case("shared_maps", lambda new: _arguments(new, form="shared")),
            Case("wide", lambda new: _arguments(new, 3, 4, 2, 264, 3, form="channels_last")),
            Case("wide_output", lambda new: _arguments(new, output_dtype=torch.float32)),
            Case("a_group_a_channel", lambda new: _arguments(new, channels=6, groups=6)),
            Case("odd", lambda new: _arguments(new, channels=15, groups=5, softmax=True)),
            Case("edges", _edges),
            Case("nobody_sees", _nobody_sees),
            Case("no_queries", lambda new: _arguments(new, queries=0, softmax=True)),
            Case("no_points", lambda new: _arguments(new, points=0)),
            Case(
                "single",
                lambda new: _arguments(new, 1, 1, 1, 1, 1, sizes=[(1, 1)], form="contiguous"),
            ),
        ),
        workloads=(
            Workload("detection", _DETECTION, ring),
            Workload("map", _MAP, ring),
            Workload("deterministic", _DETECTION, lambda sizes: {**ring(sizes), **_FIXED}),
            Workload("softmax", _DETECTION, lambda sizes: {**ring(sizes), "softmax": True}),
            Workload("uniform", _DETECTION, uniform),
        ),
    )


_FIXED = {"deterministic": True}
# SparseDrive-S: images of 256 x 704, strides 4 to 32.
_DETECTION = {
    "images": 1, "cameras": 6, "height": 64, "width": 176, "levels": 4, "channels": 256,
    "groups": 8, "queries": 900, "points": 13,
}  # fmt: skip
_MAP = {**_DETECTION, "queries": 100, "points": 300}


def _scene(sizes: Sizes, location: Tensor) -> dict[str, Any]:
    shapes = [
        (max(1, sizes["height"] >> i), max(1, sizes["width"] >> i)) for i in range(sizes["levels"])
    ]
    rows = sizes["cameras"] * sum(height * width for height, width in shapes)
    images, queries, points, cameras = location.shape[:4]
    weights = scenes.normal(
        (images, queries, points, cameras, sizes["levels"], sizes["groups"]), scenes.SEED + 1
    )
    return {
        "features": scenes.normal((images, rows, sizes["channels"]), scenes.SEED),
        "sampling_location": location,
        "weights": weights,
        "sizes": shapes,
    }


def ring(sizes: Sizes) -> dict[str, Any]:
    """Objects around a car with a ring of cameras, as in nuScenes: few see each point."""
    generator = scenes.generator(scenes.SEED)

    def draw(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    images, queries, points = sizes["images"], sizes["queries"], sizes["points"]
    cameras, aspect = sizes["cameras"], sizes["width"] / sizes["height"]
    centre = draw(images, queries, 1, 3, low=-1, high=1) * torch.tensor([50.0, 50.0, 2.5])
    centre = centre - torch.tensor([0.0, 0.0, 0.5])
    half = torch.tensor([1.9, 4.5, 1.7]) / 2
    corner = centre + draw(images, queries, points, 3, low=-1, high=1) * half
    # The sixth looks back, and wider.
    yaw = torch.tensor([0.0, 55.0, -55.0, 110.0, -110.0, 180.0]).repeat(-(-cameras // 6))[:cameras]
    yaw = yaw * (math.pi / 180)
    focal = torch.where(yaw > 3, 0.51, 0.79)
    x, y, z = (part[..., None] for part in corner.unbind(-1))
    ahead = x * yaw.cos() + y * yaw.sin()
    left = y * yaw.cos() - x * yaw.sin()
    depth = ahead.clamp(min=1e-5)
    place = torch.stack(
        [0.5 - focal * left / depth, 0.5 - focal * aspect * (z - 0.3) / depth], dim=-1
    )
    return _scene(sizes, place)


def uniform(sizes: Sizes) -> dict[str, Any]:
    """Points all over the images of all cameras: five times the work of a ring."""
    shape = [sizes[name] for name in ("images", "queries", "points", "cameras")]
    place = torch.rand((*shape, 2), generator=scenes.generator(scenes.SEED)) * 1.2 - 0.1
    return _scene(sizes, place)


def _fuzz(draw: Draw) -> dict[str, Any]:
    groups = draw.option("groups", 1, 2, 3)
    channels = groups * draw.option("channels", 1, 4, 8, 20)
    sizes = [(draw.size(8, 1), draw.size(8, 1)) for _ in range(draw.option("levels", 1, 2))]
    points, cameras, queries = draw.size(4), draw.size(3, 1), draw.size(4)
    order = draw.option("weights_order", "pmlg", "mlpg")
    lengths = {"p": points, "m": cameras, "l": len(sizes), "g": groups}
    location = draw.uniform(1, queries, points, cameras, 2, low=-0.2, high=1.2)
    if draw.kind == "grid":
        location = draw.integers(1, queries, points, cameras, 2, low=-1, high=6).double() / 4
    rows = cameras * sum(height * width for height, width in sizes)
    softmax = draw.option("softmax", False, True)
    if softmax:
        draw.undefined("scaled")  # logits whose differences pass the range of exp
    return {
        "features": draw.values(1, rows, channels, special=False),
        "sampling_location": draw.strange(location) if draw.kind == "special" else location,
        "weights": draw.values(1, queries, *(lengths[axis] for axis in order), special=False),
        "sizes": sizes,
        "form": draw.option("form", "one", "contiguous", "channels_last"),
        "weights_order": order,
        "softmax": softmax,
        "deterministic": draw.option("deterministic", False, True),
    }
