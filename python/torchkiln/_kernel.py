"""A user's own kernels: declared once in Python, launched with tensors and numbers.

Everything behind the declaration (specialising, the cache, tuning, manifests, bundles) is the
engine's and the same as for the operators of torchkiln.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from torchkiln import _control

if TYPE_CHECKING:
    from torchkiln.testing import Case

__all__ = ["Kernel", "ceil_div"]

#: torch's dtypes, at the engine's number for them.
_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _control.DTYPES)
_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}
_HALF_TYPES = (torch.float16, torch.bfloat16)

_TYPE, _INT, _BOOL = 0, 1, 2  # torchkiln_param_kind
_MAX_ARGS, _MAX_PARAMS, _MAX_SIZES, _MAX_POINTS = 64, 16, 8, 4096
_MAX_GRID, _MAX_BLOCK = 2**31 - 1, 1024

Value = int | bool | torch.dtype
Function = Callable[[Any], Any]
Point = Mapping[str, int | bool]
Default = Point | Sequence[Point] | Function | None


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
        self.floating_dtypes = _floating_dtypes(template or {})
        rules = _Rules(
            self.name,
            _parse_template(self.name, template or {}, tunables or {}),
            _parse_args(self.name, args, template or {}),
        )
        rules.grid = _counts(rules, "grid", grid, _MAX_GRID)
        rules.block = _counts(rules, "block", _block_or_tunable(rules, block), _MAX_BLOCK)
        rules.shared = _shared(rules, shared)
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
                "dtypes": _NUMBERS,
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


@dataclass(frozen=True)
class _Param:
    name: str
    kind: int
    tunable: bool
    numbers: list[int]

    def value(self, number: int) -> Value:
        """What functions of the user see."""
        if self.kind == _TYPE:
            return _DTYPES[number]
        return bool(number) if self.kind == _BOOL else number


@dataclass(frozen=True)
class _Arg:
    name: str
    kind: str
    type: int
    type_param: int


class _Rules:
    """Where the engine's questions about a launch are answered by the user's functions."""

    grid: Function
    block: Function
    shared: Function
    legal: Function | None
    default: Default

    def __init__(self, name: str, params: list[_Param], args: list[_Arg]) -> None:
        self.name = name
        self.params = params
        self.args = args
        self.tunables = [p for p in params if p.tunable]
        statics = [p for p in params if not p.tunable]
        sizes = [_Param(a.name, _INT, False, []) for a in args if a.kind == "size"]
        if len(sizes) > _MAX_SIZES:
            raise ValueError(f"{name}: args must have at most {_MAX_SIZES} sizes; got {len(sizes)}")
        # The order in which the engine hands values over.
        self._columns = [*statics, *sizes, *self.tunables]

    @property
    def points(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(p.numbers for p in self.tunables)))

    @property
    def defaults(self) -> list[tuple[int, ...]]:
        """Every point that `default` can return: of a function nothing better is known."""
        if callable(self.default):
            return self.points
        if self.default is None:
            return [tuple(p.numbers[0] for p in self.tunables)]
        if isinstance(self.default, Sequence) and self.default:
            return [self._point(values) for values in self.default]
        return [self._point(self.default)]

    def _point(self, values: Any) -> tuple[int, ...]:
        names = [p.name for p in self.tunables]
        if not isinstance(values, Mapping) or sorted(values) != sorted(names):
            raise ValueError(
                f"{self.name}: default must be a dict of {', '.join(names) or 'no tunable'}; "
                f"got {values!r}"
            )
        for p in self.tunables:
            if values[p.name] not in p.numbers:
                raise ValueError(
                    f"{self.name}: default must take {p.name} from "
                    f"{', '.join(map(str, p.numbers))}; got {values[p.name]!r}"
                )
        return tuple(int(values[name]) for name in names)

    def problem(self, values: Sequence[int], device: Sequence[int]) -> SimpleNamespace:
        """What `grid`, `legal` and `default` see."""
        facts = ("major", "minor", "multiprocessors", "shared_bytes_per_block", "l2_bytes")
        named = {p.name: p.value(v) for p, v in zip(self._columns, values, strict=False)}
        return SimpleNamespace(
            **named, device=SimpleNamespace(**dict(zip(facts, device, strict=True)))
        )

    def geometry(self, values: Sequence[int], device: Sequence[int]) -> tuple[int, ...]:
        p = self.problem(values, device)
        return (*self.grid(p), *self.block(p), self.shared(p))

    def is_legal(self, values: Sequence[int], device: Sequence[int]) -> int:
        assert self.legal is not None
        return int(bool(self.legal(self.problem(values, device))))

    def choose(self, values: Sequence[int], device: Sequence[int]) -> int:
        assert callable(self.default)
        return self.points.index(self._point(self.default(self.problem(values, device))))


# ---- parts of a declaration ----------------------------------------------------------------------


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


def _parse_template(
    kernel: str, template: Mapping[str, Sequence[Value]], tunables: Mapping[str, Sequence[Value]]
) -> list[_Param]:
    params = [_parse_param(kernel, "template", *item) for item in template.items()]
    params += [_parse_param(kernel, "tunables", *item) for item in tunables.items()]
    if len(params) > _MAX_PARAMS:
        raise ValueError(
            f"{kernel}: template and tunables must be at most {_MAX_PARAMS}; got {len(params)}"
        )
    points = math.prod(len(p.numbers) for p in params if p.tunable)
    if points > _MAX_POINTS:
        raise ValueError(f"{kernel}: tunables must have at most {_MAX_POINTS} points; got {points}")
    return params


def _parse_param(kernel: str, argument: str, name: str, values: Sequence[Value]) -> _Param:
    tunable = argument == "tunables"
    kinds = {_kind_of(value) for value in values}
    if len(kinds) == 1 and None not in kinds and not (tunable and kinds == {_TYPE}):
        kind = kinds.pop()
        assert kind is not None
        numbers = [_NUMBERS[v] if isinstance(v, torch.dtype) else int(v) for v in values]
        return _Param(name, kind, tunable, list(dict.fromkeys(numbers)))
    known = "integers or bools" if tunable else "dtypes, integers or bools"
    raise TypeError(
        f"{kernel}: {argument} must give {name} a list of {known}, all of one kind; got {values!r}"
    )


def _floating_dtypes(template: Mapping[str, Sequence[Value]]) -> tuple[torch.dtype, ...]:
    """Of the template types; each once."""
    dtypes = (v for values in template.values() for v in values if isinstance(v, torch.dtype))
    return tuple(dict.fromkeys(dtype for dtype in dtypes if dtype.is_floating_point))


def _kind_of(value: Any) -> int | None:
    if isinstance(value, torch.dtype):
        return _TYPE if value in _NUMBERS else None
    if isinstance(value, bool):
        return _BOOL
    return _INT if isinstance(value, int) else None


def _parse_args(
    kernel: str, args: Mapping[str, str], template: Mapping[str, Sequence[Value]]
) -> list[_Arg]:
    parsed = [_parse_arg(kernel, name, text, template) for name, text in args.items()]
    if len(parsed) > _MAX_ARGS:
        raise ValueError(f"{kernel}: args must be at most {_MAX_ARGS}; got {len(parsed)}")
    if not any(a.kind in ("in", "out", "inout") for a in parsed):
        raise ValueError(
            f"{kernel}: args must have a tensor, whose device the kernel runs on; "
            f"got {', '.join(args) or 'none'}"
        )
    return parsed


def _parse_arg(kernel: str, name: str, text: str, template: Mapping[str, Sequence[Value]]) -> _Arg:
    words = text.split()
    kind = words[0] if len(words) == 2 else "value"
    type_name = words[-1] if words else ""
    is_tensor = kind in ("in", "out", "inout")
    names: list[str] = _control.control("types", {})["types"]
    types = {t for t, values in template.items() if values and _kind_of(values[0]) == _TYPE}
    if len(words) in (1, 2) and kind in ("in", "out", "inout", "size", "value"):
        if is_tensor and type_name in types:
            return _Arg(name, kind, -1, list(template).index(type_name))
        if type_name in names:
            number = names.index(type_name)
            dtype = _DTYPES[number]
            is_integer = not dtype.is_floating_point and dtype is not torch.bool
            if is_tensor or (is_integer if kind == "size" else dtype not in _HALF_TYPES):
                return _Arg(name, kind, number, -1)
    raise ValueError(
        f"{kernel}: args must give {name} 'in T', 'out T', 'inout T', 'size T' with an integer T, "
        f"or a T that is not half, where T is one of {', '.join([*names, *sorted(types)])} (a "
        f"template type for tensors only); got {text!r}"
    )


# ---- geometry ------------------------------------------------------------------------------------


def _block_or_tunable(
    rules: _Rules, block: int | Sequence[int] | Function | None
) -> int | Sequence[int] | Function:
    if block is not None:
        return block
    if not any(p.name == "block_size" for p in rules.params):
        raise ValueError(
            f"{rules.name}: block must be given where there is no tunable block_size; got None"
        )
    return lambda p: p.block_size


def _counts(
    rules: _Rules, argument: str, given: int | Sequence[int] | Function, most: int
) -> Function:
    """A function that returns three checked integers."""

    def checked(value: Any) -> tuple[int, int, int]:
        counts = tuple(value) if isinstance(value, Sequence) else (value,)
        if 1 <= len(counts) <= 3 and all(_is_count(c, most) for c in counts):
            x, y, z = (*map(int, counts), 1, 1)[:3]
            return x, y, z
        raise ValueError(
            f"{rules.name}: {argument} must be 1 to 3 integers from 0 to {most}; got {value!r}"
        )

    if callable(given):
        return lambda p: checked(given(p))
    constant = checked(given)
    return lambda p: constant


def _shared(rules: _Rules, given: int | Function | None) -> Function:
    def checked(value: Any) -> int:
        if _is_count(value, _MAX_GRID):
            return int(value)
        raise ValueError(
            f"{rules.name}: shared must be a number of bytes, an integer from 0; got {value!r}"
        )

    if callable(given):
        return lambda p: checked(given(p))
    constant = checked(0 if given is None else given)
    return lambda p: constant


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _allocate(size: int, device: int) -> tuple[object, int]:
    memory = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
    return memory, memory.data_ptr()


_control.set_allocator(_allocate)
