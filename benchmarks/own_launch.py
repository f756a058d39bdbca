"""What launching a kernel of one's own from Python costs the host, beside the peers.

    python -m benchmarks.own_launch --json out.json

One tiny kernel with four tensors and two numbers, launched in one process by turns: through
torchkiln.Kernel, through the bare driver in a C loop, CuPy's RawKernel, Triton and
torch.cuda._compile_kernel. Then the first call of each in fresh processes with empty caches, from
the declaration to the result. Sides that are not installed are left out, with a line that says so.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
COUNT = 256  # elements, and threads of the one block: the GPU is never what is waited for
SCALE = 0.5
REQUIRED_US, AIM_US = 3.0, 1.5  # on top of cuLaunchKernelEx
REQUIRED_COLD_MS = 80.0

BODY = """(const float* x, const float* bias, const unsigned char* mask, float* out, {n} n,
          {scale} scale) {{
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = mask[i] ? (x[i] + bias[i]) * (float)scale : 0.0f;
}}"""
TYPED = BODY.format(n="long long", scale="float")

Burst = Callable[[int], float | None]  # launches so many times; microseconds each, if it knows


@dataclass
class Work:
    """The arguments, and what must come out."""

    x: Tensor
    bias: Tensor
    mask: Tensor
    out: Tensor

    @classmethod
    def make(cls) -> Work:
        """Small tensors on the GPU."""
        x, bias = torch.randn(2, COUNT, device="cuda").unbind()
        return cls(x, bias, (torch.rand(COUNT, device="cuda") < 0.8).byte(), torch.zeros_like(x))

    def check(self, name: str) -> None:
        """Fails where a side has not done the work."""
        expected = (self.x + self.bias) * SCALE * self.mask
        torch.testing.assert_close(self.out, expected, msg=lambda text: f"{name}: {text}")
        self.out.zero_()


# ---- sides: each returns the call in a loop of its own, so that all pay for the same loop -------


def torchkiln_side(work: Work) -> Burst:
    """Ours."""
    import torchkiln

    kernel = torchkiln.Kernel(
        f"template <int kBlockSize> __global__ void launch{TYPED}",
        "launch",
        args={
            "x": "in float",
            "bias": "in float",
            "mask": "in u8",
            "out": "out float",
            "n": "size i64",
            "scale": "float",
        },
        tunables={"block_size": [COUNT, 128]},
        grid=lambda p: torchkiln.ceil_div(p.n, p.block_size),
        name="benchmark_launch",
    )
    x, bias, mask, out = work.x, work.bias, work.mask, work.out

    def burst(count: int) -> None:
        for _ in range(count):
            kernel(x, bias, mask, out, COUNT, SCALE)

    return burst


def cupy_side(work: Work) -> Burst:
    """CuPy's RawKernel, with its arrays and numbers made beforehand, which favours it."""
    import cupy
    import numpy

    kernel = cupy.RawKernel(f'extern "C" __global__ void launch{TYPED}', "launch")
    x, bias, mask, out = (cupy.asarray(t) for t in (work.x, work.bias, work.mask, work.out))
    n, scale = numpy.int64(COUNT), numpy.float32(SCALE)
    grid, block = (1,), (COUNT,)

    def burst(count: int) -> None:
        for _ in range(count):
            kernel(grid, block, (x, bias, mask, out, n, scale))

    return burst


def triton_side(work: Work) -> Burst:
    """A Triton kernel of the same maths."""
    from benchmarks import own_launch_triton

    kernel = own_launch_triton.launch
    x, bias, mask, out = work.x, work.bias, work.mask, work.out

    def burst(count: int) -> None:
        for _ in range(count):
            kernel[(1,)](x, bias, mask, out, COUNT, SCALE, BLOCK=COUNT)

    return burst


def torch_side(work: Work) -> Burst:
    """The private compiler of kernels of torch; it passes int and double."""
    text = BODY.format(n="int", scale="double")
    kernel = torch.cuda._compile_kernel(f'extern "C" __global__ void launch{text}', "launch")
    x, bias, mask, out = work.x, work.bias, work.mask, work.out
    grid, block = (1, 1, 1), (COUNT, 1, 1)

    def burst(count: int) -> None:
        for _ in range(count):
            kernel(grid=grid, block=block, args=[x, bias, mask, out, COUNT, SCALE])

    return burst


