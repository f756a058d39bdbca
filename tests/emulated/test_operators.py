"""Every operator's CUDA route on the emulated GPU: binding, launches and kernels.

The cases are those that the references declare, so a new operator needs no line here. A sample of
them runs; `--exhaustive` runs all.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import zlib
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from support import emulated
from torchkiln import testing
from torchkiln.testing import Case, Parity

HALF = (torch.float16, torch.bfloat16)
CASES_OF_A_SAMPLE = 2
# Threads of the emulated GPU run one after the other.
MOST_ELEMENTS = 50_000


def number_of(text: str) -> int:
    """The same at every run."""
    return zlib.crc32(text.encode())


def is_small(case: Case) -> bool:
    tensors = [x for x in case.make(testing.Inputs()).values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() for x in tensors) <= MOST_ELEMENTS


def sample(parity: Parity, function: str) -> list[tuple[Case, torch.dtype]]:
    """The typical case in float32 and in one half type, and another case."""
    cases = [case for name, case in parity.runs if name == function and is_small(case)]
    halves = [dtype for dtype in HALF if dtype in parity.dtypes]
    wide = [dtype for dtype in parity.dtypes if dtype not in HALF]
    dtype = torch.float32 if torch.float32 in wide or not wide else wide[0]
    others = sorted(cases[1:], key=lambda case: number_of(f"{function} {case.name}"))
    chosen = [(case, dtype) for case in [*cases[:1], *others[: CASES_OF_A_SAMPLE - 1]]]
    if halves and cases:
        chosen.append((cases[0], halves[number_of(function) % len(halves)]))
    return chosen


def everything(parity: Parity, function: str) -> list[tuple[Case, torch.dtype]]:
    cases = [case for name, case in parity.runs if name == function]
    return [(case, dtype) for case in cases for dtype in parity.dtypes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    choose = everything if metafunc.config.getoption("--exhaustive") else sample
    on_gpu = [parity for parity in testing.find().values() if "cuda" in parity.devices]
    functions = [(parity, function) for parity in on_gpu for function in parity.functions]
    if "case" in metafunc.fixturenames:
        rows: list[Any] = [
            pytest.param(parity.op, function, case.name, dtype, id=name)
            for parity, function in functions
            for case, dtype in choose(parity, function)
            for name in [f"{function}-{case.name}-{str(dtype).removeprefix('torch.')}"]
        ]
        metafunc.parametrize(("op", "function", "case", "dtype"), rows)
    elif "function" in metafunc.fixturenames:
        rows = [
            pytest.param(parity.op, function, id=function)
            for parity, function in functions
            if parity.deterministic
        ]
        metafunc.parametrize(("op", "function"), rows)


def test_equals_reference(
    gpu: ProcessPoolExecutor, op: str, function: str, case: str, dtype: torch.dtype
) -> None:
    seed = emulated.SCHEDULES[number_of(f"{case} {dtype}") % len(emulated.SCHEDULES)]
    for result in gpu.submit(emulated.check, op, function, case, dtype, seed).result():
        if not result.ok:
            pytest.fail(f"schedule {seed}, {result.direction}: {result.message}")


def test_order_of_threads_changes_nothing(gpu: ProcessPoolExecutor, op: str, function: str) -> None:
    """Bit for bit: a barrier that is missing, and sums in no fixed order, show as a difference."""
    assert gpu.submit(emulated.differing, op, function, emulated.SCHEDULES).result() == []
