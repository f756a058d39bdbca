"""torchkiln in place of `projects.mmdet3d_plugin.ops` of SparseDrive and Sparse4D.

No extension has to be built, and no line of the project changes.

Example:
    >>> from torchkiln.compat import sparsedrive as drop_in
    >>> drop_in.install()
    >>> from projects.mmdet3d_plugin.ops import deformable_aggregation_function, feature_maps_format
    >>> drop_in.uninstall()
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Final

from torch import Tensor

from torchkiln.compat._replaced import Replaced, module
from torchkiln.ops.deformable.deformable_aggregation import (
    deformable_aggregation_function,
    feature_maps_format,
)

__all__ = [
    "CUDA_EXT_AVAILABLE",
    "DeformableAggregationFunction",
    "deformable_aggregation_function",
    "feature_maps_format",
    "install",
    "uninstall",
]

#: What projects ask before they take the operator instead of grid_sample. There is nothing that
#: could be missing: kernels are compiled at the first call on a GPU, and the CPU has its own.
CUDA_EXT_AVAILABLE: Final = True


class DeformableAggregationFunction:
    """What projects call by `apply`, as if it were an `autograd.Function`."""

    @staticmethod
    def apply(
        feature_maps: Tensor,
        spatial_shape: Tensor,
        scale_start_index: Tensor,
        sampling_location: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """`torchkiln.ops.deformable_aggregation_function`."""
        return deformable_aggregation_function(
            feature_maps, spatial_shape, scale_start_index, sampling_location, weights
        )


_PACKAGE = "projects.mmdet3d_plugin.ops"
_ALL = {
    "CUDA_EXT_AVAILABLE": CUDA_EXT_AVAILABLE,
    "DeformableAggregationFunction": DeformableAggregationFunction,
    "deformable_aggregation_function": deformable_aggregation_function,
    "feature_maps_format": feature_maps_format,
}
_OF_MODULE = {name: _ALL[name] for name in ("CUDA_EXT_AVAILABLE", "DeformableAggregationFunction")}
_module = module(f"{_PACKAGE}.deformable_aggregation", _OF_MODULE)
_replaced = Replaced(
    [module(_PACKAGE, {"__path__": [], "deformable_aggregation": _module, **_ALL}), _module],
    [
        module("projects", {"__path__": []}),
        module("projects.mmdet3d_plugin", {"__path__": []}),
    ],
)
install = _replaced.install
uninstall = _replaced.uninstall
