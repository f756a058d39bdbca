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
import dataclasses
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
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
        # A real kernel of the run's cache would be taken for an emulated one, and compute nothing.
        "TORCHKILN_CACHE_DIR": str(Path(os.environ["TORCHKILN_CACHE_DIR"]) / "emulated"),
    }
    before = {name: os.environ.get(name) for name in settings}
    # Forked, it would have this process's torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start) as executor:
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


def torch_cuda() -> str:
    """The library that takes the place of torch's own for CUDA."""
    return str(build_folder() / "emulator" / "libtorch_cuda.so")


def start() -> None:
    """Replaces the GPU's libraries in this process."""
    ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"))
    ctypes.CDLL(torch_cuda())
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


def check(
    op: str, function: str, case_name: str, dtype: torch.dtype, seed: int, **options: Any
) -> list[Result]:
    """Compares one case, with some arguments changed, with its reference."""
    from torchkiln import testing

    schedule(seed)
    parity = testing.find()[op]
    case = next(case for name, case in parity.runs if (name, case.name) == (function, case_name))
    changed = dataclasses.replace(case, make=lambda new: {**case.make(new), **options})
    return list(testing.check(parity, function, changed, dtype, "cuda"))


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


def scan_bytes(size: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """What Mamba's scan and its gradient hold beside inputs, output and gradients, at the most.

    size: batch, dim, length and states.
    """
    import torch

    from torchkiln.ops import selective_scan

    schedule(0)
    batch, dim, length, states = size
    row, matrix = (batch, dim, length), (batch, states, length)

    def leaf(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, 0.1, dtype=dtype).cuda().requires_grad_()

    u, delta, z = (leaf(row, dtype) for _ in range(3))
    B, C = (leaf(matrix, dtype) for _ in range(2))
    D, delta_bias = (leaf((dim,), torch.float32) for _ in range(2))
    A = (-torch.ones(dim, states)).cuda().requires_grad_()
    grad = torch.ones(row, dtype=dtype).cuda()
    leaves = [u, delta, A, B, C, D, z, delta_bias]

    def held() -> tuple[int, int]:
        now, peak = ctypes.c_size_t(), ctypes.c_size_t()
        count = ctypes.CDLL(torch_cuda()).emulated_bytes
        count(ctypes.byref(now), ctypes.byref(peak))
        return now.value, peak.value

    before, _ = held()
    out = selective_scan(*leaves, delta_softplus=True)
    grads = torch.autograd.grad(out, leaves, grad)
    _, peak = held()
    return peak - before - sum(x.numel() * x.element_size() for x in (out, *grads))


def on_gpu(function: Callable[..., torch.Tensor], *rows: list[Any]) -> list[Any]:
    """The result of a function of tensors, for their numbers."""
    import torch

    schedule(0)
    tensors = [torch.tensor(numbers, dtype=torch.float32).cuda() for numbers in rows]
    return function(*tensors).cpu().tolist()  # type: ignore[no-any-return]
