"""Deformable aggregation as a module, as Sparse4D and SparseDrive have it, with its key points."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln.ops._arguments import require_shape, require_tensor, shape, under_autocast, widened
from torchkiln.ops.deformable.deformable_aggregation import deformable_aggregation

__all__ = [
    "DeformableFeatureAggregation",
    "SparseBox3DKeyPointsGenerator",
    "SparsePoint3DKeyPointsGenerator",
]

# Columns of a box: centre, logarithms of its sides, sine and cosine of its yaw; then its velocity.
_CENTRE, _SIDES, _SINE, _COSINE = slice(0, 3), slice(3, 6), 6, 7
# Points behind a camera would divide by zero or change sides.
_LEAST_DEPTH = 1e-5


class SparseBox3DKeyPointsGenerator(nn.Module):
    """Key points of boxes: at fixed places of each box, and at places learned from its features.

    Args:
        embed_dims: channels of the features.
        num_learnable_pts: learned points of a box.
        fix_scale: the fixed points, in sides from the centre.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_learnable_pts: int = 0,
        fix_scale: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        scale = torch.as_tensor(fix_scale if fix_scale is not None else [[0.0, 0.0, 0.0]])
        require_shape("SparseBox3DKeyPointsGenerator", ("points", 3), fix_scale=scale)
        if num_learnable_pts < 0:
            raise ValueError(
                "SparseBox3DKeyPointsGenerator: num_learnable_pts must be at least 0; "
                f"got {num_learnable_pts}"
            )
        self.embed_dims = embed_dims
        self.num_learnable_pts = num_learnable_pts
        self.fix_scale = nn.Parameter(scale.float().clone(), requires_grad=False)
        self.num_pts = len(scale) + num_learnable_pts
        if num_learnable_pts > 0:
            self.learnable_fc = nn.Linear(embed_dims, num_learnable_pts * 3)
            self.init_weight()

    def init_weight(self) -> None:
        """Draws new weights."""
        if self.num_learnable_pts > 0:
            _init_linear(self.learnable_fc)

    def forward(self, anchor: Tensor, instance_feature: Tensor | None = None) -> Tensor:
        """Places the points.

        Args:
            anchor: (bs, Q, 8 or more) x, y, z, log w, log l, log h, sine and cosine of the yaw.
            instance_feature: (bs, Q, embed_dims); without it the learned points are left out.

        Returns:
            (bs, Q, points, 3).
        """
        require_tensor("SparseBox3DKeyPointsGenerator", anchor=anchor)
        if anchor.dim() != 3 or anchor.shape[2] <= _COSINE:
            raise ValueError(
                "SparseBox3DKeyPointsGenerator: anchor must have shape (bs, Q, 8 or more); "
                f"got {shape(anchor)}"
            )
        anchor = widened(anchor)
        scale = self.fix_scale.to(anchor.dtype).expand(*anchor.shape[:2], -1, -1)
        if self.num_learnable_pts > 0 and instance_feature is not None:
            learned = _in_own_dtype(self.learnable_fc, instance_feature).sigmoid() - 0.5
            scale = torch.cat([scale, learned.unflatten(-1, (self.num_learnable_pts, 3))], 2)
        x, y, z = (scale * anchor[..., None, _SIDES].exp()).unbind(-1)
        sine, cosine = anchor[..., _SINE, None], anchor[..., _COSINE, None]
        turned = torch.stack([cosine * x - sine * y, sine * x + cosine * y, z], -1)
        return turned + anchor[..., None, _CENTRE]


