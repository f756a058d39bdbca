"""Multi-scale deformable attention in plain PyTorch, from the definition.

Source: Zhu et al., "Deformable DETR", 2021, equation 3.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["multi_scale_deformable_attention", "multi_scale_deformable_attention_fused"]


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding_mask: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Sums bilinear samples at given points of a pyramid of features.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (L, 2) height and width.
        level_start_index: (L,) first pixel; a level that does not lie within S gives 0.
        sampling_locations: (B, Q, M, L, P, 2) x, y in parts of the level.
        attention_weights: (B, Q, M, L, P).
        padding_mask: (B, S) True for pixels that count as 0.
        deterministic: no effect.

    Returns:
        (B, Q, M * D).
    """
    locations, weights = _wide(sampling_locations), _wide(attention_weights)
    sides = spatial_shapes.flip(1)[:, None].to(locations.dtype)
    pixels = locations * sides - 0.5
    return _attend(value, spatial_shapes, level_start_index, pixels, weights, padding_mask)


def multi_scale_deformable_attention_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """The same of offsets from reference points and of the logits of a softmax.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (L, 2).
        level_start_index: (L,).
        reference_points: (B, Q, L, 2) x, y, or (B, Q, L, 4) x, y, width, height.
        sampling_offsets: (B, Q, M, L, P, 2), in pixels; or in parts of half the size, over P.
        attention_logits: (B, Q, M, L, P).
        padding_mask: (B, S).
        deterministic: no effect.

    Returns:
        (B, Q, M * D).
    """
    references, offsets = _wide(reference_points), _wide(sampling_offsets)
    sides = spatial_shapes.flip(1)[:, None].to(offsets.dtype)
    center = references[:, :, None, :, None, :2]
    if references.shape[-1] == 2:
        pixels = center * sides + offsets - 0.5
    else:
        half = references[:, :, None, :, None, 2:] / 2
        points = max(offsets.shape[4], 1)
        pixels = (center + offsets / points * half) * sides - 0.5
    weights = _wide(attention_logits).flatten(3).softmax(-1).view_as(attention_logits)
    return _attend(value, spatial_shapes, level_start_index, pixels, weights, padding_mask)


def _wide(tensor: Tensor) -> Tensor:
    """Half types are what is stored; places and sums are wide."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _attend(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    pixels: Tensor,
    weights: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Of positions (B, Q, M, L, P, 2) x, y, in pixels of their level, 0 at the first centre."""
    images, count, heads, channels = value.shape
    dtype, value = value.dtype, _wide(value)
    live = value.new_ones(images, count, dtype=torch.bool) if mask is None else ~mask
    # 0, and known to autograd, also where no level has a pixel.
    nothing = value[:, :0].sum() + pixels[..., :0].sum() + weights[..., :0].sum()
    output = nothing.expand(images, pixels.shape[1], heads, channels)
    levels = zip(shapes.tolist(), starts.tolist(), strict=True)
    for level, ((height, width), start) in enumerate(levels):
        if min(height, width, start) < 0 or start + height * width > count or not height * width:
            continue
        area = slice(start, start + height * width)
        x, y = pixels[:, :, :, level].unbind(-1)
        sample = _sample(value[:, area], live[:, area], (height, width), y, x)
        inside = (y > -1) & (y < height) & (x > -1) & (x < width)
        # A sample that does not exist has no weight, whatever stands there.
        weight = torch.where(inside, weights[:, :, :, level], 0.0)
        output = output + (weight[..., None] * sample).sum(3)
    return output.flatten(2).to(dtype)


def _sample(value: Tensor, live: Tensor, size: tuple[int, int], y: Tensor, x: Tensor) -> Tensor:
    """(B, Q, M, P, D) of one level's (B, H * W, M, D), 0 outside."""
    height, width = size
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, 0.0), torch.where(inside, x, 0.0)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    total: Tensor | None = None
    for row, of_row in ((top.long(), 1 - down), (top.long() + 1, down)):
        for column, of_column in ((left.long(), 1 - right), (left.long() + 1, right)):
            exists = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = torch.where(exists, row * width + column, 0)
            picked, counts = _pick(value, live, pixel)
            part = torch.where(
                (exists & counts)[..., None], (of_row * of_column)[..., None] * picked, 0.0
            )
            total = part if total is None else total + part
    assert total is not None
    return total


