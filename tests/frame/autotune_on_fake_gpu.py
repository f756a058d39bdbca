"""Tunes from Python on a driver that runs nothing; test_autotune.py runs this file.

With FAKE_BEST_BLOCK=128 launches with blocks of 128 take half the time; 256 is the default.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchkiln
from support.lent import Lent, launches
from torchkiln import Kernel, _control, tuning

SOURCE = """
template <int kBlockSize, int kUnroll>
__global__ void twice(const float* x, float* out, long long n) {
  for (int u = 0; u < kUnroll; ++u) {
    const long long i = ((long long)blockIdx.x * kUnroll + u) * kBlockSize + threadIdx.x;
    if (i < n) out[i] = 2 * x[i];
  }
}
"""
# What the grid function does when it is asked; a test puts something here.
when_asked: list[Callable[[], None]] = []


def grid(p: Any) -> int:
    while when_asked:
        when_asked.pop()()
    return torchkiln.ceil_div(p.n, p.block_size * p.unroll)


def declare(name: str, source: str = SOURCE) -> Kernel:
    return Kernel(
        source,
        "twice",
        name=name,
        args={"x": "in float", "out": "out float", "n": "size i64"},
        tunables={"block_size": [64, 128, 256, 512], "unroll": [1, 2, 4]},
        grid=grid,
        default={"block_size": 256, "unroll": 1},
    )


def tensors(n: int = 1000) -> tuple[Any, ...]:
    return Lent(torch.ones(n)), Lent(torch.ones(n)), n


def blocks_of(call: Callable[[], None]) -> list[int]:
    """Block sizes of what a call launches."""
    before = len(launches())
    call()
    return [launch["block"][0] for launch in launches()[before:]]


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Host memory for the tuner's copies; and nothing is left of a mode."""

    def allocate(size: int, device: int) -> tuple[object, int]:
        block = torch.empty(size, dtype=torch.uint8)
        return block, block.data_ptr()

    _control.set_allocator(allocate)
    before = _control.control("tune.set", {})
    yield
    assert _control.control("tune.set", {}) == before
    when_asked.clear()


def test_the_best_point_is_found_and_used_from_then_on() -> None:
    kernel = declare("found")
    x, out, n = tensors()
    assert blocks_of(lambda: kernel(x, out, n)) == [256]
    known = len(tuning.report())
    with torchkiln.autotune():
        assert len(blocks_of(lambda: kernel(x, out, n))) > 12
        assert blocks_of(lambda: kernel(x, out, n)) == [128]  # warm
    assert blocks_of(lambda: kernel(x, out, n)) == [128]
    (row,) = tuning.report(known)
    assert row.kernel == "user/found.twice<block_size=128, unroll=1>"
    assert (row.default, row.best) == (
        {"block_size": 256, "unroll": 1},
        {"block_size": 128, "unroll": 1},
    )
    assert (row.points, row.measured, row.reused, row.stopped) == (12, 11, 0, "")
    assert row.sizes == {"n": 1000}
    assert row.verified
    assert row.gain == pytest.approx(0.5, abs=0.01)
    assert row.default_us == pytest.approx(10, rel=0.01)
    assert row.gpu_ms > 0


def test_what_is_known_is_not_measured_again_and_near_sizes_use_it() -> None:
    kernel = declare("known")
    with torchkiln.autotune():
        kernel(*tensors())
    known = len(tuning.report())
    with torchkiln.autotune():
        assert blocks_of(lambda: kernel(*tensors())) == [128]
    assert blocks_of(lambda: kernel(*tensors(3000))) == [128]  # two powers of two apart
    assert blocks_of(lambda: kernel(*tensors(300_000))) == [256]
    assert tuning.report(known) == []


def test_mode_off_takes_defaults() -> None:
    kernel = declare("off")
    with torchkiln.autotune():
        kernel(*tensors())
    with tuning.mode("off"):
        assert blocks_of(lambda: kernel(*tensors())) == [256]
    assert blocks_of(lambda: kernel(*tensors())) == [128]


def test_without_a_budget_nothing_is_measured() -> None:
    kernel = declare("without_budget")
    known = len(tuning.report())
    with torchkiln.autotune(budget_ms=0):
        assert blocks_of(lambda: kernel(*tensors())) == [256]
    with torchkiln.autotune(total_ms=0):
        assert blocks_of(lambda: kernel(*tensors())) == [256]
    assert tuning.report(known) == []


def test_a_short_budget_is_gone_on_with() -> None:
    kernel = declare("short")
    with torchkiln.autotune(budget_ms=4):
        kernel(*tensors())
    first = tuning.report()[-1]
    assert first.stopped == "budget"
    assert 0 < first.measured < 11
    with torchkiln.autotune():
        kernel(*tensors())
    second = tuning.report()[-1]
    assert second.stopped == ""
    assert second.reused == first.measured
    assert second.best["block_size"] == 128


def test_ctrl_c_keeps_what_is_known_and_the_launch_happens() -> None:
    # A source that no other test has compiled: the search waits for the compiler, and is met.
    kernel = declare("interrupted", SOURCE.replace("2 * x[i]", "x[i] + x[i]"))
    kernel(*tensors())  # the default is warm: what is asked next is about a candidate

    def interrupt_soon() -> None:
        def interrupt() -> None:
            time.sleep(0.005)  # grid() has returned
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()

    x, out, n = tensors()
    own = f"{out.tensor.data_ptr().to_bytes(8, 'little').hex()}"
    when_asked.append(interrupt_soon)
    before = len(launches())

    @torchkiln.autotune()
    def tune() -> None:
        kernel(x, out, n)
        time.sleep(10)  # the exception comes between two lines

    with pytest.raises(KeyboardInterrupt):
        tune()
    on_own_memory = [launch for launch in launches()[before:] if own in launch["args"]]
    assert len(on_own_memory) == 1
    row = tuning.report()[-1]
    assert row.stopped == "interrupted"
    assert row.measured < 11
    with torchkiln.autotune():
        kernel(x, out, n)
    row = tuning.report()[-1]
    assert row.stopped == ""
    assert row.measured + row.reused == 11


def test_a_first_rank_alone_keeps_its_records(tmp_path: Path) -> None:
    import torch.distributed as dist

    kernel = declare("alone")
    with torchkiln.autotune():
        kernel(*tensors())
    rendezvous = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        assert tuning.sync() == tuning.sync()
    finally:
        dist.destroy_process_group()
    assert blocks_of(lambda: kernel(*tensors())) == [128]
