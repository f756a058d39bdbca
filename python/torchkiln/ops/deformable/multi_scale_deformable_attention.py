"""Multi-scale deformable attention."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops._arguments import shape, sum_dtype, under_autocast

__all__ = ["multi_scale_deformable_attention", "multi_scale_deformable_attention_fused"]


def _empty_output(value: Tensor, places: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], places.shape[1], value.shape[2] * value.shape[3]))


def _fake(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding_mask: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    return _empty_output(value, sampling_locations)


def _fake_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    return _empty_output(value, sampling_offsets)


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    reference_points: Tensor | None,
    padding_mask: Tensor | None,
    positions: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = sum_dtype(value.dtype)
    return (
        value.new_empty(value.shape),
        sampling_locations.new_empty(
            sampling_locations.shape, dtype=wide if positions else sampling_locations.dtype
        ),
        attention_weights.new_empty(attention_weights.shape),
    )


_gradients = operator("_multi_scale_deformable_attention_backward", fake=_fake_backward)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.given = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _saved(ctx: Any) -> list[Tensor | None]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if given else None for given in ctx.given]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.deterministic = inputs
    _save(ctx, *tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, shapes, starts, locations, weights, mask = _saved(ctx)
    options = (None, mask, False, ctx.deterministic)
    grads = _gradients(grad_output, value, shapes, starts, locations, weights, *options)
    return grads[0], None, None, grads[1], grads[2]


def _backward_fused(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, shapes, starts, references, offsets, logits, mask = _saved(ctx)
    assert shapes is not None
    assert references is not None
    assert offsets is not None
    of_references = ctx.needs_input_grad[3]
    options = (references, mask, of_references, ctx.deterministic)
    of_value, of_offsets, of_logits = _gradients(
        grad_output, value, shapes, starts, offsets, logits, *options
    )
    if not of_references:
        return of_value, None, None, None, of_offsets, of_logits
    of_references, of_offsets = _of_positions(of_offsets, shapes, references, offsets)
    return of_value, None, None, of_references, of_offsets, of_logits


def _of_positions(
    grad: Tensor, shapes: Tensor, references: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of reference points and offsets, of that of positions in pixels."""
    sizes = shapes.flip(1).to(grad.dtype)
    of_references = grad.sum((2, 4)) * sizes
    of_offsets = grad
    if references.shape[-1] == 4:
        share = 0.5 / max(offsets.shape[4], 1) * sizes
        of_sides = (grad * offsets).sum((2, 4)) * share
        of_references = torch.cat([of_references, of_sides], -1)
        of_offsets = grad * (references[..., 2:] * share)[:, :, None, :, None]
    return of_references.to(references.dtype), of_offsets.to(offsets.dtype)


