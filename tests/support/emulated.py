"""A process whose GPU is emulated: kernels are compiled for the host and run on the CPU.

The process gets a libcuda, a libnvrtc and a libtorch_cuda of the tests' own before it imports
torch, so it must be a new one:

    with emulated.process() as gpu:
        gpu.submit(function, *arguments).result()

There `torch.ones(3, device="cuda")` works, and so does every operator of torchkiln on it.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.machine import build_folder

if TYPE_CHECKING:
    import torch

    from torchkiln.testing import Result


@contextlib.contextmanager
def process() -> Iterator[ProcessPoolExecutor]:
    """Yields what runs functions, one after the other, in a process with an emulated GPU."""
    folder = build_folder()
    settings = {
        "LD_LIBRARY_PATH": str(folder / "fake_cuda"),
        "TORCHKILN_NVRTC_PATH": str(folder / "emulator" / "libnvrtc.so.13.0"),
    }
    before = {name: os.environ.get(name) for name in settings}
    # Forked, it would have this process's torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start, (str(folder / "emulator"),)) as executor:
        os.environ.update(settings)
        try:
            executor.submit(int).result()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        yield executor


def start(folder: str) -> None:
    """Replaces the GPU's libraries in this process."""
    ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"))
    ctypes.CDLL(f"{folder}/libtorch_cuda.so")
    import torch

    # Python's half of torch.cuda asks for a build with CUDA.
    torch.cuda._lazy_init = lambda: None
    torch.set_num_threads(1)


def schedule(seed: int) -> None:
    """Sets the order of blocks, warps and lanes: 0 rising, 1 falling, else a random one.

    An odd one also catches accesses before buffers at once, instead of those behind them.
    """
    ctypes.CDLL("libcuda.so.1").fake_cuda_schedule(seed)


SCHEDULES = (0, 1, 2)


def check(op: str, function: str, case_name: str, dtype: torch.dtype, seed: int) -> list[Result]:
    """Compares one case with its reference."""
    from torchkiln import testing

    schedule(seed)
    parity = testing.find()[op]
    case = next(case for name, case in parity.runs if (name, case.name) == (function, case_name))
    return list(testing.check(parity, function, case, dtype, "cuda"))


def differing(op: str, function: str, seeds: Sequence[int]) -> list[str]:
    """Returns the outputs and gradients of the typical case that depend on the schedule."""
    import torch

    from torchkiln import testing
    from torchkiln.testing._checks import bits
    from torchkiln.testing._parity import evaluate

    parity = testing.find()[op]
    case = parity.typical(function)
    dtype = torch.float32 if torch.float32 in parity.dtypes else parity.dtypes[0]
    results: list[dict[str, Any]] = []
    for seed in seeds:
        schedule(seed)
        arguments = testing.prepare(case, dtype, "cuda")
        values = evaluate(parity.native(function), arguments, parity.differentiated(case))
        results.append({name: bits(value.cpu()) for name, value in values.items()})
    first = results[0]
    return [
        f"{name} with schedule {seed}"
        for seed, other in zip(seeds, results, strict=True)
        for name in first
        if not torch.equal(first[name], other[name])
    ]
