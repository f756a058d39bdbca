"""torchkiln behind `torchvision.ops`: `install()` before or after `import torchvision`.

torchvision's wheels are built for one torch with one CUDA. With any other torch, a CPU build for
example, their C++ library cannot be loaded and `import torchvision` fails. `install()` finds that
out by loading it, and then registers the missing `torchvision::*` operators itself, so that
torchvision imports and its `ops` run on our kernels. Where torchvision is healthy, `install()` puts
our kernels in front of its own and `uninstall()` takes them away again. Either way, all levels of
`MultiScaleRoIAlign` are pooled in one launch: the class, its state and its signature are
torchvision's, and scripts, traces and maps of several dtypes still go level by level.

Example:
    >>> from torchkiln.compat import torchvision as drop_in
    >>> drop_in.install()  # doctest: +SKIP
    >>> import torchvision  # doctest: +SKIP
    >>> keep = torchvision.ops.nms(boxes, scores, 0.5)  # doctest: +SKIP
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchkiln.compat import _torchvision_rules
from torchkiln.compat._imports import AfterImport
from torchkiln.compat._pyramid import Replacement, suits

__all__ = ["calls", "install", "is_healthy", "provided", "uninstall"]

_lock = threading.RLock()
# What uninstall() takes back, of C++ and of Python.
_kernels: list[ctypes.c_void_p] = []
_libraries: list[torch.library.Library] = []
_defined = False  # torchvision's library could not be loaded and the schemas are ours


def is_healthy() -> bool:
    """Tells whether torchvision's own C++ library can be loaded with this torch.

    It is loaded for that, which registers its operators as `import torchvision` does. False too
    where torchvision is not installed.
    """
    with _lock:
        return not _defined and _own_library_loads()


def install() -> None:
    """Makes the operators behind `torchvision.ops` ours, as far as we have them; twice is once.

    With a torchvision that cannot load its own library, operators that we do not have raise a
    RuntimeError that says so when they are called, and as there is nothing to give back,
    `uninstall()` then leaves things as they are.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: torch refused a registration.
    """
    global _defined
    with _lock:
        if _kernels:
            return
        locations = _locations()
        if not locations:
            raise ModuleNotFoundError(
                "torchvision is not installed, so there is nothing to stand behind. "
                "Run: pip install torchvision"
            )
        if _own_library_loads():
            _cover([row for row in _operators() if row.provided])
            _pyramid.install()
            return
        missing = [row for row in _operators() if not hasattr(torch.ops.torchvision, row.name)]
        for row in missing:
            _native().define(row.index)
        rows = [row for row in _operators() if row in missing or row.provided]
        _register(row for row in rows if row.name not in _torchvision_rules.KERNELS)
        _libraries.append(_torchvision_rules.implement(row.name for row in rows))
        _defined = True
        if PathFinder.find_spec("_autograd_registrations", locations) is None:
            _torchvision_rules.register()
        _tell_torchvision()
        _pyramid.install()


def uninstall() -> None:
    """Gives torchvision's own kernels back; does nothing when it has none (see `install`)."""
    with _lock:
        if _defined:
            return
        _pyramid.uninstall()
        while _kernels:
            _native().release(_kernels.pop())
        while _libraries:
            _libraries.pop()._destroy()


def provided() -> tuple[str, ...]:
    """Names of the `torchvision::` operators that torchkiln has."""
    return tuple(row.name for row in _operators() if row.provided)


def calls() -> dict[str, int]:
    """How often each of our `torchvision::` kernels answered in this process."""
    return {row.name: row.calls for row in _operators() if row.provided}


@dataclass(frozen=True)
class _Row:
    index: int
    name: str
    provided: bool
    calls: int

    @property
    def keys(self) -> tuple[str, ...]:
        # No tensor decides where an operator without arguments runs.
        return ("CompositeExplicitAutograd",) if self.name == "_cuda_version" else ("CPU", "CUDA")


