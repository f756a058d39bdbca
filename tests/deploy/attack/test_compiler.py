"""The real compiler in processes that end, are interrupted, or have no room for it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import attack

pytestmark = pytest.mark.skipif(not attack.nvrtc(), reason="NVRTC is not installed")

# Kernels of a template that is in the engine: nothing here needs torch.
KERNELS = """
import json, os, signal, sys, threading, time
from torchkiln_cli import _native

def compile(block_size):
    arguments = {"scalar": "float", "mode": 0, "vector": 1, "block_size": block_size}
    listed = [{"name": name, "value": value} for name, value in arguments.items()]
    kernel = {"path": "detection/box_iou.cuh", "entry": "forward", "arguments": listed}
    return _native.control("compile", specialization=kernel, target="sm_90")["status"]
"""


def python(work: Path, program: str, **options) -> subprocess.CompletedProcess[str]:
    cache = str(work / "root")
    variables = attack.environment(
        work, TORCHKILN_CACHE_DIR=cache, TORCHKILN_NVRTC_PATH=attack.nvrtc()
    )
    return subprocess.run(
        [sys.executable, "-c", KERNELS + program], env=variables, capture_output=True, text=True,
        timeout=attack.PATIENCE, check=False, **options,
    )  # fmt: skip


def leaves_well(work: Path, thread: str, microseconds: int) -> bool:
    variables = attack.environment(work, TORCHKILN_NVRTC_PATH=attack.nvrtc())
    command = attack.worker("exit", **{"from": thread, "us": microseconds})
    done = subprocess.run(command, env=variables, timeout=attack.PATIENCE, check=False)
    return done.returncode == 7


@pytest.mark.parametrize("thread", ["main", "other"])
def test_exit_during_the_first_compile(work, thread):
    moments = [0, 2_000, 20_000, 40_000, 60_000, 80_000]
    assert [us for us in moments if not leaves_well(work, thread, us)] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("thread", ["main", "other"])
def test_exit_at_any_moment_of_the_first_compile(work, thread, record_property):
    moments = range(0, 200_000, 1000)
    bad = [us for us in moments if not leaves_well(work, thread, us)]
    record_property("summary", f"exit of the {thread} thread: {len(bad)} of {len(moments)} crash")
    assert bad == []


def test_interpreter_that_ends_while_a_thread_compiles(work):
    program = """
_native.version()  # importing in a thread that dies with the interpreter is not safe in itself
started = threading.Event()
def work():
    for block_size in range(32, 1024, 32):
        started.set()
        compile(block_size)
threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep(DELAY)
"""
    for delay in (0, 0.003, 0.01, 0.03, 0.1):
        done = python(work, program.replace("DELAY", str(delay)))
        assert (done.returncode, done.stdout) == (0, ""), (delay, done.stderr)
        # A daemon thread may still say that it was refused, if Python lets it speak.
        assert "Fatal" not in done.stderr
        shutil.rmtree(work / "root", ignore_errors=True)
    again = python(work, "print(compile(32))")
    assert again.returncode == 0, again.stderr


def test_ctrl_c_during_compiles(work):
    program = """
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
done = 0
try:
    for block_size in range(32, 1025, 2):
        compile(block_size)
        done += 1
except KeyboardInterrupt:
    print(json.dumps([done, compile(32)]))
"""
    done = python(work, program, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert done.returncode == 0, done.stderr
    compiled, status = json.loads(done.stdout)
    assert compiled < 400
    # The compile that was interrupted came to its end, too.
    assert status == "hit" or compiled == 0


def test_little_address_space_is_one_sentence_or_works(work):
    program = """
try:
    print(compile(64))
except _native.ControlError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""
    seen = set()
    for megabytes in [*range(120, 260, 20), 300, 400, 600]:
        size = megabytes << 20
        lower = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (size, size))
        done = python(work, program, preexec_fn=lower)
        assert done.returncode in (0, 3), (megabytes, done.stderr)
        if done.returncode == 3:
            assert done.stderr.count("\n") == 1, done.stderr
        seen.add(done.returncode)
        for path in (work / "root").rglob("*.kernel"):
            path.unlink()
    assert seen == {0, 3}
