"""The parts of a kernel's declaration: its parameters, and the user's functions behind them."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from torchkiln import _control

#: torch's dtypes, at the engine's number for them.
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _control.DTYPES)
NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}
_HALF_TYPES = (torch.float16, torch.bfloat16)

_TYPE, _INT, _BOOL = 0, 1, 2  # torchkiln_param_kind
_MAX_ARGS, _MAX_PARAMS, _MAX_SIZES, _MAX_POINTS = 64, 16, 8, 4096
MAX_GRID, MAX_BLOCK = 2**31 - 1, 1024

Value = int | bool | torch.dtype
Function = Callable[[Any], Any]
Point = Mapping[str, int | bool]
Default = Point | Sequence[Point] | Function | None


@dataclass(frozen=True)
class Param:
    name: str
    kind: int
    tunable: bool
    numbers: list[int]

    def value(self, number: int) -> Value:
        """What functions of the user see."""
        if self.kind == _TYPE:
            return DTYPES[number]
        return bool(number) if self.kind == _BOOL else number


@dataclass(frozen=True)
class Arg:
    name: str
    kind: str
    type: int
    type_param: int


class Rules:
    """Where the engine's questions about a launch are answered by the user's functions."""

    grid: Function
    block: Function
    shared: Function
    legal: Function | None
    default: Default

    def __init__(self, name: str, params: list[Param], args: list[Arg]) -> None:
        self.name = name
        self.params = params
        self.args = args
        self.tunables = [p for p in params if p.tunable]
        statics = [p for p in params if not p.tunable]
        sizes = [Param(a.name, _INT, False, []) for a in args if a.kind == "size"]
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


# ---- parameters ----------------------------------------------------------------------------------


def parse_template(
    kernel: str, template: Mapping[str, Sequence[Value]], tunables: Mapping[str, Sequence[Value]]
) -> list[Param]:
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


def _parse_param(kernel: str, argument: str, name: str, values: Sequence[Value]) -> Param:
    tunable = argument == "tunables"
    kinds = {_kind_of(value) for value in values}
    if len(kinds) == 1 and None not in kinds and not (tunable and kinds == {_TYPE}):
        kind = kinds.pop()
        assert kind is not None
        numbers = [NUMBERS[v] if isinstance(v, torch.dtype) else int(v) for v in values]
        return Param(name, kind, tunable, list(dict.fromkeys(numbers)))
    known = "integers or bools" if tunable else "dtypes, integers or bools"
    raise TypeError(
        f"{kernel}: {argument} must give {name} a list of {known}, all of one kind; got {values!r}"
    )


def floating_dtypes(template: Mapping[str, Sequence[Value]]) -> tuple[torch.dtype, ...]:
    """Of the template types; each once."""
    dtypes = (v for values in template.values() for v in values if isinstance(v, torch.dtype))
    return tuple(dict.fromkeys(dtype for dtype in dtypes if dtype.is_floating_point))


def _kind_of(value: Any) -> int | None:
    if isinstance(value, torch.dtype):
        return _TYPE if value in NUMBERS else None
    if isinstance(value, bool):
        return _BOOL
    return _INT if isinstance(value, int) else None


def parse_args(
    kernel: str, args: Mapping[str, str], template: Mapping[str, Sequence[Value]]
) -> list[Arg]:
    parsed = [_parse_arg(kernel, name, text, template) for name, text in args.items()]
    if len(parsed) > _MAX_ARGS:
        raise ValueError(f"{kernel}: args must be at most {_MAX_ARGS}; got {len(parsed)}")
    if not any(a.kind in ("in", "out", "inout") for a in parsed):
        raise ValueError(
            f"{kernel}: args must have a tensor, whose device the kernel runs on; "
            f"got {', '.join(args) or 'none'}"
        )
    return parsed


def _parse_arg(kernel: str, name: str, text: str, template: Mapping[str, Sequence[Value]]) -> Arg:
    words = text.split()
    kind = words[0] if len(words) == 2 else "value"
    type_name = words[-1] if words else ""
    is_tensor = kind in ("in", "out", "inout")
    names: list[str] = _control.control("types", {})["types"]
    types = {t for t, values in template.items() if values and _kind_of(values[0]) == _TYPE}
    if len(words) in (1, 2) and kind in ("in", "out", "inout", "size", "value"):
        if is_tensor and type_name in types:
            return Arg(name, kind, -1, list(template).index(type_name))
        if type_name in names:
            number = names.index(type_name)
            dtype = DTYPES[number]
            is_integer = not dtype.is_floating_point and dtype is not torch.bool
            if is_tensor or (is_integer if kind == "size" else dtype not in _HALF_TYPES):
                return Arg(name, kind, number, -1)
    raise ValueError(
        f"{kernel}: args must give {name} 'in T', 'out T', 'inout T', 'size T' with an integer T, "
        f"or a T that is not half, where T is one of {', '.join([*names, *sorted(types)])} (a "
        f"template type for tensors only); got {text!r}"
    )


# ---- geometry ------------------------------------------------------------------------------------


def block_or_tunable(
    rules: Rules, block: int | Sequence[int] | Function | None
) -> int | Sequence[int] | Function:
    if block is not None:
        return block
    if not any(p.name == "block_size" for p in rules.params):
        raise ValueError(
            f"{rules.name}: block must be given where there is no tunable block_size; got None"
        )
    return lambda p: p.block_size


def counts(
    rules: Rules, argument: str, given: int | Sequence[int] | Function, most: int
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


def shared_of(rules: Rules, given: int | Function | None) -> Function:
    def checked(value: Any) -> int:
        if _is_count(value, MAX_GRID):
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
