"""`mmcv.ops.multi_scale_deform_attn`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, renamed
from torchkiln.nn.multi_scale_deformable_attention import Projections
from torchkiln.ops._arguments import require_tensor
from torchkiln.ops.deformable.multi_scale_deformable_attention import agreeing


class _Module(nn.Module):
    """What is used of mmengine's BaseModule, without it."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg


if TYPE_CHECKING:
    BaseModule = _Module
else:
    try:
        from mmengine.model import BaseModule
    except ImportError:
        BaseModule = _Module

__all__ = [
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "multi_scale_deformable_attn_pytorch",
]


def attend(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """`torchkiln.ops.multi_scale_deformable_attention`; `im2col_step` has no effect."""
    require_tensor(
        "multi_scale_deformable_attention",
        value=value,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )
    levels = (value_spatial_shapes, value_level_start_index)
    places = agreeing(value, sampling_locations, attention_weights)
    return ops.multi_scale_deformable_attention(value, *levels, *places)


MultiScaleDeformableAttnFunction = function_class("MultiScaleDeformableAttnFunction", attend)


def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The same by grid_sample, level by level: (B, Q, M * D)."""
    images, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    shapes = [(int(height), int(width)) for height, width in value_spatial_shapes]
    # From 0 to 1 to the -1 to 1 of grid_sample; images and heads are its batch.
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)
    samples = []
    areas = value.split([height * width for height, width in shapes], 1)
    for level, (area, (height, width)) in enumerate(zip(areas, shapes, strict=True)):
        maps = area.permute(0, 2, 3, 1).reshape(images * heads, channels, height, width)
        samples.append(functional.grid_sample(maps, grids[:, :, level], align_corners=False))
    weights = attention_weights.transpose(1, 2).reshape(images * heads, 1, queries, -1)
    sampled = torch.stack(samples, -2).view(images * heads, channels, queries, len(shapes) * points)
    output = (sampled * weights).sum(-1).view(images, heads * channels, queries)
    return output.transpose(1, 2).contiguous()


class MultiScaleDeformableAttention(BaseModule, Projections):
    """mmcv's layer: projections, attention, dropout and the residual, on the CPU too.

    Raises:
        ValueError: where `num_heads` does not divide `embed_dims`, or reference points have neither
            two nor four numbers.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict[str, Any] | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        super().__init__(init_cfg)
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(
                "MultiScaleDeformableAttention: embed_dims must be divisible by num_heads; "
                f"got {embed_dims} and {num_heads}"
            )
        of_head = embed_dims // num_heads
        if of_head & (of_head - 1):
            warnings.warn(
                "MultiScaleDeformableAttention: heads of a power of 2 of channels are faster; "
                f"got {of_head}",
                stacklevel=2,
            )
        self.norm_cfg = norm_cfg
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first
        self.im2col_step = im2col_step
        self.embed_dims = embed_dims
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        value_dims = int(embed_dims * value_proj_ratio)
        self.add_projections(embed_dims, value_dims, num_heads, num_levels, num_points)
        self.init_weights()

    def init_weights(self) -> None:
        """Sets the parameters as a new layer has them."""
        self.reset_projections()
        self._is_init = True

    @renamed(residual="identity")
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns (Q, B, E), or (B, Q, E) with `batch_first`, as `query` and `value` are given."""
        assert reference_points is not None, "reference_points must be given"
        assert spatial_shapes is not None, "spatial_shapes must be given"
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        if spatial_shapes.is_cpu:
            # On a GPU this would wait for it.
            assert int(spatial_shapes.prod(1).sum()) == value.shape[1]
        if reference_points.shape[-1] not in (2, 4):
            raise ValueError(
                "MultiScaleDeformableAttention: the last dimension of reference_points must be 2 "
                f"or 4; got {reference_points.shape[-1]}"
            )
        levels = (spatial_shapes, level_start_index)
        output = self.attend(query, reference_points, value, *levels, key_padding_mask)
        if not self.batch_first:
            output = output.transpose(0, 1)
        dropped: Tensor = self.dropout(output)
        return dropped + identity
