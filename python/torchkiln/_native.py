"""Loads the operator library, once. It lies beside the control module, not beside this file.

In an editable install the two folders differ.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os

import torch

try:
    from torchkiln import _control
except ImportError as error:
    raise ImportError(
        f"torchkiln's compiled part cannot be loaded ({error}). Build it with 'pip install .'"
    ) from error

# Any operator would do; this one has been there since the first release.
_WITNESS = "torchkiln::box_iou"


def load() -> None:
    """Registers the schemas and kernels with torch. Loading them twice would crash the process."""
    folder = os.path.dirname(_control.__file__)
    path = os.path.join(folder, f"libtorchkiln_ops-{_control.version()}.so")
    if os.path.realpath(path) in torch.ops.loaded_libraries:
        return
    if torch._C._jit_get_schemas_for_operator(_WITNESS):
        raise ImportError(
            f"torchkiln: the operators are registered already, by another copy than {path}. "
            "Keep one copy of torchkiln on the path"
        )
    torch.ops.load_library(path)


def statistics() -> dict[str, int]:
    """The process's counters by name, the same as C++'s `torchkiln::statistics()`.

    Counts launches, compiles, where kernels came from and what loading them took; all start at 0
    with the process and only grow.

    Example:
        >>> import torchkiln
        >>> torchkiln.statistics()["launches"] >= 0
        True
    """
    counters: dict[str, int] = _control.control("statistics", {})
    return counters


def version() -> str:
    """Version of the compiled part, which is the version of everything."""
    return _control.version()
