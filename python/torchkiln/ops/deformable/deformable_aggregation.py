"""Deformable aggregation, as Sparse4D and SparseDrive use it, and its feature format."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops._arguments import (
    dtype_name,
    require_choice,
    require_floating,
    require_tensor,
    shape,
    sum_dtype,
    under_autocast,
)

__all__ = [
    "deformable_aggregation",
    "deformable_aggregation_function",
    "feature_maps_format",
]

_ORDERS = {"pmlg": False, "mlpg": True}


def _fake_levels(
    feature_maps: Sequence[Tensor],
    sampling_location: Tensor,
    weights: Tensor,
    camera_first: bool,
    softmax: bool,
    wide_output: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    first = feature_maps[0]
    batch, queries = sampling_location.shape[:2]
    wide = sum_dtype(first.dtype)
    output = first.new_empty(
        (batch, queries, first.shape[2]), dtype=wide if wide_output else first.dtype
    )
    normalizer = (batch, queries, 2, weights.shape[5]) if softmax else (0,)
    return output, first.new_empty(normalizer, dtype=wide)


def _fake(
    feature_maps: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    camera_first: bool = False,
    softmax: bool = False,
    wide_output: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    points, options = (sampling_location, weights), (camera_first, softmax, wide_output)
    return _fake_levels([feature_maps], *points, *options, deterministic)


def _contiguous(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _gradient_of(level: Tensor) -> Tensor:
    """In the layout of the level; if it may be both, with rows of pixels."""
    by_rows = level.movedim(2, 4)
    if not level.is_contiguous() and by_rows.is_contiguous():
        return _contiguous(by_rows).movedim(4, 2)
    return _contiguous(level)


def _fake_backward(
    grad_output: Tensor,
    feature_maps: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    output: Tensor,
    normalizer: Tensor,
    camera_first: bool,
    softmax: bool,
    deterministic: bool,
    maps_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    maps = _contiguous(feature_maps) if maps_wanted else feature_maps.new_empty(0)
    return maps, _contiguous(sampling_location), _contiguous(weights)


def _fake_levels_backward(
    grad_output: Tensor,
    feature_maps: Sequence[Tensor],
    sampling_location: Tensor,
    weights: Tensor,
    output: Tensor,
    normalizer: Tensor,
    camera_first: bool,
    softmax: bool,
    deterministic: bool,
    maps_wanted: bool,
) -> list[Tensor]:
    maps = [_gradient_of(level) for level in feature_maps] if maps_wanted else []
    return [*maps, _contiguous(sampling_location), _contiguous(weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, camera_first, softmax, _, deterministic = inputs
    ctx.options = camera_first, softmax, deterministic
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    maps = tensors[0] if isinstance(tensors[0], (list, tuple)) else tensors[:1]
    ctx.levels = len(maps)
    ctx.maps_wanted = any(map.requires_grad for map in maps)
    ctx.save_for_backward(*maps, *tensors[1:], *output)


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None = None) -> Any:
    if grad_output is None:
        return None
    options = (*ctx.options, ctx.maps_wanted)
    maps, location, weight = _deformable_aggregation_backward(
        grad_output, *ctx.saved_tensors, *options
    )
    return maps if ctx.maps_wanted else None, location, weight


def _levels_backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None = None) -> Any:
    nothing = [None] * ctx.levels
    if grad_output is None:
        return nothing, None
    saved, options = ctx.saved_tensors, (*ctx.options, ctx.maps_wanted)
    *maps, location, weight = _deformable_aggregation_levels_backward(
        grad_output, list(saved[: ctx.levels]), *saved[ctx.levels :], *options
    )
    return maps if ctx.maps_wanted else nothing, location, weight


def _reference_of_levels(
    feature_maps: Sequence[Tensor],
    sampling_location: Tensor,
    weights: Tensor,
    camera_first: bool,
    softmax: bool,
    wide_output: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    from torchkiln import reference

    options = (camera_first, softmax, wide_output, deterministic)
    result: tuple[Tensor, Tensor] = reference.deformable_aggregation(
        feature_maps, sampling_location, weights, None, None, *options
    )
    return result


_deformable_aggregation_backward = operator("_deformable_aggregation_backward", fake=_fake_backward)
_deformable_aggregation_levels_backward = operator(
    "_deformable_aggregation_levels_backward", fake=_fake_levels_backward
)
_deformable_aggregation = operator(
    "deformable_aggregation", fake=_fake, setup_context=_setup_context, backward=_backward
)
_deformable_aggregation_levels = operator(
    "_deformable_aggregation_levels",
    fake=_fake_levels,
    setup_context=_setup_context,
    backward=_levels_backward,
    reference=_reference_of_levels,
    public="deformable_aggregation",
)


def _levels_of(feature_maps: Any) -> list[Tensor]:
    levels = list(feature_maps) if isinstance(feature_maps, Iterable) else [feature_maps]
    for level in levels:
        if not isinstance(level, Tensor):
            raise TypeError(
                "deformable_aggregation: feature_maps must be a tensor or a list of tensors; "
                f"got {_briefly(level)}"
            )
    return levels


def _under_autocast(levels: list[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """The autocast rule: levels in their common dtype, weights in one that goes with it."""
    if not all(x.is_floating_point() for x in (*levels, weights)):
        return levels, weights
    dtype = levels[0].dtype
    for level in levels[1:]:
        dtype = torch.promote_types(dtype, level.dtype)
    if weights.dtype not in (dtype, sum_dtype(dtype)):
        weights = weights.to(sum_dtype(dtype))
    return [level.to(dtype) for level in levels], weights


def _is_wide(output_dtype: torch.dtype | None, dtype: torch.dtype | None) -> bool:
    """Whether half types give float32."""
    if output_dtype is None or output_dtype == dtype:
        return False
    if output_dtype != torch.float32 or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            "deformable_aggregation: output_dtype must be the dtype of feature_maps "
            f"({dtype}), or torch.float32 for half types; got {output_dtype}"
        )
    return True


def deformable_aggregation(
    feature_maps: Tensor | Sequence[Tensor],
    sampling_location: Tensor,
    weights: Tensor,
    spatial_shape: Tensor | None = None,
    scale_start_index: Tensor | None = None,
    *,
    weights_order: str = "pmlg",
    softmax: bool = False,
    output_dtype: torch.dtype | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Sums samples of every level of every camera that sees a point, over a query's points.

    Samples are bilinear. A camera sees a point whose x and y are both above 0 and below 1; others
    add nothing, whatever their weight, and get no gradient of their place. On maps of H x W pixels
    a point lies at row y H - 0.5 and column x W - 0.5; pixels outside count as 0.

    Args:
        feature_maps: the levels, 1 to 8 of (bs, M, C, H, W): float16, bfloat16, float32 or
            float64; with neighbouring channels (channels_last) read in place, others are copied.
            Or all maps in one (bs, N, C) tensor, as `feature_maps_format` makes it. C is at most
            2048.
        sampling_location: (bs, Q, P, M, 2) x and y, any floating dtype.
        weights: (bs, Q, P, M, L, G), dtype of `feature_maps` or float32; G divides C, and weight g
            is that of the g-th block of C / G channels.
        spatial_shape: (M, L, 2) height and width of each map in the one tensor, int32 or int64.
        scale_start_index: (M, L) row of the one tensor at which a map begins, as `spatial_shape`.
        weights_order: "pmlg", or "mlpg" for weights (bs, Q, M, L, P, G), as a linear layer gives
            them in Sparse4D.
        softmax: whether weights are logits, of which the softmax over all of M, L and P is taken
            here, for each group; points that no camera sees keep their part of it.
        output_dtype: float32 for half types, too; None: the dtype of `feature_maps`.
        deterministic: whether the gradient of `feature_maps` has the same bits every time on CUDA;
            None: as `torch.are_deterministic_algorithms_enabled` says. It always has for half
            types.

    Returns:
        (bs, Q, C).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device, order or number of levels.
        IndexError: for a map that does not lie in the N rows, on the CPU. On CUDA it has no pixels.

    Differentiable: feature_maps, sampling_location, weights. Deterministic: yes, but for the
    gradient of `feature_maps` on CUDA, where `deterministic` decides. Autocast: places stay as they
    are, and so do maps, but levels that differ get their common dtype; weights that have neither
    the dtype of the maps nor float32 get float32.

    Note:
        Places and sums are computed in float32, in float64 for float64 maps.

    Source:
        Lin et al., "Sparse4D v2: Recurrent Temporal Fusion with Sparse Model", 2023, section 3.3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import deformable_aggregation
        >>> level = torch.arange(16.0).reshape(1, 1, 1, 4, 4)
        >>> location = torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 1, 2)
        >>> deformable_aggregation([level], location, torch.ones(1, 1, 1, 1, 1, 1))
        tensor([[[7.5000]]])
    """
    require_choice("deformable_aggregation", "weights_order", weights_order, _ORDERS)
    in_one = isinstance(feature_maps, Tensor)
    maps: list[Tensor] = [feature_maps] if in_one else _levels_of(feature_maps)  # type: ignore[list-item]
    if maps and isinstance(weights, Tensor) and under_autocast(maps[0]):
        maps, weights = _under_autocast(maps, weights)
    wide = _is_wide(output_dtype, maps[0].dtype if maps else output_dtype)
    points = (sampling_location, weights)
    options = (_ORDERS[weights_order], softmax, wide, deterministic_default(deterministic))
    if in_one:
        indices = (spatial_shape, scale_start_index)
        return _deformable_aggregation(maps[0], *points, *indices, *options)[0]
    if spatial_shape is not None or scale_start_index is not None:
        raise ValueError(
            "deformable_aggregation: spatial_shape and scale_start_index must be left out beside "
            "a list of levels, whose shapes say it"
        )
    return _deformable_aggregation_levels(maps, *points, *options)[0]