class Parameters(ctypes.Structure):
    """As own_launch.cpp has them."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def bare_sides(work: Work, helper: str) -> dict[str, Burst]:
    """The driver without Python, on the machine code of our kernel; after `torchkiln_side`."""
    from torchkiln import _control

    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    request = {"operator": "benchmark_launch", "values": {"n": str(COUNT)}, "target": target}
    (row,) = _control.control("explain", request)["kernels"]
    with tempfile.TemporaryDirectory() as folder:
        what = {"specialization": row["specialization"], "what": ["cubin"]}
        files = _control.control("dump", {**what, "target": target, "folder": folder})["files"]
        cubin = Path(files["cubin"]).read_bytes()
        name = json.loads(Path(files["facts"]).read_text())["lowered_name"]
    library = ctypes.CDLL(helper)
    code = library.own_launch_load(cubin, name.encode())
    if code != 0:
        raise RuntimeError(f"the driver refuses the kernel with {code}")
    pointers = (t.data_ptr() for t in (work.x, work.bias, work.mask, work.out))
    parameters = Parameters(*pointers, COUNT, SCALE)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def side(function: Any) -> Burst:
        function.restype = ctypes.c_double
        function.argtypes = (Parameters, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)

        def burst(count: int) -> float:
            us: float = function(parameters, stream, COUNT, count)
            if us < 0:
                raise RuntimeError("the driver refuses a launch")
            return us

        return burst

    return {BARE: side(library.own_launch_ex), PACKED: side(library.own_launch_packed)}


OURS, BARE, PACKED = "torchkiln.Kernel", "cuLaunchKernelEx in C", "cuLaunchKernel, packed, in C"
SIDES: dict[str, Callable[[Work], Burst]] = {
    OURS: torchkiln_side,
    "CuPy RawKernel": cupy_side,
    "Triton": triton_side,
    "torch.cuda._compile_kernel": torch_side,
}
PACKAGES = {"CuPy RawKernel": "cupy", "Triton": "triton", OURS: "torchkiln"}


def version_of(name: str) -> str:
    """Of the side's package."""
    import importlib

    package = importlib.import_module(PACKAGES[name]) if name in PACKAGES else torch
    return str(package.__version__)


# ---- warm ----------------------------------------------------------------------------------------


def prepare(helper: str | None) -> tuple[dict[str, Burst], dict[str, str], Work]:
    """Warm sides, and why others are left out."""
    work = Work.make()
    bursts: dict[str, Burst] = {}
    skipped: dict[str, str] = {}
    makers: dict[str, Callable[[], dict[str, Burst]]] = {
        name: lambda name=name, make=make: {name: make(work)}  # type: ignore[misc]
        for name, make in SIDES.items()
    }
    makers[BARE] = lambda: bare_sides(work, helper or "")
    if helper is None:
        skipped[BARE] = "torchkiln_launch_benchmark is not built: TORCHKILN_BUILD_TESTS=ON"
        del makers[BARE]
    for name, make in makers.items():
        try:
            for key, burst in make().items():
                burst(3)
                torch.cuda.synchronize()
                work.check(key)
                bursts[key] = burst
        except Exception as error:  # a peer that is missing or broken here
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return bursts, skipped, work