def _pick(value: Tensor, live: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image and head, the pixels (B, Q, M, P), and whether they count."""
    images, queries, heads, points = pixel.shape
    image = torch.arange(images, device=pixel.device)[:, None, None, None]
    head = torch.arange(heads, device=pixel.device)[None, None, :, None]
    shape = (images, queries, heads, points)
    return value[image.expand(shape), pixel, head.expand(shape)], live[image.expand(shape), pixel]


def parities() -> list[Parity]:
    """Both operators, on the same cases."""
    return [
        _parity(
            "multi_scale_deformable_attention",
            ("value", "sampling_locations", "attention_weights"),
            lambda arguments: arguments,
            _fuzz,
            Case("each_pixel", lambda new: _arguments(new, **_EACH_PIXEL)),
        ),
        _parity(
            "multi_scale_deformable_attention_fused",
            ("value", "reference_points", "sampling_offsets", "attention_logits"),
            _fused,
            lambda draw: _fused(_fuzz(draw), draw.option("references", 2, 4)),
            Case("boxes", lambda new: _fused(_arguments(new), 4)),
            Case("boxes_many_points", lambda new: _fused(_arguments(new, **_MANY), 4)),
            Case("each_pixel", lambda new: _fused(_arguments(new, **_EACH_PIXEL))),
        ),
    ]


_Change = Callable[[dict[str, Any]], dict[str, Any]]
_LEVELS = ((7, 9), (4, 5), (2, 3))
# A query for each pixel, and levels that are larger than what sums meet in.
_EACH_PIXEL: dict[str, Any] = {
    "levels": ((5, 61), (4, 5)),
    "queries": 325,
    "images": 1,
    "heads": 2,
    "channels": 12,
}
_MANY: dict[str, Any] = {"levels": ((3, 4), (5, 2)), "points": 11, "queries": 3}


def _parity(
    op: str,
    differentiable: tuple[str, ...],
    change: _Change,
    fuzz: Callable[[Draw], dict[str, Any]],
    *more: Case,
) -> Parity:
    # All forms of the kernels: few samples and many, vectors and single channels, more samples than
    # fit at once, more channels than lanes, several strips of pixels.
    sizes: dict[str, dict[str, Any]] = {
        "typical": {},
        "dense": {"queries": 40},
        "odd_channels": {"channels": 5, "heads": 1},
        "wide": {"channels": 72, "heads": 2, "queries": 3},
        "odd_wide": {"channels": 33, "heads": 2, "queries": 20},
        "many_points": _MANY,
        "strips": {"levels": ((20, 17), (9, 8)), "points": 4, "queries": 30, "heads": 1},
        # Levels whose samples are looked through in several rounds.
        "rounds": {"levels": ((3, 4),), "points": 4, "queries": 600, "images": 1, "heads": 1},
        "no_queries": {"queries": 0},
        "no_images": {"images": 0},
        "no_pixels": {"levels": ((0, 0), (0, 3))},
        "no_points": {"points": 0},
        "single": {"images": 1, "levels": ((1, 1),), "queries": 1, "heads": 1, "channels": 1},
    }

    def of(options: dict[str, Any]) -> Callable[[Inputs], Mapping[str, Any]]:
        return lambda new: change(_arguments(new, **options))

    return Parity(
        op=op,
        tier="B",
        differentiable=differentiable,
        fuzz=fuzz,
        cases=(
            *(Case(name, of(options)) for name, options in sizes.items()),
            Case("masked", lambda new: change(_masked(new))),
            Case("none_counts", lambda new: change(_masked(new, everything=True))),
            Case("degenerate", lambda new: change(_degenerate(new))),
            *more,
        ),
        workloads=(
            Workload("encoder", ENCODER, lambda sizes: change(encoder(sizes))),
            Workload("decoder", DECODER, lambda sizes: change(decoder(sizes))),
            Workload(
                "deterministic_decoder",
                DECODER,
                lambda sizes: change({**decoder(sizes), "deterministic": True}),
            ),
        ),
    )


def levels_of(shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """`spatial_shapes` and `level_start_index` of levels that follow each other."""
    sizes = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
    areas = sizes.prod(1)
    return {"spatial_shapes": sizes, "level_start_index": areas.cumsum(0) - areas}


def _arguments(
    new: Inputs,
    images: int = 2,
    levels: Sequence[tuple[int, int]] = _LEVELS,
    queries: int = 7,
    heads: int = 3,
    channels: int = 8,
    points: int = 2,
) -> dict[str, Any]:
    samples = (images, queries, heads, len(levels), points)
    weights = new.uniform(*samples)
    return {
        "value": new.normal(images, sum(h * w for h, w in levels), heads, channels),
        **levels_of(levels),
        # Some lie outside.
        "sampling_locations": new.uniform(*samples, 2, low=-0.2, high=1.2),
        "attention_weights": weights / weights.sum((3, 4), keepdim=True),
        "deterministic": True,
    }


def _masked(new: Inputs, everything: bool = False) -> dict[str, Any]:
    arguments = _arguments(new, queries=20)
    shape = arguments["value"].shape[:2]
    return {**arguments, "padding_mask": new.uniform(*shape) < (2.0 if everything else 0.4)}


def _fused(arguments: dict[str, Any], numbers: int = 2) -> dict[str, Any]:
    """The same samples, by offsets from the middle of the map, or from a box there."""
    arguments = dict(arguments)
    locations, weights = arguments.pop("sampling_locations"), arguments.pop("attention_weights")
    images, queries, _, levels, points, _ = locations.shape
    references = torch.full((images, queries, levels, numbers), 0.5, dtype=locations.dtype)
    offsets = locations - 0.5
    if numbers == 2:
        offsets = offsets * arguments["spatial_shapes"].flip(1)[:, None]
    else:
        references[..., 2:] = 0.75
        offsets = offsets * (points / 0.375)
    last = {name: arguments.pop(name) for name in ("padding_mask",) if name in arguments}
    own = {"reference_points": references, "sampling_offsets": offsets}
    return {**arguments, **own, "attention_logits": weights * 4, **last}


def _degenerate(new: Inputs) -> dict[str, Any]:
    """Points on the border, a pixel beyond it, at corners, NaN, infinite and far away."""
    arguments = _arguments(new, images=1, levels=((4, 2),), queries=1, heads=1, points=13)
    # Of 4 rows: -1 pixel, 0, the last centre, and 4 pixels.
    y = [-0.125, 0.125, 0.875, 1.125, 0, 1, 0.5, 0.5, math.nan, math.inf, -math.inf, 1e30, -1e4]
    x = [0.5, 0.25, 0.75, 0.5, 0, 1, -0.25, 1.25, 0.5, 0.5, 0.5, 0.5, 0.5]
    rows = torch.tensor([x, y], dtype=torch.float64).T
    return {**arguments, "sampling_locations": rows.view(1, 1, 1, 1, 13, 2)}


# Deformable DETR's encoder at 800 by 1066: each pixel of each level is a query.
PYRAMID = ((100, 134), (50, 67), (25, 34), (13, 17))
ENCODER = {"images": 2, "heads": 8, "channels": 32, "points": 4, "shrink": 1}
DECODER = {**ENCODER, "images": 1, "queries": 900}


def _pyramid(sizes: Sizes) -> tuple[tuple[int, int], ...]:
    shrink = sizes["shrink"]
    return tuple((-(-h // shrink), -(-w // shrink)) for h, w in PYRAMID)


def _scene(sizes: Sizes, centers: Tensor, levels: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Points around (Q, 2) centres, three pixels away in each direction."""
    images, heads, points = sizes["images"], sizes["heads"], sizes["points"]
    count = sum(h * w for h, w in levels)
    samples = (images, len(centers), heads, len(levels), points)
    around = 3 * scenes.normal((*samples, 2), scenes.SEED)
    sides = torch.tensor([(w, h) for h, w in levels])[:, None]
    weights = scenes.normal(samples, scenes.SEED + 1).flatten(3).softmax(-1)
    return {
        "value": scenes.normal((images, count, heads, sizes["channels"]), scenes.SEED + 2),
        **levels_of(levels),
        "sampling_locations": centers.view(1, -1, 1, 1, 1, 2) + around / sides,
        "attention_weights": weights.view(samples),
    }


def encoder(sizes: Sizes) -> dict[str, Any]:
    """A query at each pixel of each level."""
    levels = _pyramid(sizes)
    centers = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w)
        for h, w in levels
    ]
    return _scene(sizes, torch.cat(centers).flip(1), levels)


