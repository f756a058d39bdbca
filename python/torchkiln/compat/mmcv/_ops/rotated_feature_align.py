"""`mmcv.ops.rotated_feature_align`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors

__all__ = ["RotatedFeatureAlignFunction", "rotated_feature_align"]


@listed_errors
def _apply(features: Tensor, best_rbboxes: Tensor, spatial_scale: float, points: int) -> Tensor:
    assert points in (1, 5), f"points must be 1 or 5; got {points}"
    return ops.rotated_feature_align(features, best_rbboxes, float(spatial_scale), points)


RotatedFeatureAlignFunction = function_class("RotatedFeatureAlignFunction", _apply)


def rotated_feature_align(
    features: Tensor, best_rbboxes: Tensor, spatial_scale: float = 1 / 8, points: int = 1
) -> Tensor:
    """`torchkiln.ops.rotated_feature_align`.

    Raises:
        AssertionError: for points other than 1 and 5.
    """
    return _apply(features, best_rbboxes, spatial_scale, points)
