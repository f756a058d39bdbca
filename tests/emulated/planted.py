"""Kernels with one mistake each, and what the emulated GPU must say. They run in its process."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from dataclasses import dataclass

GRID, BLOCK = 4, 96
COUNT = GRID * BLOCK


@dataclass(frozen=True)
class Planted:
    """The body of `forward(x, out, n)`: COUNT floats each, in GRID blocks of BLOCK threads.

    `t` is the thread in its block, `i` in the grid. `says` is the error's sentence; empty: none,
    but the results of two schedules differ. `schedule` is the one that meets the mistake.
    """

    body: str
    says: str = ""
    schedule: int = 0
    shared: int = 0
    patience: int = 60_000


MISTAKES = {
    "a read behind a buffer": Planted(
        "out[i] = x[i + n];",
        r"thread \(0, 0, 0\) of block \(0, 0, 0\) reads 0 bytes behind the end",
    ),
    "a read far behind a buffer": Planted("out[i] = x[i + 100000];", r"reads \d+ bytes behind"),
    "a read before a buffer": Planted(
        "if (i == 70) out[i] = x[-1];",
        r"thread \(70, 0, 0\) of block \(0, 0, 0\) reads 4 bytes before a buffer of 1536 bytes",
        schedule=1,
    ),
    "a write behind a buffer": Planted(
        "if (i == n - 1) out[i + 1] = 0;",
        r"thread \(95, 0, 0\) of block \(3, 0, 0\) writes 0 bytes behind the end of a buffer of 15",
    ),
    "a write before a buffer": Planted("out[i - 1] = 0;", "writes 4 bytes before", schedule=1),
    "a write before a buffer, at the other end's schedule": Planted(
        "out[i - 1] = 0;", "it writes 4 bytes before a buffer"
    ),
    "a null pointer": Planted("out[i] = *(const float*)nullptr;", "reads an address that belongs"),
    "a vector that is not aligned": Planted(
        "if (i == 1) *(float4*)(out + 1) = make_float4(0, 0, 0, 0);", "is not aligned"
    ),
    "an index beyond a shared array": Planted(
        "__shared__ float a[BLOCK]; a[t + 1] = 0; __syncthreads(); out[i] = a[t];",
        r"thread \(95, 0, 0\) of block \(0, 0, 0\) uses an index outside",
    ),
    "an index beyond a local array": Planted(
        "float a[4] = {}; a[t / 16] = 1; out[i] = a[t % 4];", "uses an index outside"
    ),
    "a pointer behind static shared memory": Planted(
        '__shared__ float a[BLOCK]; float* p = a; asm("" : "+r"(p)); p[t + 1] = 0;',
        "writes behind the end of its static shared memory",
    ),
    "a write behind dynamic shared memory": Planted(
        "extern __shared__ float a[]; a[t] = 0;",
        r"thread \(64, 0, 0\) .* writes 0 bytes behind the end of the dynamic shared memory of 256",
        shared=256,
    ),
    "too much local memory": Planted(
        "volatile char a[200000]; a[t] = 1; out[i] = a[t];", "uses more local memory"
    ),
    "a division by zero": Planted("out[i] = float(n / (t - t));", "divides by zero"),
    "a missing barrier": Planted(
        "__shared__ float a[BLOCK]; a[t] = x[i]; out[i] = a[BLOCK - 1 - t];"
    ),
    "a missing barrier of a warp": Planted(
        "__shared__ float a[BLOCK]; a[t] = x[i]; out[i] = a[t ^ 1];"
    ),
    "a barrier missing in a loop": Planted(
        """__shared__ float a[BLOCK];
        float sum = 0;
        for (int k = 0; k < 3; ++k) {
          a[t] = x[i] + k;
          __syncthreads();
          sum += a[(t + 40) % BLOCK];
        }
        out[i] = sum;"""
    ),
    "warps that write the same place": Planted(
        "__shared__ int a; a = t / 32; __syncthreads(); out[i] = a;"
    ),
    "blocks that write the same place": Planted("out[t] = blockIdx.x;"),
    "atomic sums in no order": Planted("atomicAdd(out + t % 2, x[i] * x[i] / 3);"),
    "two barriers for one": Planted(
        "if (t < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
        r"waits at __syncthreads \(user/.*:\d+\), but thread \(32, 0, 0\) .* waits at "
        r"__syncthreads .*: a barrier must be reached by all threads of the block or by none",
    ),
    "a barrier that a warp's lanes miss": Planted(
        "if (t % 32 < 16) __syncthreads();\nout[i] = __shfl_sync(~0u, x[i], 0);",
        r"waits at __shfl_sync \(user/.*\) with the mask 0xffffffff for lane 0, which never comes: "
        r"it waits at __syncthreads",
    ),
    "a barrier that a block's threads miss": Planted(
        "if (t < 32) __syncthreads(); else while (__any_sync(~0u, 1)) __nanosleep(9);",
        "runs without end, or waits for what never comes",
        patience=300,
    ),
    "a mask without the own lane": Planted(
        "out[i] = __shfl_sync(0xffff, x[i], 0);",
        r"calls __shfl_sync .* with the mask 0x0000ffff, which does not hold its own lane, 16",
    ),
    "a mask with lanes that take the other way": Planted(
        "if (t % 2) out[i] = __ballot_sync(~0u, 1);\nelse out[i] = __any_sync(~0u, 1);",
        "which never comes: it waits at __any_sync|which never comes: it waits at __ballot_sync",
    ),
    "a shuffle from a lane that has left": Planted(
        "if (t % 32 == 5) return; out[i] = __shfl_sync(~0u, x[i], 5);",
        "reads lane 5 by __shfl_sync .* that lane does not take part",
    ),
    "a flag that nobody sets": Planted(
        "while (*(volatile float*)(out + i) != 3) {}",
        "runs without end, or waits for what never comes",
        patience=200,
    ),
    "a trap": Planted("if (i == 7) __trap();", r"thread \(7, 0, 0\) .* calls __trap\(\)"),
}

# Right, and easy to get wrong for an emulator.
SOUND = {
    "threads that leave before a barrier": (
        "if (t >= 40) { out[i] = 1; return; }\n__syncthreads();\nout[i] = __syncthreads_count(1);",
        lambda b, t: 40.0 if t < 40 else 1.0,
    ),
    "blocks that wait for later ones": (
        """if (t == 0) {
          volatile float* flag = out + n - 1;
          if (blockIdx.x + 1 == gridDim.x) *flag = 5;
          while (*flag != 5) {}
        }
        __syncthreads();
        if (i + 1 < n) out[i] = out[n - 1];""",
        lambda b, t: 5.0,
    ),
    "shared memory of blocks that take turns": (
        """__shared__ float a[BLOCK];
        extern __shared__ float d[];
        a[t] = d[t] = i;
        __nanosleep(5);
        __syncthreads();
        __nanosleep(5);
        out[i] = a[BLOCK - 1 - t] + d[t] - i;""",
        lambda b, t: float(b * BLOCK + BLOCK - 1 - t),
    ),
    "votes and shuffles of a part of a warp": (
        """float v = 0;
        const int lane = t % 32;
        if (lane < 8) v = __shfl_down_sync(0xffu, float(lane), 3, 8);
        else v = __popc(__match_any_sync(0xffffff00u, lane % 3)) + __reduce_max_sync(0xffffff00u, lane);
        out[i] = v + __shfl_xor_sync(~0u, lane, 1) * 100;""",
        lambda b, t: (
            (float(t % 32 + 3 if t % 32 + 3 < 8 else t % 32) if t % 32 < 8 else 31.0 + 8.0)
            + (t % 32 ^ 1) * 100
        ),
    ),
    "counters of atomics": (
        "__shared__ unsigned c; if (t == 0) c = 0; __syncthreads();\n"
        "atomicInc(&c, 1000); __syncthreads(); out[i] = c;",
        lambda b, t: float(BLOCK),
    ),
}  # fmt: skip


def launch(body: str, name: str, schedule: int, shared: int) -> list[float]:
    """Runs a body once; what it leaves of `out`."""
    import torch

    import torchkiln
    from support import emulated

    emulated.schedule(schedule)
    kernel = torchkiln.Kernel(
        f"constexpr int BLOCK = {BLOCK};\n"
        "__global__ void forward(const float* x, float* out, int n) {\n"
        "const int t = threadIdx.x, i = blockIdx.x * BLOCK + t;\n"
        f"{body}\n}}\n",
        "forward",
        args={"x": "in float", "out": "out float", "n": "size i32"},
        grid=GRID,
        block=BLOCK,
        shared=shared,
        name="".join(c if c.isalnum() else "_" for c in name),
    )
    x = torch.linspace(0.1, 1.0, COUNT).to("cuda")
    out = torch.zeros(COUNT, device="cuda")
    kernel(x, out, COUNT)
    return [float(value) for value in out.cpu().tolist()]


def meet(name: str) -> tuple[str, bool]:
    """Runs a mistake: the error's text, and whether two schedules give different results."""
    mistake = MISTAKES[name]
    libcuda = ctypes.CDLL("libcuda.so.1")
    libcuda.fake_cuda_patience(ctypes.c_long(mistake.patience))
    try:
        results = [
            launch(mistake.body, name, schedule, mistake.shared)
            for schedule in ((mistake.schedule,) if mistake.says else (0, 1))
        ]
    except RuntimeError as error:
        return str(error), False
    finally:
        libcuda.fake_cuda_patience(ctypes.c_long(60_000))
    return "", repr(results[0]) != repr(results[-1])


def call_cpu_only() -> None:
    """Calls an operator that has no CUDA version."""
    import torch

    with torch.library._scoped_library("emulated", "FRAGMENT") as library:
        library.define("cpu_only(Tensor x) -> Tensor")
        library.impl("cpu_only", lambda x: x + 1, "CPU")
        torch.ops.emulated.cpu_only(torch.ones(3, device="cuda"))


def compute(name: str, schedule: int) -> list[float]:
    """Runs what is sound."""
    return launch(SOUND[name][0], name, schedule, 4 * BLOCK)
