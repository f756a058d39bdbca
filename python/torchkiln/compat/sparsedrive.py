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

import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

from torch import Tensor

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

_PACKAGE = "projects.mmdet3d_plugin.ops"
_MODULE = f"{_PACKAGE}.deformable_aggregation"

_lock = threading.RLock()
_former: dict[str, ModuleType | None] | None = None  # None: not installed


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


def install() -> None:
    """Puts our functions where the projects import them from; twice is once.

    Names that a program took from the project's own package before stay what they were.
    """
    global _former
    with _lock:
        if _former is not None:
            return
        module = ModuleType(_MODULE, "Deformable aggregation of torchkiln.")
        module.__dict__.update(
            DeformableAggregationFunction=DeformableAggregationFunction,
            CUDA_EXT_AVAILABLE=CUDA_EXT_AVAILABLE,
        )
        package = ModuleType(_PACKAGE, "The operators of torchkiln.")
        package.__path__ = []
        package.__dict__.update(
            CUDA_EXT_AVAILABLE=CUDA_EXT_AVAILABLE,
            DeformableAggregationFunction=DeformableAggregationFunction,
            deformable_aggregation=module,
            deformable_aggregation_function=deformable_aggregation_function,
            feature_maps_format=feature_maps_format,
        )
        modules = {_PACKAGE: package, _MODULE: module}
        for name, made in modules.items():
            # find_spec raises without one
            made.__spec__ = ModuleSpec(name, None, is_package=made is package)
        _former = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        _tell_parent(package)


def uninstall() -> None:
    """Puts back what was there before `install`; names that a program took stay ours."""
    global _former
    with _lock:
        if _former is None:
            return
        for name, module in _former.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        _tell_parent(_former[_PACKAGE])
        _former = None


def _tell_parent(package: ModuleType | None) -> None:
    parent = sys.modules.get(_PACKAGE.rpartition(".")[0])
    if parent is None:
        return
    if package is None:
        parent.__dict__.pop("ops", None)
    else:
        parent.__dict__["ops"] = package
