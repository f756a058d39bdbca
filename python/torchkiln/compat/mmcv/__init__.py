"""torchkiln in place of `mmcv.ops`, with mmcv-lite, with a full mmcv, or with none.

Every name that users import from `mmcv.ops` is there with its signature. What torchkiln does not
have yet raises when it is called or constructed, not before.

Example:
    >>> from torchkiln.compat import mmcv as drop_in
    >>> drop_in.install()
    >>> from mmcv.ops import RoIAlign, nms
    >>> from mmcv.ops.nms import batched_nms
    >>> drop_in.uninstall()
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchkiln.compat.mmcv._tree import Finder

    ops: ModuleType

__all__ = ["install", "ops", "provided", "uninstall"]

_lock = threading.RLock()
_finder: Finder | None = None
_former: dict[str, ModuleType] = {}  # modules of a full mmcv that were imported before


def install() -> None:
    """Puts our modules in place of `mmcv.ops` and everything below it; twice is once.

    Without an installed mmcv, `mmcv` itself is a package that holds `ops` only. Where mmengine is
    installed, the first import of `mmcv.ops` enters our classes into its registry `MODELS`. Names
    that a program took from a full mmcv before stay what they were.
    """
    global _finder
    with _lock:
        if _finder is not None:
            return
        from torchkiln.compat.mmcv._tree import Finder

        _former.update(_take_out())
        _finder = Finder()
        sys.meta_path.insert(0, _finder)
        if "mmcv" in sys.modules:
            importlib.import_module("mmcv.ops")  # sets the attribute of the package


def uninstall() -> None:
    """Puts back what was there before `install`; names that a program took stay ours."""
    global _finder
    with _lock:
        if _finder is None:
            return
        from torchkiln.compat.mmcv import _tree

        sys.meta_path.remove(_finder)
        _finder = None
        _take_out()
        _tree.leave_registry()
        package = sys.modules.get("mmcv")
        if package is not None:
            package.__dict__.pop("ops", None)
            if not hasattr(package, "__file__"):
                del sys.modules["mmcv"]
        sys.modules.update(_former)
        if "mmcv.ops" in _former and package is not None:
            package.__dict__["ops"] = _former["mmcv.ops"]
        _former.clear()


def provided() -> tuple[str, ...]:
    """The public names of `mmcv.ops` that work; the others raise when they are used."""
    from torchkiln.compat.mmcv._names import public

    return tuple(row.name for row in public().values() if row.operator)


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if f"{name}.".startswith("mmcv.ops.")]
    return {name: sys.modules.pop(name) for name in names}


def __getattr__(name: str) -> Any:
    if name != "ops":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchkiln.compat.mmcv._tree import ops

    return ops
