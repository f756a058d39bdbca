"""Compiles kernels into the cache before they are needed, for GPUs that need not be here."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import collections
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import click

from torchkiln_cli import _native
from torchkiln_cli._output import Progress, emit_table, size_text


class UsageError(Exception):
    """A wrong argument: the sentence says what is known."""


@dataclass(frozen=True)
class Row:
    """One specialisation for one architecture, and how it went."""

    operator: str
    specialization: str
    arch: str
    status: str  # compiled, hit or failed
    milliseconds: float  # of this call
    compile_milliseconds: float = 0.0  # of the compile that made the object, now or earlier
    registers: int = 0
    spill_bytes: int = 0
    bytes: int = 0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `warm --json` prints for it."""
        row: dict[str, Any] = {
            "specialization": self.specialization,
            "arch": self.arch,
            "status": self.status,
            "milliseconds": round(self.milliseconds, 3),
        }
        if self.error is not None:
            row["error"] = self.error
        return row


@dataclass
class Outcome:
    """The rows in the order of the request; interrupted runs hold only what was done."""

    total: int
    seconds: float = 0.0
    interrupted: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Everything that was asked for is in the cache."""
        return len(self.rows) == self.total and not any(r.status == "failed" for r in self.rows)

    def summary(self) -> str:
        """One line for people."""
        counts = {s: sum(r.status == s for r in self.rows) for s in ("compiled", "hit", "failed")}
        text = (
            f"{self.total} kernels: {counts['compiled']} compiled, {counts['hit']} in the cache "
            f"already, {counts['failed']} failed ({self.seconds:.1f} s)."
        )
        if self.interrupted:
            text += (
                f" Interrupted with {self.total - len(self.rows)} to go; what is done stays in the "
                "cache, and the same command goes on from there."
            )
        return text


def parse_architectures(text: str) -> list[str]:
    """Splits "sm_80,sm_90" and checks each against the NVRTC that is installed."""
    names = split(text)
    known = known_architectures()
    for name in names:
        if not re.fullmatch(r"sm_\d+", name) or (known and name not in known):
            listed = ", ".join(known) if known else "names like sm_80 or sm_90"
            raise UsageError(f"--arch must be among {listed}; got {name}")
    if not names:
        raise UsageError("--arch must name at least one architecture, for example sm_80,sm_90")
    return names


def split(text: str) -> list[str]:
    """The parts of a comma-separated list, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def warm(
    operators: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    architectures: Sequence[str],
    jobs: int | None = None,
) -> Outcome:
    """Brings every specialisation for every architecture into the cache.

    Args:
        operators: names; None for all.
        dtypes: such as "float32"; None for all.
        architectures: such as "sm_90".
        jobs: compiles at a time; by default one per core.

    Returns:
        The outcome. Ctrl-C ends the run early: the outcome says so.

    Raises:
        UsageError: an operator or dtype that does not exist.
    """
    _native.load_operators()
    try:
        specializations = _native.control("expand", operators=operators, dtypes=dtypes)
    except _native.ControlError as error:
        if error.is_usage:
            raise UsageError(f"--{error}") from error
        raise
    work = [
        (s, arch)
        for s in specializations["specializations"]
        for arch in architectures
        if int(arch.removeprefix("sm_")) >= s.get("min_architecture", 0)
    ]
    return compile_work(work, jobs)


def compile_work(
    work: Sequence[tuple[dict[str, Any], str]], jobs: int | None = None, what: str = "warm"
) -> Outcome:
    """Brings pairs of a specialisation and an architecture into the cache; `what` names the bar."""
    outcome = Outcome(total=len(work))
    start = time.monotonic()
    jobs = jobs or len(os.sched_getaffinity(0))
    executor = ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="torchkiln-warm")
    futures: list[Future[Row]] = []
    try:
        with Progress(what, len(work)) as progress:
            futures += [executor.submit(_compile, *item) for item in work]
            for future in as_completed(futures):
                row = future.result()
                progress.advance(f"{row.specialization}@{row.arch}")
    except KeyboardInterrupt:
        outcome.interrupted = True
    # The few compiles in flight cannot be stopped, and are worth keeping.
    executor.shutdown(wait=True, cancel_futures=True)
    outcome.rows = [f.result() for f in futures if f.done() and not f.cancelled()]
    outcome.seconds = time.monotonic() - start
    return outcome


def emit_failures(outcome: Outcome) -> None:
    """Prints each sentence once: a missing compiler fails every kernel with the same one."""
    failures = collections.defaultdict(list)
    for row in outcome.rows:
        if row.error is not None:
            sentence = row.error.removeprefix(f"{row.specialization}@{row.arch}: ")
            failures[sentence].append(f"{row.specialization}@{row.arch}")
    for sentence, names in failures.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        click.echo(f"{names[0]}{more}: {sentence}", err=True)


def emit_kernel_table(outcome: Outcome) -> None:
    """Prints every row."""
    emit_table(
        outcome.summary(),
        ("operator", "specialisation", "arch", "compile ", "registers ", "bytes ", "status"),
        [
            (
                row.operator,
                row.specialization,
                row.arch,
                f"{row.compile_milliseconds:.0f} ms",
                str(row.registers),
                size_text(row.bytes),
                row.status,
            )
            for row in outcome.rows
        ],
    )


def _compile(specialization: dict[str, Any], arch: str) -> Row:
    start = time.monotonic()
    try:
        reply = _native.control("compile", specialization=specialization, target=arch)
    except _native.ControlError as error:
        return Row(
            operator=specialization["operator"],
            specialization=specialization["text"],
            arch=arch,
            status="failed",
            milliseconds=1e3 * (time.monotonic() - start),
            error=str(error),
        )
    return Row(
        operator=specialization["operator"],
        specialization=reply["specialization"],
        arch=arch,
        status=reply["status"],
        milliseconds=reply["milliseconds"],
        compile_milliseconds=reply.get("compile_milliseconds", reply["milliseconds"]),
        registers=reply["registers"],
        spill_bytes=reply.get("spill_bytes", 0),
        bytes=reply["bytes"],
    )


def known_architectures() -> list[str]:
    """Names of what the installed NVRTC compiles for; empty without one."""
    try:
        return [f"sm_{number}" for number in _native.control("nvrtc", load=True)["architectures"]]
    except _native.ControlError:
        return []  # without NVRTC, what the cache holds can still be confirmed
