"""Processes that make the fuzzer's calls, slice by slice; one that dies or hangs names its call.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torchkiln.testing import Parity

# As in torchkiln.testing._fuzz, which the parent does not import: it must survive anything.
FAILED = "failed"
WRONG = (FAILED, "crashed")
# To import torch on a busy machine.
START_LIMIT = 300.0
# What a child says beside its calls: it has begun, it has made a slice.
READY, DONE = ["ready"], ["done"]
# How a child ends whose GPU answers no more, after a call that has been counted.
GPU_LOST = os.EX_TEMPFAIL


@dataclass(frozen=True)
class Plan:
    """What is asked for, the same in all slices.

    Args:
        device: where the calls run.
        seed: of all calls.
        modules: names of modules that declare operators, beside our own.
    """

    device: str
    seed: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Slice:
    """Calls from `first` to `last` of one operator, one less than `end`."""

    op: str
    first: int
    end: int
    configurations: int | None


@dataclass
class Tally:
    """What came of a slice: how often each verdict, and the calls that went wrong."""

    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """How many calls were made."""
        return sum(self.verdicts.values())

    def add(self, number: int, verdict: str, message: str) -> None:
        """Counts a call."""
        self.verdicts[verdict] += 1
        if verdict in WRONG:
            self.wrong.append({"call": number, "verdict": verdict, "message": message})


# ---- the child: makes calls, writes a line after each ----


def parities(modules: Sequence[str]) -> dict[str, Parity]:
    """Every operator with a generator, those of further modules too."""
    from torchkiln.testing import find
    from torchkiln.testing._cases import declared

    found = find()
    for name in modules:
        found |= declared(importlib.import_module(name))
    return {op: parity for op, parity in found.items() if parity.fuzz is not None}


def make_calls(plan: Plan, part: Slice, known: dict[str, Parity]) -> Iterator[list[Any]]:
    """Yields number, verdict, message and description of each call."""
    from torchkiln.testing import _fuzz

    parity = known[part.op]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(part.first, part.end):
            call = _fuzz.draw_call(parity, plan.seed, number, plan.device, part.configurations)
            outcome = _fuzz.judge(parity, call)
            yield [number, outcome.verdict, outcome.message, str(call)]


def is_gpu_lost() -> bool:
    """Whether a fault has left this process without a GPU: then no call of it succeeds."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_child(plan: Plan) -> None:
    """Makes the calls of slices that come in by line. Nothing is buffered: any may be the last."""

    def say(line: list[Any]) -> None:
        os.write(1, json.dumps(line).encode() + b"\n")

    known = parities(plan.modules)
    say(READY)
    for order in sys.stdin:
        for line in make_calls(plan, Slice(**json.loads(order)), known):
            say(line)
            if line[1] == FAILED and plan.device != "cpu" and is_gpu_lost():
                os._exit(GPU_LOST)
        say(DONE)


# ---- the parent: starts children, notes what they say and how they end ----


class Worker:
    """A child and the slice that it is at.

    Args:
        plan: of all slices.
        part: the first slice.
    """

    def __init__(self, plan: Plan, part: Slice) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fuzz.py"))]
        command += ["--child", json.dumps(vars(plan))]
        # Threads are tried too, but not so many that the workers wait for each other.
        settings = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._child = subprocess.Popen(
            command, env=settings, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._pending = b""
        self.is_ready = False
        self.give(part)

    def fileno(self) -> int:
        """What becomes readable when the child says something."""
        assert self._child.stdout is not None
        return self._child.stdout.fileno()

    def give(self, part: Slice) -> None:
        """Lets the child begin a slice."""
        self.part, self.tally = part, Tally()
        self.heard = time.monotonic()
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: `lines` tells
            self._child.stdin.write(json.dumps(vars(part)).encode() + b"\n")
            self._child.stdin.flush()

    def lines(self) -> list[list[Any]] | None:
        """What the child has said since; None when it has ended."""
        chunk = os.read(self.fileno(), 1 << 16)
        self.heard = time.monotonic()
        *whole, self._pending = (self._pending + chunk).split(b"\n")
        return list(map(json.loads, whole)) if chunk else None

    def is_late(self, limit: float) -> bool:
        """Whether the current call has taken more seconds than the limit."""
        return time.monotonic() - self.heard > (limit if self.is_ready else START_LIMIT)

    def end(self) -> tuple[int, str]:
        """Kills the child if it runs; returns its exit status and the end of what it complained."""
        self._child.kill()
        code = self._child.wait()
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()[-2000:]
        for file in (self._errors, self._child.stdin, self._child.stdout):
            with contextlib.suppress(BrokenPipeError):
                file.close() if file else None
        return code, text

    def close_slice(self, reason: str) -> tuple[Slice, Tally]:
        """The calls made of a slice whose child ended, with the one that ended it; ends the child.

        Args:
            reason: why it was killed; empty where it ended by itself.
        """
        code, text = self.end()
        own = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        reason = reason or own
        if not self.is_ready:
            raise click.ClickException(f"a child did not start: {reason}\n{text}")
        number = self.part.first + self.tally.calls
        if code != GPU_LOST:
            last = text.splitlines()[-1] if text else ""
            self.tally.add(number, "crashed", f"{reason}. {last}".strip())
            number += 1
        return replace(self.part, end=number), self.tally


class Pool:
    """Workers side by side.

    Args:
        plan: of all slices.
        parts: asked for one more whenever a worker is free.
        limit: seconds after which a call counts as hung.
    """

    def __init__(self, plan: Plan, parts: Iterable[Slice], limit: float) -> None:
        self._plan, self._parts, self._limit = plan, iter(parts), limit
        self._selector = selectors.DefaultSelector()

    def _workers(self) -> list[Worker]:
        return [key.data for key in self._selector.get_map().values()]

    def _start(self, part: Slice) -> None:
        worker = Worker(self._plan, part)
        self._selector.register(worker.fileno(), selectors.EVENT_READ, worker)

    def _ended(self, worker: Worker, reason: str = "") -> tuple[Slice, Tally]:
        self._selector.unregister(worker.fileno())
        done, tally = worker.close_slice(reason)
        rest = replace(worker.part, first=done.end)
        following = rest if rest.first < rest.end else next(self._parts, None)
        if following is not None:
            self._start(following)
        return done, tally

    def _listen(self, worker: Worker) -> Iterator[tuple[Slice, Tally]]:
        lines = worker.lines()
        if lines is None:
            yield self._ended(worker)
            return
        for line in lines:
            if line == READY:
                worker.is_ready = True
            elif line == DONE:
                yield worker.part, worker.tally
                part = next(self._parts, None)
                if part is None:
                    self._selector.unregister(worker.fileno())
                    worker.end()
                    return
                worker.give(part)
            else:
                number, verdict, message, call = line
                worker.tally.add(number, verdict, f"{call}: {message}")

    def run(self, jobs: int) -> Iterator[tuple[Slice, Tally]]:
        """Yields each slice when it is done, in parts where a child died."""
        try:
            for part in itertools.islice(self._parts, jobs):
                self._start(part)
            while workers := self._workers():
                for key, _ in self._selector.select(timeout=0.2):
                    yield from self._listen(key.data)
                for worker in set(workers) & set(self._workers()):
                    if worker.is_late(self._limit):
                        yield self._ended(worker, f"no answer for {self._limit:g} seconds")
        finally:
            for worker in self._workers():
                worker.end()
            self._selector.close()
