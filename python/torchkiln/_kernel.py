"""A user's own kernels: declared once in Python, launched with tensors and numbers.

Everything behind the declaration (specialising, the cache, tuning, manifests, bundles) is the
engine's and the same as for the operators of torchkiln.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchkiln import _control
from torchkiln._declaration import (
    MAX_BLOCK,
    MAX_GRID,
    NUMBERS,
    Default,
    Function,
    Rules,
    Value,
    block_or_tunable,
    counts,
    floating_dtypes,
    parse_args,
    parse_template,
    shared_of,
)

if TYPE_CHECKING:
    from torchkiln.testing import Case

__all__ = ["Kernel", "ceil_div"]


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up: how many blocks of `b` hold `a`.

    Example:
        >>> import torchkiln
        >>> torchkiln.ceil_div(1000, 256)
        4
    """
    return -(-a // b)


class Kernel(_control.Launcher):
    """A CUDA kernel template of your own.

    Declaring it compiles nothing and needs no GPU. A call launches it on the current stream of its
    tensors' device; the first call of each specialisation compiles it with NVRTC, or finds it in
    the cache or a bundle. Manifests, `warm`, bundles, `TORCHKILN_JIT`, tuning, `explain` and
    `dump` treat it like the kernels of torchkiln.

    Declare it once, at the top of a module: a declaration lives as long as the process.

    Args:
        source: CUDA C++ text, or a file (relative to the file that declares the kernel). It may
            include `common/` and `geometry/` headers of torchkiln, and `headers`; nothing else.
            torch's float16 and bfloat16 are `torchkiln::half` and `torchkiln::bfloat16` of
            "common/types.h".
        entry: the `__global__` function, as it is named from the global namespace:
            "forward" or "mine::forward".
        args: the function's parameters in order, name to kind. `"in T"`, `"out T"` and `"inout T"`
            are contiguous CUDA tensors, passed as `const T*` (`in`) or `T*`; `"size T"` is an
            integer that `grid`, `legal` and `default` see and by which tuning is remembered; `"T"`
            is any other number. T is float, half, bfloat16, double, bool, i8, i16, i32, i64, u8,
            u16, u32 or u64, and for tensors also the name of a template type.
        template: static template parameters, name to possible values: dtypes, integers or bools.
            A type is bound by the first tensor of that type; others are given by keyword at the
            call. One with a single value need not be given.
        tunables: template parameters after those of `template` that only change the speed, name to
            possible integers or bools.
        grid: blocks: an integer, up to three of them, or a function that returns them. Functions
            get an object with all sizes, template parameters and tunables by name, and `device`
            (major, minor, multiprocessors, shared_bytes_per_block, l2_bytes). They must be pure:
            an answer is remembered. A grid with a 0 launches nothing.
        block: threads, likewise; by default the tunable `block_size`.
        shared: bytes of dynamic shared memory, or a function; none by default.
        legal: whether a point of the tunables can run a problem; all by default. A choice is
            remembered for all sizes between two powers of two, so it must not tell those apart:
            what divides a size is for `template`.
        default: the tunables that run without tuning: a dict; a list of dicts, of which the first
            legal one runs; or a function that returns a dict, and then `warm --ops` compiles every
            legal point. By default the first value of each.
        name: what the command line, manifests and errors call it; letters, digits, `_`, `-` and
            `/`. By default the file's name, for a text the entry and digits of its SHA-256. Bundled
            kernels should have one.
        headers: further headers that the source includes, name to text or file.
        tolerance: how far results of two points of the tunables may be apart, relative to the
            largest value; by default by the type.
        min_architecture: the oldest architecture that can run it, 75 for sm_75.
        reference: the same function in PyTorch, with the kernel's arguments by name: it writes the
            `out` and `inout` tensors. `torchkiln verify` compares with it.
        cases: what `torchkiln verify` tries it on, `torchkiln.testing.Case`s that make all
            arguments by name.

    Calls take the arguments of `args` in order or by name, and template parameters by name. They
    return nothing.

    Raises:
        ValueError, TypeError: the declaration or a call is wrong; the text names the argument.
        torchkiln.errors.KernelCompileError: at a call, the source does not compile, or its
            parameters are not those of `args`.

    Devices: CUDA. Not differentiable; `torchkiln.library.op` makes an operator of it.

    Example:
        >>> import torch, torchkiln
        >>> scale = torchkiln.Kernel(
        ...     '''
        ...     #include "common/types.h"
        ...     template <class Scalar, int kBlockSize>
        ...     __global__ void scale(const Scalar* x, Scalar* out, long long n, float factor) {
        ...       const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
        ...       if (i < n) torchkiln::store(out[i], torchkiln::load(x[i]) * factor);
        ...     }''',
        ...     "scale",
        ...     args={"x": "in Scalar", "out": "out Scalar", "n": "size i64", "factor": "float"},
        ...     template={"Scalar": [torch.float32, torch.float16, torch.bfloat16]},
        ...     tunables={"block_size": [128, 256, 512]},
        ...     grid=lambda p: torchkiln.ceil_div(p.n, p.block_size),
        ...     name="doc_scale",
        ... )
        >>> scale
        <torchkiln.Kernel doc_scale: scale(x, out, n, factor)>
        >>> x = torch.ones(1000)
        >>> scale(x, torch.empty_like(x), 1000, 0.5)  # on a GPU: x.cuda()
        Traceback (most recent call last):
        ...
        ValueError: doc_scale: x must be on a CUDA device; got cpu. ...
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        entry: str,
        *,
        args: Mapping[str, str],
        grid: int | Sequence[int] | Function,
        template: Mapping[str, Sequence[Value]] | None = None,
        tunables: Mapping[str, Sequence[int | bool]] | None = None,
        block: int | Sequence[int] | Function | None = None,
        shared: int | Function | None = None,
        legal: Function | None = None,
        default: Default = None,
        name: str | None = None,
        headers: Mapping[str, str | os.PathLike[str]] | None = None,
        tolerance: float | None = None,
        min_architecture: int = 75,
        reference: Callable[..., None] | None = None,
        cases: Sequence[Case] = (),
    ) -> None:
        caller = sys._getframe(1).f_globals
        folder = Path(caller["__file__"]).parent if "__file__" in caller else None
        text, stem = _read_source(source, folder)
        texts = {key: _read_header(value, folder) for key, value in (headers or {}).items()}
        self.name = name or stem or _name_of(entry, text, texts)
        self.entry = entry
        self.args = dict(args)
        self.reference = reference
        self.floating_dtypes = floating_dtypes(template or {})
        rules = Rules(
            self.name,
            parse_template(self.name, template or {}, tunables or {}),
            parse_args(self.name, args, template or {}),
        )
        rules.grid = counts(rules, "grid", grid, MAX_GRID)
        rules.block = counts(rules, "block", block_or_tunable(rules, block), MAX_BLOCK)
        rules.shared = shared_of(rules, shared)
        rules.legal, rules.default = legal, default
        path = f"user/{self.name}.cuh"
        for header, content in texts.items():
            _control.add_template(os.path.join(os.path.dirname(path), header), content)
        _control.add_template(path, text)
        super().__init__(
            {
                "name": self.name,
                "path": path,
                "entry": entry,
                "module": _module_of(caller),
                "args": [(a.name, a.kind, a.type, a.type_param) for a in rules.args],
                "params": [(p.name, p.kind, p.tunable, p.numbers) for p in rules.params],
                "dtypes": NUMBERS,
                "defaults": rules.defaults,
                "geometry": rules.geometry,
                "legal": None if legal is None else rules.is_legal,
                "choose": rules.choose if callable(default) else None,
                "tolerance": tolerance or 0.0,
                "min_architecture": min_architecture,
            }
        )
        if reference is not None:
            from torchkiln.testing import _own

            _own.register_kernel(self, cases)

    def __repr__(self) -> str:
        return f"<torchkiln.Kernel {self.name}: {self.entry}({', '.join(self.args)})>"


# ---- where a declaration comes from --------------------------------------------------------------


def _read_source(source: str | os.PathLike[str], folder: Path | None) -> tuple[str, str | None]:
    """The text, and the file's name without its suffix."""
    if isinstance(source, str) and ("\n" in source or "__global__" in source):
        return source, None
    path = _resolve(source, folder)
    return _read_file(path, "source"), path.stem


def _read_header(header: str | os.PathLike[str], folder: Path | None) -> str:
    return header if isinstance(header, str) else _read_file(_resolve(header, folder), "headers")


def _resolve(path: str | os.PathLike[str], folder: Path | None) -> Path:
    return folder / path if folder is not None else Path(path)


def _read_file(path: Path, argument: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"Kernel: {argument} must be CUDA C++ or a file that can be read; got {path} "
            f"({error.strerror})"
        ) from None


def _name_of(entry: str, text: str, headers: Mapping[str, str]) -> str:
    """Another text has another name, so that it can be declared in the same process."""
    digest = hashlib.sha256(repr((text, sorted(headers.items()))).encode()).hexdigest()
    return f"{entry.rpartition('::')[2]}_{digest[:8]}"


def _module_of(caller: Mapping[str, Any]) -> str | None:
    """What `--import` needs: a module, or the file of a program."""
    name = caller.get("__name__")
    if name != "__main__":
        return name
    file = caller.get("__file__")
    return None if file is None else os.path.abspath(file)


def _allocate(size: int, device: int) -> tuple[object, int]:
    memory = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
    return memory, memory.data_ptr()


_control.set_allocator(_allocate)
