"""Drop-ins for other packages' operators, one module each; importing them changes nothing.

Example:
    >>> import torchkiln
    >>> torchkiln.compat.mmcv.install()
    >>> torchkiln.compat.mmcv.uninstall()
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchkiln.compat import (
        causal_conv1d,
        deformable_detr,
        mamba,
        mmcv,
        mmdet,
        sparsedrive,
        torchvision,
        visionmamba,
    )

__all__ = [
    "causal_conv1d",
    "deformable_detr",
    "mamba",
    "mmcv",
    "mmdet",
    "sparsedrive",
    "torchvision",
    "visionmamba",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
