"""CUDA operators for PyTorch, compiled on the machine that runs them.

Import loads the operator library and registers the operators. It opens no driver and no compiler,
compiles nothing, starts no process and writes no file; that happens at the first call on a GPU.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchkiln import _native

_native.load()

from torchkiln import errors, ops  # noqa: E402 - the schemas must exist before the operators
from torchkiln._backend import backend  # noqa: E402
from torchkiln._native import statistics  # noqa: E402

if TYPE_CHECKING:
    from torchkiln import compat, library, nn, reference, testing, tuning
    from torchkiln._kernel import Kernel, ceil_div
    from torchkiln.deployment import record, seal
    from torchkiln.testing import verify
    from torchkiln.tuning import autotune

__all__ = [
    "Kernel",
    "__version__",
    "autotune",
    "backend",
    "ceil_div",
    "compat",
    "errors",
    "library",
    "nn",
    "ops",
    "record",
    "reference",
    "seal",
    "statistics",
    "testing",
    "tuning",
    "verify",
]

__version__ = _native.version()

_LAZY_MODULES = frozenset({"compat", "library", "nn", "reference", "testing", "tuning"})
_LAZY_NAMES = {
    "Kernel": "torchkiln._kernel",
    "autotune": "torchkiln.tuning",
    "ceil_div": "torchkiln._kernel",
    "record": "torchkiln.deployment",
    "seal": "torchkiln.deployment",
    "verify": "torchkiln.testing",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"torchkiln.{name}")
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module 'torchkiln' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
