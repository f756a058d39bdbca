"""Drop-ins for other packages' operators, one module each; importing them changes nothing."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["causal_conv1d", "mamba", "mmcv", "torchvision", "visionmamba"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