def deformable_aggregation_function(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
) -> Tensor:
    """`deformable_aggregation` with the arguments and the result that SparseDrive's users know.

    Args:
        feature_maps: (bs, N, C), any floating dtype; of `feature_maps_format`.
        spatial_shape: (M, L, 2) height and width of each map, int32 or int64.
        scale_start_index: (M, L) row at which each map begins, int32 or int64.
        sampling_location: (bs, Q, P, M, 2) x and y, from 0 to 1 in the image; any floating dtype.
        weights: (bs, Q, P, M, L, G), any floating dtype.

    Returns:
        (bs, Q, C) float32, float64 for float64 maps. Half types are not copied to float32 first,
        but gradients come back in the dtypes of the inputs.

    Raises:
        TypeError: for what is no floating-point tensor.
        ValueError: for another shape or device.
        IndexError: for a map that does not lie in the N rows, on the CPU. On CUDA it has no pixels.

    Differentiable: feature_maps, sampling_location, weights. Deterministic: yes, but for the
    gradient of `feature_maps` on CUDA, where `torch.use_deterministic_algorithms` decides.
    Autocast: as without.

    Source:
        Lin et al., "Sparse4D v2: Recurrent Temporal Fusion with Sparse Model", 2023, section 3.3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import deformable_aggregation_function, feature_maps_format
        >>> maps = feature_maps_format([torch.ones(1, 6, 32, 8, 22), torch.ones(1, 6, 32, 4, 11)])
        >>> location, weights = torch.rand(1, 9, 13, 6, 2), torch.rand(1, 9, 13, 6, 2, 8)
        >>> deformable_aggregation_function(*maps, location, weights).shape
        torch.Size([1, 9, 32])
    """
    require_floating("deformable_aggregation", feature_maps=feature_maps, weights=weights)
    indices = {"spatial_shape": spatial_shape, "scale_start_index": scale_start_index}
    require_tensor("deformable_aggregation", **indices)
    if weights.dtype not in (feature_maps.dtype, sum_dtype(feature_maps.dtype)):
        weights = weights.to(sum_dtype(feature_maps.dtype))
    if scale_start_index.dtype != spatial_shape.dtype and not scale_start_index.is_floating_point():
        scale_start_index = scale_start_index.to(spatial_shape.dtype)
    return deformable_aggregation(
        feature_maps,
        sampling_location,
        weights,
        spatial_shape,
        scale_start_index,
        output_dtype=sum_dtype(feature_maps.dtype),
    )


