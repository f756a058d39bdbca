"""MultiScaleDeformableAttention, the layer around multi_scale_deformable_attention_fused."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchkiln.ops._arguments import require_shape
from torchkiln.ops.deformable.multi_scale_deformable_attention import (
    agreeing,
    multi_scale_deformable_attention_fused,
)

__all__ = ["MultiScaleDeformableAttention"]


class Projections(nn.Module):
    """The four layers and what they compute; a base, so that drop-ins keep their peers' names."""

    sampling_offsets: nn.Linear
    attention_weights: nn.Linear
    value_proj: nn.Linear
    output_proj: nn.Linear

    def add_projections(
        self, dims: int, value_dims: int, heads: int, levels: int, points: int
    ) -> None:
        """Adds the layers; their parameters are not set yet."""
        self._grid = (heads, levels, points)
        samples = math.prod(self._grid)
        self.sampling_offsets = nn.Linear(dims, samples * 2)
        self.attention_weights = nn.Linear(dims, samples)
        self.value_proj = nn.Linear(dims, value_dims)
        self.output_proj = nn.Linear(value_dims, dims)

    @torch.no_grad()
    def reset_projections(self) -> None:
        """Points of a head lie in its own direction, one step further each; equal weights."""
        heads, _, points = self._grid
        angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[:, None]
        bias = self.sampling_offsets.bias
        bias.copy_(offsets.expand(*self._grid, 2).reshape(-1))
        for tensor in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            tensor.zero_()
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            layer.bias.zero_()

    def attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """(B, Q, dims) of queries (B, Q, dims) and pixels (B, S, dims)."""
        heads, levels, points = self._grid
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        logits = self.attention_weights(query).unflatten(-1, (heads, levels, points))
        value = self.value_proj(value).unflatten(-1, (heads, -1))
        reference_points = _repeated(reference_points, (*query.shape[:2], levels))
        # Reference points keep the precision that they were given in beside a value of a half type.
        reference_points, offsets, logits = agreeing(value, reference_points, offsets, logits)
        output = multi_scale_deformable_attention_fused(
            value,
            spatial_shapes,
            level_start_index,
            reference_points,
            offsets,
            logits,
            padding_mask,
        )
        result: Tensor = self.output_proj(output)
        return result


def _repeated(reference_points: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """One for all images, queries or levels, as where offsets are added to them, is enough."""
    given = reference_points.shape
    if len(given) != len(sizes) + 1 or any(
        a not in (1, b) for a, b in zip(given, sizes, strict=False)
    ):
        return reference_points  # the operator says what is wrong
    return reference_points.expand(*sizes, -1)


class MultiScaleDeformableAttention(Projections):
    """Deformable attention with its projections, as in Deformable DETR, on the CPU too.

    Args:
        embed_dims: channels of queries, pixels and the output.
        num_heads: divides `value_dims`.
        num_levels: of the pyramid.
        num_points: of a head on each level.
        value_dims: channels that are sampled, all heads together; None: `embed_dims`.

    Raises:
        ValueError: where heads do not divide the channels.

    Source:
        Zhu et al., "Deformable DETR", 2021. The parameters are named and set as there.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        value_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.value_dims = embed_dims if value_dims is None else value_dims
        if num_heads < 1 or self.value_dims % num_heads:
            raise ValueError(
                "MultiScaleDeformableAttention: value_dims must be a multiple of num_heads "
                f"({num_heads}); got {self.value_dims}"
            )
        self.add_projections(embed_dims, self.value_dims, num_heads, num_levels, num_points)
        self.reset_projections()

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            query: (B, Q, embed_dims).
            reference_points: (B, Q, L, 2) x and y, or (B, Q, L, 4) with width and height, in parts
                of each level; 1 in place of B, Q or L: the same for all.
            value: (B, S, embed_dims), pixels of all levels.
            spatial_shapes: (L, 2), int64; height and width.
            level_start_index: (L,), int64; None: levels follow each other.
            padding_mask: (B, S), bool; True for pixels that count as 0.

        Returns:
            (B, Q, embed_dims).
        """
        op = "MultiScaleDeformableAttention"
        require_shape(op, ("B", "Q", self.embed_dims), query=query)
        require_shape(op, ("B", "S", self.embed_dims), value=value)
        levels = (spatial_shapes, level_start_index)
        return self.attend(query, reference_points, value, *levels, padding_mask)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("embed_dims", "num_heads", "num_levels", "num_points", "value_dims")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