def decoder(sizes: Sizes) -> dict[str, Any]:
    """Queries anywhere."""
    new = scenes.generator(scenes.SEED + 3)
    return _scene(sizes, torch.rand(sizes["queries"], 2, generator=new), _pyramid(sizes))


def _fuzz(draw: Draw) -> dict[str, Any]:
    levels = [(draw.size(5), draw.size(6)) for _ in range(draw.option("levels", 1, 2, 4))]
    # The smallest one first: the layout of equal rows makes it all of them.
    levels.sort(key=math.prod)
    images, queries, points = draw.size(2), draw.size(6), draw.option("points", 1, 4, 18)
    heads, channels = draw.option("heads", 1, 3), draw.option("channels", 1, 3, 4, 16, 40)
    samples = (images, queries, heads, len(levels), points)
    locations = draw.uniform(*samples, 2, low=-0.3, high=1.3)
    if draw.kind == "grid":
        locations = draw.integers(*samples, 2, low=-2, high=7).double() / 4
    count = sum(h * w for h, w in levels)
    arguments: dict[str, Any] = {
        "value": draw.values(images, count, heads, channels, special=False),
        **levels_of(levels),
        "sampling_locations": draw.strange(locations),
        "attention_weights": draw.values(*samples, special=False),
        "deterministic": draw.chance(0.5),
    }
    if draw.device == "cpu" and draw.chance(0.03):
        draw.promise(ValueError)
        arguments["level_start_index"] = arguments["level_start_index"] + count + 1
    if draw.chance(0.3):
        arguments["padding_mask"] = draw.uniform(images, count) < 0.3
    return arguments