class SparsePoint3DKeyPointsGenerator(nn.Module):
    """Key points of lines on a map: at fixed heights around places learned near each vertex.

    Args:
        embed_dims: channels of the features.
        num_sample: vertices of a line.
        num_learnable_pts: learned places near each vertex and height; at least 1.
        fix_height: heights above the ground.
        ground_height: of the ground.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_sample: int = 20,
        num_learnable_pts: int = 1,
        fix_height: Sequence[float] = (0,),
        ground_height: float = 0,
    ) -> None:
        super().__init__()
        if num_learnable_pts < 1:
            raise ValueError(
                "SparsePoint3DKeyPointsGenerator: num_learnable_pts must be at least 1; "
                f"got {num_learnable_pts}"
            )
        self.embed_dims = embed_dims
        self.num_sample = num_sample
        self.num_learnable_pts = num_learnable_pts
        self.fix_height = tuple(fix_height)
        self.ground_height = ground_height
        self.num_pts = num_sample * len(self.fix_height) * num_learnable_pts
        self.learnable_fc = nn.Linear(embed_dims, self.num_pts * 2)
        self.init_weight()

    def init_weight(self) -> None:
        """Draws new weights."""
        _init_linear(self.learnable_fc)

    def forward(self, anchor: Tensor, instance_feature: Tensor) -> Tensor:
        """Places the points.

        Args:
            anchor: (bs, Q, 2 num_sample) x and y of the vertices.
            instance_feature: (bs, Q, embed_dims).

        Returns:
            (bs, Q, points, 3), ordered by vertex, height and learned place.
        """
        sizes = ("bs", "Q", 2 * self.num_sample)
        require_shape("SparsePoint3DKeyPointsGenerator", sizes, anchor=anchor)
        parts = (self.num_sample, len(self.fix_height), self.num_learnable_pts, 2)
        moved = _in_own_dtype(self.learnable_fc, instance_feature).unflatten(-1, parts)
        place = moved + widened(anchor).unflatten(-1, (self.num_sample, 1, 1, 2))
        height = place.new_tensor(self.fix_height)[:, None, None] + self.ground_height
        points = torch.cat([place, height.expand(*place.shape[:-1], 1)], -1)
        return points.flatten(2, 4)


_GENERATORS = {
    generator.__name__: generator
    for generator in (SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator)
}


class DeformableFeatureAggregation(nn.Module):
    """Collects features of instances from the images of all cameras, at key points of each.

    Parameters have the names and shapes of Sparse4D's and SparseDrive's module, so checkpoints of
    either load. Attention weights are normalised inside of the operator, without a copy of them.

    Args:
        embed_dims: channels.
        num_groups: groups of channels with weights of their own; divides `embed_dims`.
        num_levels: levels of the feature maps.
        num_cams: cameras.
        proj_drop: share of outputs that training drops.
        attn_drop: share of points in cameras that training drops; weights are then kept in memory.
        kps_generator: a module that makes key points, or its arguments and `type`, the name of one
            of this package.
        temporal_fusion_module: a module that is kept as `temp_module`; nothing calls it here.
        use_temporal_anchor_embed: kept for those who read it.
        use_deformable_func: whether `forward` gets maps of `feature_maps_format`; else it gets the
            levels. Both are computed by the same operator, on any device.
        use_camera_embed: whether weights depend on where a camera is.
        residual_mode: "add" the instances' features to the output, or "cat" them behind it.

    Raises:
        TypeError: for a temporal fusion that is no module.
        ValueError: for groups that do not divide the channels, another mode or no generator.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_groups: int = 8,
        num_levels: int = 4,
        num_cams: int = 6,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        kps_generator: Mapping[str, Any] | nn.Module | None = None,
        temporal_fusion_module: nn.Module | None = None,
        use_temporal_anchor_embed: bool = True,
        use_deformable_func: bool = False,
        use_camera_embed: bool = False,
        residual_mode: str = "add",
    ) -> None:
        super().__init__()
        name = "DeformableFeatureAggregation"
        if num_groups < 1 or embed_dims % num_groups != 0:
            raise ValueError(
                f"{name}: num_groups must divide the {embed_dims} channels; got {num_groups}"
            )
        if residual_mode not in ("add", "cat"):
            raise ValueError(f'{name}: residual_mode must be "add" or "cat"; got {residual_mode!r}')
        if temporal_fusion_module is not None and not isinstance(temporal_fusion_module, nn.Module):
            raise TypeError(
                f"{name}: temporal_fusion_module must be a module or None; "
                f"got {temporal_fusion_module!r}. Build it first"
            )
        self.embed_dims = embed_dims
        self.num_groups = num_groups
        self.num_levels = num_levels
        self.num_cams = num_cams
        self.attn_drop = attn_drop
        self.use_temporal_anchor_embed = use_temporal_anchor_embed
        self.use_deformable_func = use_deformable_func
        self.residual_mode = residual_mode
        self.proj_drop = nn.Dropout(proj_drop)
        self.kps_generator = _generator_of(kps_generator, embed_dims)
        points: Any = self.kps_generator.num_pts
        self.num_pts = int(points)
        self.temp_module = temporal_fusion_module
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        self.camera_encoder = _camera_encoder(embed_dims) if use_camera_embed else None
        weights = num_groups * num_levels * self.num_pts
        self.weights_fc = nn.Linear(embed_dims, weights * (1 if use_camera_embed else num_cams))
        self.init_weight()

    def init_weight(self) -> None:
        """Draws new weights; all points weigh the same at first."""
        nn.init.zeros_(self.weights_fc.weight)
        nn.init.zeros_(self.weights_fc.bias)
        _init_linear(self.output_proj)

    def forward(
        self,
        instance_feature: Tensor,
        anchor: Tensor,
        anchor_embed: Tensor,
        feature_maps: Sequence[Any],
        metas: Mapping[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        """Collects.

        Args:
            instance_feature: (bs, Q, embed_dims).
            anchor: (bs, Q, numbers), as the generator wants it.
            anchor_embed: (bs, Q, embed_dims).
            feature_maps: (bs, M, embed_dims, H, W) of each level; with `use_deformable_func` the
                three tensors of `feature_maps_format`.
            metas: "projection_mat" (bs, M, 4, 4) from space to image, and, unless these give shares
                of the image, "image_wh" (bs, M, 2) width and height.
            kwargs: left out.

        Returns:
            (bs, Q, embed_dims), twice as many channels with "cat".
        """
        op, sizes = "DeformableFeatureAggregation", ("bs", "Q", self.embed_dims)
        require_shape(op, sizes, instance_feature=instance_feature, anchor_embed=anchor_embed)
        matrices = metas["projection_mat"]
        require_shape(op, ("bs", self.num_cams, 4, 4), projection_mat=matrices)
        points = self.kps_generator(anchor, instance_feature)
        location = project_points(points, matrices, metas.get("image_wh"))
        logits = self._logits(instance_feature + anchor_embed, matrices)
        drops = self.training and self.attn_drop > 0
        maps, *indices = self._maps(feature_maps)
        weights = self._dropped(logits) if drops else logits
        features = deformable_aggregation(
            maps, location, weights, *indices, weights_order="mlpg", softmax=not drops
        )
        output = self.proj_drop(self.output_proj(features.to(instance_feature.dtype)))
        if self.residual_mode == "add":
            return output + instance_feature  # type: ignore[no-any-return]
        return torch.cat([output, instance_feature], -1)

    def _maps(self, feature_maps: Sequence[Any]) -> Sequence[Any]:
        """The levels as one argument, or the three tensors of the format."""
        if not self.use_deformable_func:
            return [feature_maps]
        if not isinstance(feature_maps, (list, tuple)) or len(feature_maps) != 3:
            listed = isinstance(feature_maps, (list, tuple))
            got = f"{len(feature_maps)} items" if listed else type(feature_maps).__name__
            raise ValueError(
                "DeformableFeatureAggregation: feature_maps must be the three tensors of "
                f"feature_maps_format with use_deformable_func; got {got}"
            )
        return feature_maps

    def _logits(self, feature: Tensor, projection: Tensor) -> Tensor:
        """(bs, Q, cameras, levels, points, groups)."""
        if self.camera_encoder is not None:
            # Matrices come in the dtype of the data, not in that of the module.
            first: Any = self.camera_encoder[0].weight
            camera = self.camera_encoder(projection[:, :, :3].flatten(2).to(first.dtype))
            feature = feature[:, :, None] + camera[:, None]
        parts = (self.num_cams, self.num_levels, self.num_pts, self.num_groups)
        logits: Tensor = self.weights_fc(feature)
        return logits.reshape(*feature.shape[:2], *parts)

    def _dropped(self, logits: Tensor) -> Tensor:
        """Weights, without the points in cameras that this call leaves out."""
        weights = logits.flatten(2, 4).softmax(2).reshape(logits.shape)
        batch, queries, cameras, _, points, _ = logits.shape
        kept = weights.new_ones(batch, queries, cameras, 1, points, 1)
        return weights * nn.functional.dropout(kept, self.attn_drop)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"embed_dims={self.embed_dims}, num_groups={self.num_groups}, "
            f"num_levels={self.num_levels}, num_cams={self.num_cams}, "
            f"residual_mode={self.residual_mode!r}"
        )

    @staticmethod
    def project_points(
        key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None = None
    ) -> Tensor:
        """(bs, M, Q, P, 2): where each camera sees the points, in the peers' order of axes."""
        return project_points(key_points, projection_mat, image_wh).movedim(3, 1)


def project_points(
    key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None = None
) -> Tensor:
    """Where each camera sees points of space.

    Args:
        key_points: (bs, Q, P, 3).
        projection_mat: (bs, M, 4, 4).
        image_wh: (bs, M, 2) width and height, which the result is divided by; 1 in place of bs or
            M: the same for all.

    Returns:
        (bs, Q, P, M, 2), float32 of half types and under autocast, too; beyond all images for
        points behind a camera.
    """
    if image_wh is not None:
        # What has fewer dimensions would go along queries.
        require_shape("DeformableFeatureAggregation", ("bs", "M", 2), image_wh=image_wh)
    points = widened(key_points)[:, :, :, None, None]
    # The fourth row says nothing.
    rows = projection_mat[:, None, None, :, :3].to(points.dtype)
    # No matrix product: autocast would round it to a half type, and TF32 to ten bits.
    seen = rows[..., 3]
    for axis in range(3):
        seen = torch.addcmul(seen, points[..., axis], rows[..., axis])
    place = seen[..., :2] / seen[..., 2:].clamp(min=_LEAST_DEPTH)
    return place if image_wh is None else place / image_wh[:, None, None]


def _generator_of(given: Mapping[str, Any] | nn.Module | None, embed_dims: int) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    options = dict(given) if isinstance(given, Mapping) else {"type": given}
    name = options.pop("type", None)
    if not isinstance(name, str) or name not in _GENERATORS:
        raise ValueError(
            "DeformableFeatureAggregation: kps_generator must be a module, or have a type among "
            f"{', '.join(_GENERATORS)}; got {name!r}"
        )
    return _GENERATORS[name](**{**options, "embed_dims": embed_dims})


def _camera_encoder(channels: int) -> nn.Sequential:
    """Of the 12 numbers of a projection."""
    layers: list[nn.Module] = []
    for inputs in (12, channels):
        layers += [nn.Linear(inputs, channels), nn.ReLU(), nn.LayerNorm(channels)]
    return nn.Sequential(*layers)


def _in_own_dtype(layer: nn.Linear, feature: Tensor) -> Tensor:
    """Without autocast: what the layer gives are places; at least float32."""
    if not under_autocast(feature):
        return widened(layer(feature))
    with torch.autocast(feature.device.type, enabled=False):
        return widened(layer(feature.to(layer.weight.dtype)))


def _init_linear(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