def measure(bursts: dict[str, Burst], rounds: int, launches: int) -> dict[str, list[float]]:
    """Microseconds of a launch on the host, by side; the order changes from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in bursts}
    order = list(bursts)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            torch.cuda.synchronize()  # the queue is empty: no launch has to wait for room
            start = time.perf_counter_ns()
            own_time = bursts[name](launches)
            us = (time.perf_counter_ns() - start) / 1e3 / launches
            samples[name].append(us if own_time is None else own_time)
    torch.cuda.synchronize()
    return samples


# ---- cold ----------------------------------------------------------------------------------------


def first_call(name: str) -> float:
    """Milliseconds from the declaration to the result, CUDA and torch being up."""
    work = Work.make()
    torch.cuda.synchronize()
    version_of(name)  # importing a package is no part of it
    start = time.perf_counter()
    SIDES[name](work)(1)
    torch.cuda.synchronize()
    elapsed = 1e3 * (time.perf_counter() - start)
    work.check(name)
    return elapsed


def first_calls(name: str, repeats: int) -> list[float]:
    """Of fresh processes, each with empty caches."""
    times = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            caches = (
                "TORCHKILN_CACHE_DIR",
                "CUPY_CACHE_DIR",
                "TRITON_CACHE_DIR",
                "CUDA_CACHE_PATH",
            )
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.own_launch", "--first", name],
                env={**os.environ, **{c: f"{folder}/{c.lower()}" for c in caches}},
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
        times.append(float(done.stdout.split()[-1]))
    return times


# ---- the report ----------------------------------------------------------------------------------


def report(
    samples: dict[str, list[float]], cold: dict[str, list[float]], skipped: dict[str, str]
) -> dict[str, Any]:
    """Everything that was measured."""
    bare = statistics.median(samples[BARE]) if BARE in samples else None
    sides = []
    for name, values in samples.items():
        deciles = statistics.quantiles(values, n=10)
        median = statistics.median(values)
        sides.append(
            {
                "side": name,
                "version": version_of(name) if name in SIDES else "",
                "us": median,
                "us_p10": deciles[0],
                "us_p90": deciles[-1],
                "over_bare_us": None if bare is None else median - bare,
                "cold_ms": statistics.median(cold[name]) if name in cold else None,
                "cold_ms_all": cold.get(name, []),
            }
        )
    sides.sort(key=lambda side: side["us"])  # type: ignore[arg-type,return-value]
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "required_us": REQUIRED_US,
        "aim_us": AIM_US,
        "required_cold_ms": REQUIRED_COLD_MS,
        "sides": sides,
        "skipped": skipped,
    }


def table(data: dict[str, Any]) -> str:
    """The same for people."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        f"{data['gpu']}, torch {data['torch']} (CUDA {data['cuda']}), Python {data['python']}",
        "",
        "| side | version | us a launch | p10 | p90 | over the bare driver | cold first call, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in data["sides"]:
        cells = [
            side["side"],
            side["version"],
            *(number(side[key], 2) for key in ("us", "us_p10", "us_p90", "over_bare_us")),
            number(side["cold_ms"], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ours = next(side for side in data["sides"] if side["side"] == OURS)
    lines.append("")
    if ours["over_bare_us"] is not None:
        kept = "kept" if ours["over_bare_us"] <= REQUIRED_US else "not kept"
        reached = "reached" if ours["over_bare_us"] <= AIM_US else "not reached"
        lines.append(f"Bare driver + {REQUIRED_US} us: {kept}; + {AIM_US} us: {reached}.")
    if ours["cold_ms"] is not None:
        kept = "kept" if ours["cold_ms"] <= REQUIRED_COLD_MS else "not kept"
        lines.append(f"First call within {REQUIRED_COLD_MS:.0f} ms: {kept}.")
    lines += [f"Left out: {name} ({why})." for name, why in data["skipped"].items()]
    return "\n".join(lines)


def built_helper() -> str | None:
    """The library of own_launch.cpp, where the tests are built."""
    found = sorted(ROOT.glob("build/*/libtorchkiln_launch_benchmark.so"))
    return str(found[0]) if found else None


@click.command()
@click.option("--json", "output", type=click.Path(dir_okay=False), help="Also write JSON.")
@click.option("--rounds", default=200, help="Bursts of each side.")
@click.option("--launches", default=100, help="Launches of a burst; the queue holds about 1000.")
@click.option("--cold", default=3, help="Fresh processes of each side; 0 for none.")
@click.option("--helper", default=built_helper, help="Library of own_launch.cpp.")
@click.option("--first", hidden=True, help="Only the first call of this side, in this process.")
def main(
    output: str | None, rounds: int, launches: int, cold: int, helper: str | None, first: str | None
) -> None:
    """Measures launches of a user's kernel from Python."""
    if not torch.cuda.is_available():
        raise click.ClickException("own_launch needs a CUDA device; torch sees none")
    if first is not None:
        click.echo(first_call(first))
        return
    bursts, skipped, _work = prepare(helper)
    samples = measure(bursts, rounds, launches)
    first_times = {name: first_calls(name, cold) for name in SIDES if name in bursts and cold > 0}
    data = report(samples, first_times, skipped)
    click.echo(table(data))
    if output:
        Path(output).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