_attention = operator(
    "multi_scale_deformable_attention",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_attention_fused = operator(
    "multi_scale_deformable_attention_fused",
    fake=_fake_fused,
    setup_context=_setup_context,
    backward=_backward_fused,
)


def _starts(spatial_shapes: Tensor, level_start_index: Tensor | None) -> Tensor | None:
    """The first pixel of each level, of levels that follow each other."""
    if level_start_index is not None or not isinstance(spatial_shapes, Tensor):
        return level_start_index
    areas = spatial_shapes.prod(-1)
    return areas.cumsum(0) - areas


def agreeing(value: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
    """Places and weights in one dtype that goes with the value: its own, or at least float32."""
    if all(tensor.dtype == value.dtype for tensor in places):
        return places
    return tuple(tensor.to(sum_dtype(value.dtype)) for tensor in places)


def _under_autocast(value: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
    """The autocast rule; where autocast is off, or nothing can be cast, what was given."""
    tensors = (value, *places)
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors):
        return places
    return agreeing(value, *places) if under_autocast(value) else places


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding_mask: Tensor | None = None,
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """Sums, for each query and head, bilinear samples at given points of a pyramid of features.

    Args:
        value: (B, S, M, D), float16, bfloat16, float32 or float64; S pixels of all levels, row by
            row, for each of M heads D channels.
        spatial_shapes: (L, 2), int64; height and width of each level.
        level_start_index: (L,), int64; the first pixel of each level among S. None: levels follow
            each other.
        sampling_locations: (B, Q, M, L, P, 2), dtype of `value`, or float32 beside a half type; x
            and y of the points in parts of the level, 0 its left or upper end, 1 its other end.
        attention_weights: (B, Q, M, L, P), dtype of `sampling_locations`; of the samples.
        padding_mask: (B, S), bool; True for pixels that count as 0. The value is not copied.
        deterministic: whether the gradient of the value has the same bits every time on CUDA: a
            pixel then gathers what falls on it; None: as
            `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (B, Q, M * D), dtype of `value`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or device; on the CPU also for levels that do not lie within
            the S pixels. On CUDA such a level gives 0, because reading it would wait for the GPU.

    Differentiable: value, sampling_locations, attention_weights. Deterministic: yes, but for the
    gradient of the value on CUDA, where `deterministic` decides. Autocast: the value stays as it
    is; locations and weights that differ from it or from each other get float32.

    Note:
        Half types are added up in float32. Pixel centres lie at half numbers; outside of a level
        everything is 0, so samples fade out within a pixel of its border, as
        `grid_sample(..., padding_mode="zeros", align_corners=False)`. A point that is not a number
        gives 0.

    Source:
        Zhu et al., "Deformable DETR", 2021, equation 3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import multi_scale_deformable_attention
        >>> value = torch.arange(4.0).reshape(1, 4, 1, 1)
        >>> shapes = torch.tensor([[2, 2]])
        >>> locations = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).reshape(1, 1, 1, 1, 2, 2)
        >>> weights = torch.tensor([1.0, 10.0]).reshape(1, 1, 1, 1, 2)
        >>> multi_scale_deformable_attention(value, shapes, None, locations, weights)
        tensor([[[21.5000]]])
    """
    sampling_locations, attention_weights = _under_autocast(
        value, sampling_locations, attention_weights
    )
    return _attention(
        value,
        spatial_shapes,
        _starts(spatial_shapes, level_start_index),
        sampling_locations,
        attention_weights,
        padding_mask,
        deterministic_default(deterministic),
    )


def multi_scale_deformable_attention_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    padding_mask: Tensor | None = None,
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """As `multi_scale_deformable_attention`, of what the projections of a query give.

    The locations and the softmax of the weights are computed where they are used: neither is
    written to memory, in the gradient either.

    Args:
        value: (B, S, M, D), float16, bfloat16, float32 or float64.
        spatial_shapes: (L, 2), int64; height and width of each level.
        level_start_index: (L,), int64, or None: levels follow each other.
        reference_points: (B, Q, L, 2), x and y in parts of the level; or (B, Q, L, 4), with width
            and height; dtype of `sampling_offsets`.
        sampling_offsets: (B, Q, M, L, P, 2), dtype of `value`, or float32 beside a half type; x and
            y from the reference point, in pixels of the level; with four numbers in parts of
            half the width and height, divided by P.
        attention_logits: (B, Q, M, L, P) or (B, Q, M, L * P), dtype of `sampling_offsets`; the
            weights are their softmax over levels and points.
        padding_mask: (B, S), bool; True for pixels that count as 0.
        deterministic: whether the gradient of the value has the same bits every time on CUDA;
            None: as `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (B, Q, M * D), dtype of `value`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or device; on the CPU also for levels that do not lie within
            the S pixels.

    Differentiable: value, reference_points, sampling_offsets, attention_logits. Deterministic: yes,
    but for the gradient of the value on CUDA, where `deterministic` decides. Autocast: the value
    stays as it is; the three others get float32 where any of these differs from another.

    Note:
        The gradient of `reference_points` is made by a few tensor operations after the kernel;
        where it is not needed, they do not run.

    Source:
        Zhu et al., "Deformable DETR", 2021, equation 3 and section A.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import multi_scale_deformable_attention_fused
        >>> value = torch.arange(4.0).reshape(1, 4, 1, 1)
        >>> shapes, references = torch.tensor([[2, 2]]), torch.full((1, 1, 1, 2), 0.5)
        >>> offsets = torch.tensor([[0.0, 0.0], [-0.5, 0.5]]).reshape(1, 1, 1, 1, 2, 2)
        >>> logits = torch.zeros(1, 1, 1, 1, 2)
        >>> multi_scale_deformable_attention_fused(value, shapes, None, references, offsets, logits)
        tensor([[[1.7500]]])
    """
    reference_points, sampling_offsets, attention_logits = _under_autocast(
        value, reference_points, sampling_offsets, attention_logits
    )
    given = (sampling_offsets, attention_logits)
    if [x.dim() for x in given if isinstance(x, Tensor)] == [6, 4]:
        attention_logits = _unflattened(attention_logits, sampling_offsets)
    return _attention_fused(
        value,
        spatial_shapes,
        _starts(spatial_shapes, level_start_index),
        reference_points,
        sampling_offsets,
        attention_logits,
        padding_mask,
        deterministic_default(deterministic),
    )


def _unflattened(logits: Tensor, offsets: Tensor) -> Tensor:
    grid = offsets.shape[:5]
    flat = (*grid[:3], grid[3] * grid[4])
    if logits.shape != flat:
        raise ValueError(
            "multi_scale_deformable_attention_fused: attention_logits must have shape "
            f"{tuple(grid)} or {flat}; got {shape(logits)}"
        )
    result: Tensor = logits.unflatten(3, grid[3:])
    return result
