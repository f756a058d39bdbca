"""Compiles kernels into the cache before they are needed, for GPUs that need not be here."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import collections
import os
import queue
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import click

from torchkiln_cli import _interrupt, _native
from torchkiln_cli._output import Progress, emit_table, size_text


class UsageError(Exception):
    """A wrong argument: the sentence says what is known."""


@dataclass(frozen=True)
class Row:
    """One specialisation for one architecture, and how it went."""

    operator: str
    specialization: str
    arch: str
    status: str  # compiled, hit, failed or unknown
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
        done = sum(row.status in ("compiled", "hit") for row in self.rows)
        return done == self.total

    def summary(self) -> str:
        """One line for people."""
        counts = collections.Counter(row.status for row in self.rows)
        text = (
            f"{self.total} kernels: {counts['compiled']} compiled, {counts['hit']} in the cache "
            f"already, {counts['failed'] + counts['unknown']} failed ({self.seconds:.1f} s)."
        )
        if self.interrupted:
            text += (
                f" Interrupted with {self.total - len(self.rows)} to go; what is done stays in the "
                "cache, and the same command goes on from there."
            )
        return text


def parse_architectures(text: str) -> list[str]:
    """Splits "sm_80,sm_90" and checks each against the NVRTC that is installed."""
    return check_architecture_names(text, known_architectures())


def check_architecture_names(text: str, known: Sequence[str] = ()) -> list[str]:
    """Splits "sm_80,sm_90"; each must be known, or look right when nothing is."""
    names = split(text)
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


@dataclass(frozen=True)
class Selection:
    """What to compile: kernels of manifests, or the generic variants of operators.

    Attributes:
        manifests: files as `torchkiln record` writes them.
        operators: names; None for all. Not looked at when there are manifests.
        dtypes: such as "float32", of the generic variants; None for all.
    """

    manifests: Sequence[str] = ()
    operators: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None


def parse_selection(
    manifests: Sequence[str], ops: str | None, all_ops: bool, dtypes: str | None
) -> Selection:
    """Checks that exactly one way to select was taken."""
    if sum([bool(manifests), bool(ops), all_ops]) != 1:
        raise UsageError("Give one of --manifest, --ops and --all")
    if manifests and dtypes:
        raise UsageError("--dtypes goes with --ops or --all; a manifest names its own")
    return Selection(
        manifests, split(ops) if ops else None, split(dtypes) if dtypes is not None else None
    )


Work = list[tuple[dict[str, Any], str]]


def work_of(selection: Selection, architectures: Sequence[str]) -> tuple[Work, list[Row]]:
    """Pairs of a specialisation and an architecture; rows for what this version does not know.

    With the choices that tuning recorded for GPUs of these architectures.

    Raises:
        UsageError: an operator, dtype or manifest that does not exist.
    """
    _native.load_operators()
    try:
        if selection.manifests:
            reply = _native.control(
                "manifest.expand",
                paths=list(selection.manifests),
                architectures=list(architectures),
            )
        else:
            reply = _native.control(
                "expand",
                operators=selection.operators,
                dtypes=selection.dtypes,
                architectures=list(architectures),
            )
    except _native.ControlError as error:
        if error.argument == "ops" and selection.operators is not None:
            schemas = schemas_of(selection.operators)
            if schemas != selection.operators:
                return work_of(replace(selection, operators=schemas), architectures)
        if error.is_usage:
            raise UsageError(f"--{error}") from error
        raise
    work = [
        (s, arch)
        for s in reply["specializations"]
        for arch in architectures
        if int(arch.removeprefix("sm_")) >= s.get("min_architecture", 0)
        and arch == s.get("arch", arch)
    ]
    unknown = [
        Row("", row["text"], arch, "unknown", 0.0, error=row["error"])
        for row in reply.get("unknown", [])
        for arch in architectures
    ]
    return work, unknown


def schemas_of(names: Sequence[str]) -> list[str]:
    """The operators behind public functions, some of which have other names; each once."""
    from torchkiln import testing

    parities = testing.find().values()
    known = {function: p.op for p in parities for function in p.functions}
    known |= {p.op: p.op for p in parities}
    return list(dict.fromkeys(known.get(name, name) for name in names))


def warm(selection: Selection, architectures: Sequence[str], jobs: int | None = None) -> Outcome:
    """Brings every specialisation for every architecture into the cache.

    Args:
        selection: the kernels.
        architectures: such as "sm_90".
        jobs: compiles at a time; by default by cores and memory.

    Returns:
        The outcome. Ctrl-C ends the run early: the outcome says so.

    Raises:
        UsageError: an operator, dtype or manifest that does not exist.
    """
    work, unknown = work_of(selection, architectures)
    outcome = compile_work(work, jobs)
    outcome.rows += unknown
    outcome.total += len(unknown)
    return outcome


def use_jobs(jobs: int | None) -> None:
    """Tells the engine how many compiles may run at a time; before its first command."""
    if jobs is not None:
        os.environ["TORCHKILN_COMPILE_JOBS"] = str(jobs)


def compile_work(
    work: Sequence[tuple[dict[str, Any], str]],
    jobs: int | None = None,
    what: str = "warm",
    own_compiler: bool = False,
) -> Outcome:
    """Brings pairs of a specialisation and an architecture into the cache.

    `what` names the bar; with `own_compiler` what another NVRTC made does not count as being there.
    """
    outcome = Outcome(total=len(work))
    start = time.monotonic()
    jobs = jobs or len(os.sched_getaffinity(0))
    futures: list[Future[Row]] = []
    done: queue.SimpleQueue[Future[Row] | None] = queue.SimpleQueue()  # None is Ctrl-C
    with _interrupt.noted(lambda: done.put(None)):
        executor = ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="torchkiln-warm")
        with Progress(what, len(work)) as progress:
            for item in work:
                futures.append(executor.submit(_compile, *item, own_compiler))
                futures[-1].add_done_callback(done.put)
            for _ in work:
                future = done.get()
                if future is None:
                    outcome.interrupted = True
                    break
                row = future.result()
                progress.advance(f"{row.specialization}@{row.arch}")
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


def _compile(specialization: dict[str, Any], arch: str, own_compiler: bool = False) -> Row:
    start = time.monotonic()
    try:
        reply = _native.control(
            "compile", specialization=specialization, target=arch, own_compiler=own_compiler
        )
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
        compile_milliseconds=reply.get("compile_milliseconds") or reply["milliseconds"],
        registers=reply["registers"] or 0,
        spill_bytes=reply.get("spill_bytes") or 0,
        bytes=reply["bytes"],
    )


def known_architectures() -> list[str]:
    """Names of what the installed NVRTC compiles for; empty without one."""
    try:
        return [f"sm_{number}" for number in _native.control("nvrtc", load=True)["architectures"]]
    except _native.ControlError:
        return []  # without NVRTC, what the cache holds can still be confirmed
