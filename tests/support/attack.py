"""Processes that are killed, starved or lied to, and what must hold afterwards.

The tests in tests/deploy/attack and the report of benchmarks/cache.py use it. A command is any
argument list; the worker is the torch-free core with a compiler that sleeps.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds after which a process counts as hanging


def build_folder() -> Path:
    """Returns the build folder of this Python, or the one that TORCHKILN_ATTACK_BUILD names."""
    named = os.environ.get("TORCHKILN_ATTACK_BUILD")
    if named:
        return Path(named)
    tag = "cp{}{}-cp*".format(*sys.version_info[:2])
    return next(iter(sorted((ROOT / "build").glob(tag))), ROOT / "build")


def worker(command: str, **arguments: object) -> list[str]:
    """Returns the command line of one worker process; see worker.cpp for what it can do."""
    program = str(build_folder() / "torchkiln_attack_worker")
    return [program, command, *(f"{name}={value}" for name, value in arguments.items())]


def environment(work: Path, files: str = "", **variables: str) -> dict[str, str]:
    """Returns the environment of a process of its own world below `work`.

    Args:
        work: folder for locks and the home directory.
        files: how the file system misbehaves; see hostile_files.cpp.
        **variables: further variables.
    """
    runtime = work / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHKILN_", "XDG_"))}
    result = {**kept, "XDG_RUNTIME_DIR": str(runtime), "HOME": str(work), **variables}
    if files:
        result["TORCHKILN_ATTACK_FILES"] = files
        result["LD_PRELOAD"] = str(build_folder() / "libtorchkiln_attack_files.so")
    return result


def run(command: Sequence[str], work: Path, files: str = "", **options: Any) -> dict[str, Any]:
    """Runs a worker to its end and returns its line of JSON, with its exit code as "code"."""
    variables = options.pop("variables", {})
    done = subprocess.run(
        command, env=environment(work, files, **variables), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=PATIENCE, check=False, **options,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    reply = json.loads(lines[-1]) if lines else {}
    return {**reply, "code": done.returncode, "stderr": done.stderr}


def run_together(commands: Sequence[Sequence[str]], work: Path, files: str = "") -> dict[str, Any]:
    """Starts workers that say "ready", lets them go at one moment and waits for all.

    Returns:
        The replies, and the milliseconds from the start signal to the last reply.
    """
    processes = [
        subprocess.Popen(
            command, env=environment(work, files), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for command in commands
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        start = time.perf_counter()
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        replies = []
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            replies.append({**json.loads(line or "{}"), "code": process.wait(PATIENCE)})
        elapsed = (time.perf_counter() - start) * 1e3
    return {"replies": replies, "milliseconds": elapsed}


def nvrtc() -> str:
    """Returns the path of the installed NVRTC, or an empty string; never that of a toolkit."""
    try:
        import nvidia
    except ImportError:
        return ""
    found = (path for root in nvidia.__path__ for path in Path(root).glob("*/lib/libnvrtc.so.*"))
    return next((str(path) for path in sorted(found)), "")


# --- death at each system call --------------------------------------------------------------------

# What can change a file system or a lock, and what a process does in between.
CALLS = (
    "openat,read,write,pwrite64,fsync,fdatasync,ftruncate,close,newfstatat,fstat,statx,fcntl,flock,"
    "mkdir,mkdirat,chmod,fchmod,fchmodat,link,linkat,unlink,unlinkat,rename,renameat,renameat2,"
    "utimensat,getdents64,mmap,munmap,lseek"
)


@cache
def why_no_strace() -> str:
    """Returns why processes cannot be killed by strace here, or an empty string."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    probe = [strace, "-qq", "-e", "inject=fsync:signal=KILL:when=1", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"strace does not work here: {done.stderr.strip()}"


Prepare = Callable[[Path], object]


def _strace(command: Sequence[str], work: Path, *options: str) -> int:
    """Runs a command, in which {work} stands for its folder, under strace; -9: it was killed."""
    done = subprocess.run(
        ["strace", "-f", "-qq", *options, *(part.format(work=work) for part in command)],
        env=environment(work), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode in (0, -9, 137), f"{options}: {done.returncode} {done.stderr}"
    return 0 if done.returncode == 0 else -9


def calls_of(command: Sequence[str], prepare: Prepare) -> dict[str, tuple[int, int]]:
    """Runs a command once and looks at its system calls.

    Returns:
        For each kind of call how many come before the command first names its folder (those of the
        loader) and how many there are in all. Kinds that come in the loader only are left out.
    """
    with tempfile.TemporaryDirectory(prefix="torchkiln-death-") as folder:
        work = Path(folder)
        prepare(work)
        trace = work / "trace"
        assert _strace(command, work, "-o", str(trace), "-e", f"trace={CALLS}") == 0
        lines = trace.read_text().splitlines()
    names = [re.sub(r"^\d+\s+|\(.*", "", line) for line in lines]
    first = next((n for n, line in enumerate(lines) if folder in line), 0)
    return {
        name: (names[:first].count(name), names.count(name))
        for name in sorted(set(names[first:]) & set(CALLS.split(",")))
    }


def kill_at_each_call(
    command: Sequence[str], prepare: Prepare, check: Callable[[Path], object]
) -> int:
    """Kills a command at each system call of each kind, one per trial, until it ends by itself.

    strace counts each kind of call on its own: for each of them n goes up from the first call after
    the loader's until a trial ends cleanly. The signal comes before the call is carried out, so the
    state after the last one is met too: the next call comes later.

    Args:
        command: argument list, in which {work} stands for the fresh folder of each trial.
        prepare: fills that folder.
        check: asserts what must hold in it afterwards.

    Returns:
        The number of points at which it was killed.
    """
    points = 0
    for call, (before, _) in calls_of(command, prepare).items():
        for when in range(before + 1, 1_000_000):
            with tempfile.TemporaryDirectory(prefix="torchkiln-death-") as folder:
                work = Path(folder)
                prepare(work)
                inject = f"inject={call}:signal=KILL:when={when}"
                died = _strace(command, work, "-o", os.devnull, "-e", f"trace={call}", "-e", inject)
                check(work)
            if died == 0:
                break
            points += 1
    return points


# --- what lies in a cache -------------------------------------------------------------------------

OBJECT = re.compile(r"[0-9a-f]{62}\.[\w.+-]+\.kernel")


def litter(root: Path) -> list[str]:
    """Returns the temporary files of a cache."""
    return sorted(path.name for path in (root / "v1" / "tmp").glob("*"))


def strangers(root: Path) -> Iterator[str]:
    """Yields what is in a cache that a store never puts there."""
    known = {"CACHEDIR.TAG", "pruned"}
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if path.is_dir():
            expected = len(parts) < 3 or (
                parts[1] == "objects" and re.fullmatch("[0-9a-f]{2}", parts[2])
            )
        elif len(parts) == 4 and parts[1] == "objects":
            expected = OBJECT.fullmatch(parts[3])
        else:
            expected = parts[1] in {"tmp", "quarantine"} or parts[-1] in known
        if not expected:
            yield str(path)


def make_old(folder: Path, hours: float) -> None:
    """Lets all files below a folder be older by so many hours."""
    for path in folder.rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - hours * 3600
            os.utime(path, (then, then))