class _Native:
    """The exported functions of bindings/compat/torchvision.cpp."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._operator = library.torchkiln_torchvision_operator
        self._operator.restype = ctypes.c_char_p
        self._define = library.torchkiln_torchvision_define
        self._define.restype = ctypes.c_char_p
        self._implement = library.torchkiln_torchvision_implement
        self._implement.restype = ctypes.c_char_p
        self._release = library.torchkiln_torchvision_release
        self._release.restype = None

    def operator(self, index: int) -> _Row | None:
        provided, calls = ctypes.c_int32(), ctypes.c_int64()
        name = self._operator(index, ctypes.byref(provided), ctypes.byref(calls))
        if name is None:
            return None
        text = name.decode()
        is_provided = bool(provided.value) or text in _torchvision_rules.KERNELS
        return _Row(index, text, is_provided, calls.value + _torchvision_rules.calls[text])

    def define(self, index: int) -> None:
        # Never taken back: torchvision's Python keeps references to the schemas.
        self._check(self._define(index, ctypes.byref(ctypes.c_void_p())))

    def implement(self, index: int, key: str) -> ctypes.c_void_p:
        registration = ctypes.c_void_p()
        self._check(self._implement(index, key.encode(), ctypes.byref(registration)))
        return registration

    def release(self, registration: ctypes.c_void_p) -> None:
        self._release(registration)

    @staticmethod
    def _check(sentence: bytes | None) -> None:
        if sentence is not None:
            raise RuntimeError(
                f"torchkiln.compat.torchvision: torch refused a registration: {sentence.decode()}"
            )


@functools.cache
def _native() -> _Native:
    from torchkiln import _control

    folder = Path(str(_control.__file__)).parent
    return _Native(folder / f"libtorchkiln_ops-{_control.version()}.so")


def _operators() -> list[_Row]:
    rows: list[_Row] = []
    while (row := _native().operator(len(rows))) is not None:
        rows.append(row)
    return rows


def _register(rows: Iterable[_Row]) -> None:
    _kernels.extend(_native().implement(row.index, key) for row in rows for key in row.keys)


def _cover(rows: Sequence[_Row]) -> None:
    """Registers over what is there, without the warning that torch has for the first such case."""

    def register() -> None:
        _register(row for row in rows if row.name not in _torchvision_rules.KERNELS)
        there = [row.name for row in rows if hasattr(torch.ops.torchvision, row.name)]
        _libraries.append(_torchvision_rules.implement(there))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        _Buffered.apply(register)  # type: ignore[no-untyped-call]


class _Buffered(torch.autograd.Function):
    """Makes a call within which warnings of torch's C++ become Python's and can be filtered."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None]) -> None:
        call()


def _locations() -> list[str]:
    spec = find_spec("torchvision")
    return list(spec.submodule_search_locations or []) if spec is not None else []


@functools.cache
def _own_library_loads() -> bool:
    spec = PathFinder.find_spec("_C", _locations())
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError:
        return False
    return True


def _correct(extension: ModuleType) -> None:
    def _has_ops() -> bool:
        return True

    extension._has_ops = _has_ops  # type: ignore[attr-defined]


def _tell_torchvision() -> None:
    """Makes torchvision believe that its operators are there, now or when it is imported."""
    if "torchvision" in sys.modules:
        if "torchvision.extension" in sys.modules:
            _correct(sys.modules["torchvision.extension"])
        return
    # An import that failed before leaves submodules behind, which know of no operators.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    AfterImport("torchvision.extension", _correct).enter()


def _all_levels(module: ModuleType, theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What stands for `torchvision.ops.poolers._multiscale_roi_align`."""

    def pool(
        x_filtered: list[Tensor],
        boxes: list[Tensor],
        output_size: Sequence[int],
        sampling_ratio: int,
        scales: list[float] | None,
        mapper: Any,
    ) -> Tensor:
        levels = len(x_filtered)
        is_whole = mapper is not None and mapper.k_max - mapper.k_min + 1 == levels
        if not (scales and is_whole and suits(x_filtered)):
            return theirs(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
        from torchkiln.ops import multi_scale_roi_align

        first = mapper.k_min - mapper.lvl0 - mapper.eps
        sides = [mapper.s0 * 2.0 ** (first + i) for i in range(1, levels)]
        height, width = output_size
        pooled = multi_scale_roi_align(
            x_filtered, boxes, (height, width), scales, sides, sampling_ratio
        )
        return pooled.to(x_filtered[0].dtype)  # under autocast it is computed in float32

    return pool


_pyramid = Replacement("torchvision.ops.poolers", "_multiscale_roi_align", _all_levels)
