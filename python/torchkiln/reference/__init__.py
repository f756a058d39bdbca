"""Plain PyTorch versions of the operators, written from their definitions, one flat namespace.

Each has the arguments of its schema, runs on any device and in float64, and is differentiated by
torch. They share no code with the kernels: the tests judge the kernels by them.

The namespace is what the modules below export, so a new reference is one new file.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


__all__ = []
for _info in pkgutil.walk_packages(__path__, f"{__name__}."):
    _module = importlib.import_module(_info.name)
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        __all__ += [_name]
