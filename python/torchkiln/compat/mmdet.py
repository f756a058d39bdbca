"""torchkiln behind mmdet: `mmcv.ops`, and all levels of a pyramid in one launch.

`install()` puts `torchkiln.compat.mmcv` in place of `mmcv.ops`, and lets mmdet's
`SingleRoIExtractor` pool all its levels at once. Configurations, checkpoints, class and state stay
as they are. What our operator does not do goes level by level as before: another RoI layer than an
averaging `RoIAlign`, a subclass with levels of its own, `roi_scale_factor`, traces.

Example:
    >>> from torchkiln.compat import mmdet as drop_in
    >>> drop_in.install()  # doctest: +SKIP
    >>> import mmdet.models  # doctest: +SKIP
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from torchkiln.compat import mmcv
from torchkiln.compat._pyramid import Replacement, suits

__all__ = ["install", "uninstall"]

_MODULE = "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor"


def install() -> None:
    """Before or after `import mmdet`, which needs an `mmcv.ops` to be imported; twice is once."""
    mmcv.install()
    _extractor.uninstall()
    _extractor.install()


def uninstall() -> None:
    """Puts back what was there before `install`."""
    _extractor.uninstall()
    mmcv.uninstall()


def _layer_settings(layers: Sequence[Any]) -> tuple[Any, ...] | None:
    """Size, samples and alignment of an averaging RoIAlign, if all layers are one and agree."""
    from torchkiln.compat.mmcv._ops.roi_align import RoIAlign

    if not all(type(layer) is RoIAlign for layer in layers):
        return None
    settings = {
        (layer.output_size, layer.sampling_ratio, layer.aligned, layer.pool_mode)
        for layer in layers
    }
    *common, pool_mode = settings.pop()
    return tuple(common) if not settings and pool_mode == "avg" else None


def _all_levels(module: ModuleType, theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What stands for `SingleRoIExtractor.forward`."""
    levels_of = module.SingleRoIExtractor.map_roi_levels

    def forward(
        self: Any,
        feats: Sequence[Tensor],
        rois: Tensor,
        roi_scale_factor: float | None = None,
    ) -> Tensor:
        layers = list(self.roi_layers)[: len(feats)]
        is_plain = roi_scale_factor is None and type(self).map_roi_levels is levels_of
        settings = _layer_settings(layers) if is_plain and suits(feats) else None
        if settings is None or len(layers) < len(feats):
            return theirs(self, feats, rois, roi_scale_factor)
        from torchkiln.ops import multi_scale_roi_align

        size, sampling_ratio, aligned = settings
        # floor(log2(side / finest_scale + 1e-6)) reaches i from here on.
        sides = [self.finest_scale * (2.0**i - 1e-6) for i in range(1, len(feats))]
        scales = [layer.spatial_scale for layer in layers]
        rows = rois.type_as(feats[0])
        pooled = multi_scale_roi_align(feats, rows, size, scales, sides, sampling_ratio, aligned)
        return pooled.to(feats[0].dtype)  # under autocast it is computed in float32

    return forward


_extractor = Replacement(_MODULE, "SingleRoIExtractor.forward", _all_levels)