# ---- the format ----

# Heights and widths of the levels of each camera.
Sizes: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
Levels: TypeAlias = Sequence[Tensor]

_indices: dict[tuple[Sizes, torch.device], tuple[Tensor, Tensor]] = {}
# Cached index tensors are small, but cameras whose images change size would pile them up.
_MOST_INDICES = 256


def _make_indices(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    levels = len(sizes[0]) if sizes else 0
    areas = [height * width for camera in sizes for height, width in camera]
    starts = [0, *itertools.accumulate(areas)][: len(areas)]
    # A tensor made in inference mode could not be saved for a gradient later.
    with torch.inference_mode(False):
        shapes = torch.tensor(sizes, dtype=torch.int64, device=device)
        first = torch.tensor(starts, dtype=torch.int64, device=device)
        shapes, first = shapes.reshape(len(sizes), levels, 2), first.reshape(len(sizes), levels)
    # Read back without waiting for the device; torch.compile sees an attribute, too.
    shapes._torchkiln_sizes = sizes  # type: ignore[attr-defined]
    return shapes, first


def indices_of(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shapes and first rows of the maps, cached where they are real numbers and real tensors."""
    plain = all(type(side) is int for camera in sizes for level in camera for side in level)
    if (
        not plain
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    ):
        return _make_indices(sizes, device)
    key = (sizes, device)
    found = _indices.get(key)
    if found is None:
        if len(_indices) >= _MOST_INDICES:
            _indices.pop(next(iter(_indices)), None)  # another thread may have been here
        found = _indices[key] = _make_indices(sizes, device)
    return found


def feature_maps_format(feature_maps: Sequence[Any], inverse: bool = False) -> list[Any]:
    """Puts all levels of all cameras into one tensor of rows of channels, or takes them out again.

    The index tensors are made once for each set of sizes and device; do not change them in place.

    Args:
        feature_maps: the levels, (bs, M, C, H, W) each, any dtype; or a list of such lists, one for
            each group of cameras whose images have one size, with as many levels in all.
            With `inverse`, what this function returned.
        inverse: take apart instead of putting together.

    Returns:
        `[features, spatial_shape, scale_start_index]`: (bs, N, C) contiguous, rows ordered by
        camera, level, y, x; (M, L, 2) and (M, L) int64, as `deformable_aggregation` takes them.
        With `inverse` a list of lists: a view (bs, M, C, H, W) of each level, for each run of
        cameras that have the same sizes.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for levels that do not fit together, or no level.

    Differentiable: feature_maps, in both directions. Deterministic: yes. Autocast: as without.

    Note:
        With several groups of cameras, the first rows of the later ones count those before them.
        SparseDrive's own begin at 0 again, so that all groups would read the first one's rows.

    Source:
        Lin et al., "Sparse4D v2: Recurrent Temporal Fusion with Sparse Model", 2023, section 3.3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import feature_maps_format
        >>> levels = [torch.rand(2, 6, 32, 8, 22), torch.rand(2, 6, 32, 4, 11)]
        >>> features, shapes, starts = feature_maps_format(levels)
        >>> features.shape, starts[1].tolist()
        (torch.Size([2, 1320, 32]), [220, 396])
        >>> [[level.shape[3:] for level in run] for run in
        ...  feature_maps_format([features, shapes, starts], inverse=True)]
        [[torch.Size([8, 22]), torch.Size([4, 11])]]
    """
    if not isinstance(feature_maps, (list, tuple)):
        raise TypeError(
            "feature_maps_format: feature_maps must be a list of tensors; "
            f"got {_briefly(feature_maps)}"
        )
    if inverse:
        return _taken_apart(*_formatted(feature_maps))
    if not feature_maps:
        raise ValueError("feature_maps_format: feature_maps must have at least one level; got []")
    nested = isinstance(feature_maps[0], (list, tuple))
    groups: list[Levels] = list(feature_maps) if nested else [feature_maps]
    for levels in groups:
        _check_levels(levels, groups[0])
    sizes = tuple(
        tuple((level.shape[3], level.shape[4]) for level in levels)
        for levels in groups
        for _ in range(levels[0].shape[1])
    )
    first = groups[0][0]
    rows = [
        # One pass: cat reads through the strides of what it is given.
        torch.cat([level.flatten(3).transpose(2, 3) for level in levels], 2).flatten(1, 2)
        for levels in groups
    ]
    features = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return [features, *indices_of(sizes, first.device)]


def _check_levels(levels: Levels, others: Levels) -> None:
    op = "feature_maps_format"
    if not isinstance(levels, (list, tuple)) or not levels or len(levels) != len(others):
        listed = isinstance(levels, (list, tuple))
        got = str(len(levels)) if listed else _briefly(levels)
        raise ValueError(
            f"{op}: feature_maps must have the same number of levels, at least 1, for all groups "
            f"of cameras; got {got} after {len(others)}"
        )
    for level in levels:
        if not isinstance(level, Tensor):
            raise TypeError(f"{op}: feature_maps must be tensors; got {_briefly(level)}")
        if level.dim() != 5:
            raise ValueError(
                f"{op}: feature_maps must have shape (bs, M, C, H, W); got {shape(level)}"
            )
        first = others[0]
        alike = level.shape[1] == levels[0].shape[1] and level.shape[2] == first.shape[2]
        if not alike or level.shape[0] != first.shape[0]:
            raise ValueError(
                f"{op}: feature_maps must have the same images, cameras and channels on all "
                f"levels; got {shape(level)} beside {shape(levels[0])} and {shape(first)}"
            )


def _briefly(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a tensor {shape(value)}" if isinstance(value, Tensor) else repr(value)


def _formatted(given: Sequence[Any]) -> Sequence[Tensor]:
    """Checks what `inverse` takes."""
    op, names = "feature_maps_format", ("features", "spatial_shape", "scale_start_index")
    if len(given) != len(names):
        raise ValueError(
            f"{op}: feature_maps must be [{', '.join(names)}] with inverse; got {len(given)} items"
        )
    require_tensor(op, **dict(zip(names, given, strict=True)))
    shapes = given[1]
    if shapes.dim() != 3 or shapes.shape[2] != 2 or shapes.is_floating_point():
        raise ValueError(
            f"{op}: spatial_shape must be integers of shape (M, L, 2); "
            f"got {dtype_name(shapes)} of shape {shape(shapes)}"
        )
    return given


def _runs(sizes: Sizes) -> list[tuple[tuple[tuple[int, int], ...], int]]:
    """Sizes of equal cameras that follow each other, and how many; torch.compile cannot group."""
    runs: list[tuple[tuple[tuple[int, int], ...], int]] = []
    for camera in sizes:
        if runs and runs[-1][0] == camera:
            runs[-1] = camera, runs[-1][1] + 1
        else:
            runs.append((camera, 1))
    return runs


def _taken_apart(
    features: Tensor, spatial_shape: Tensor, scale_start_index: Tensor
) -> list[list[Tensor]]:
    op = "feature_maps_format"
    sizes: Sizes | None = getattr(spatial_shape, "_torchkiln_sizes", None)
    if sizes is None:
        sizes = tuple(tuple((h, w) for h, w in camera) for camera in spatial_shape.tolist())
        if any(side < 0 for camera in sizes for level in camera for side in level):
            raise ValueError(f"{op}: spatial_shape must have no size below 0; got {sizes}")
    total = sum(height * width for camera in sizes for height, width in camera)
    if features.dim() != 3 or features.shape[1] != total:
        raise ValueError(
            f"{op}: features must have shape (bs, {total}, C), as spatial_shape says; "
            f"got {shape(features)}"
        )
    runs = _runs(sizes)
    areas = [[height * width for height, width in run] for run, _ in runs]
    parts = features.split(
        [cameras * sum(own) for (_, cameras), own in zip(runs, areas, strict=True)], 1
    )
    return [
        [
            level.unflatten(2, size).movedim(4, 2)
            for level, size in zip(
                part.unflatten(1, (cameras, sum(own))).split(own, 2), run, strict=True
            )
        ]
        for part, (run, cameras), own in zip(parts, runs, areas, strict=True)
    ]
