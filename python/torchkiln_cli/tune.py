"""`torchkiln tune`: measures which tunables are best, on workloads of realistic sizes."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from torchkiln_cli import _native
from torchkiln_cli._manifest import Step, Wanted
from torchkiln_cli._output import Progress, emit_json, emit_table, first_line, pairs_text
from torchkiln_cli.warm import Selection, UsageError

if TYPE_CHECKING:
    import torch

    from torchkiln import testing, tuning

# What models compute in; float64 is tuned when it is asked for.
_USUAL_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass
class Outcome:
    """What was tuned; an interrupted run holds what was known by then."""

    total: int = 0  # workloads
    done: int = 0
    seconds: float = 0.0
    stopped: str = ""  # interrupted, or total: the GPU time for all tuning was spent
    tuned: list[tuning.Tuned] = dataclasses.field(default_factory=list)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # sentences by name
    unreached: list[str] = dataclasses.field(default_factory=list)  # kernels of the manifest

    @property
    def complete(self) -> bool:
        """Everything that was asked for is known."""
        unfinished = any(row.stopped for row in self.tuned)
        return not (self.stopped or self.failures or unfinished)

    def to_json(self) -> dict[str, Any]:
        """What `tune --json` prints."""
        return {
            "complete": self.complete,
            "workloads": self.total,
            "done": self.done,
            "stopped": self.stopped,
            "gpu_ms": sum(row.gpu_ms for row in self.tuned),
            "wall_ms": 1e3 * self.seconds,
            "tuned": [dataclasses.asdict(row) for row in self.tuned],
            "failed": [{"name": name, "error": why} for name, why in self.failures.items()],
            "unreached": self.unreached,
        }


# --- what to run --------------------------------------------------------------------------------


def parse_sizes(text: str | None) -> dict[str, int]:
    """The pairs of "regions=512,bins=14"."""
    sizes = {}
    for part in (text or "").split(","):
        name, equals, value = part.strip().partition("=")
        if equals and value.isdecimal():
            sizes[name] = int(value)
        elif part.strip():
            raise UsageError(f"--sizes must look like regions=512,bins=14; got {part.strip()}")
    return sizes


def use_device(name: str) -> torch.device:
    """Makes a GPU the current one; UsageError when it is none of this machine."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device must look like cuda or cuda:0; got {name}")
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not names:
        raise UsageError(
            "--device must be a GPU of this machine; torch sees none. What there is to tune is "
            "printed without one by: torchkiln tune --list"
        )
    if (device.index or 0) >= len(names):
        raise UsageError(f"--device must be among {', '.join(names)}; got {name}")
    torch.cuda.set_device(device.index or 0)  # torch 2.11 takes no device without an index
    return device


def _parse_dtypes(names: Sequence[str]) -> list[torch.dtype]:

    from torchkiln import testing

    known = {str(dtype).removeprefix("torch."): dtype for dtype in testing.FLOATS}
    for name in names:
        if name not in known:
            raise UsageError(f"--dtypes must be among {', '.join(known)}; got {name}")
    return [known[name] for name in names]


def runs_of(
    operators: Sequence[str] | None, dtypes: Sequence[str] | None, sizes: Mapping[str, int]
) -> list[testing.Run]:
    """Workloads of operators, which are named by schema or public function; None for all."""
    from torchkiln import testing

    parities = testing.find()
    known = {name for p in parities.values() for name in (p.op, *p.functions)}
    unknown = [name for name in operators or () if name not in known]
    if unknown:
        raise UsageError(f"--ops must be among {', '.join(sorted(known))}; got {unknown[0]}")

    def is_meant(*names: str) -> bool:
        return operators is None or bool(set(names) & set(operators))

    selected = [p for p in parities.values() if is_meant(p.op, *p.functions)]
    try:
        every = testing.runs(selected, _parse_dtypes(dtypes or _USUAL_DTYPES), sizes)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    found = [run for run in every if is_meant(run.parity.op, run.function)]
    if not found:
        raise UsageError("--ops must name operators that have workloads of these dtypes and sizes")
    return found


# --- tuning -------------------------------------------------------------------------------------


def run(
    selection: Selection,
    sizes: Mapping[str, int],
    device_name: str,
    budget_ms: float | None,
    total_ms: float | None,
) -> Outcome:
    """Tunes what was selected, on one GPU. Ctrl-C ends the run early: the outcome says so.

    Raises:
        UsageError: an operator, dtype, size, manifest or device that does not exist.
    """
    _native.load_operators()
    from torchkiln import tuning

    outcome = Outcome()
    wanted = Wanted(selection.manifests) if selection.manifests else None
    runs = wanted.runs() if wanted else runs_of(selection.operators, selection.dtypes, sizes)
    device = use_device(device_name)
    start = time.monotonic()
    try:
        steps = [(run, run.directions) for run in runs]
        if wanted is not None:
            outcome.failures |= wanted.unknown
            steps, outcome.unreached = wanted.choose(runs, device, outcome.failures)
        with tuning.mode("tune", budget_ms=budget_ms, total_ms=total_ms):
            _tune(steps, device, outcome)
    except KeyboardInterrupt:
        outcome.stopped = "interrupted"
    outcome.seconds = time.monotonic() - start
    return outcome


def _tune(steps: Sequence[Step], device: torch.device, outcome: Outcome) -> None:
    import torch

    from torchkiln import tuning

    outcome.total = len(steps)
    earlier = len(tuning.report())
    with Progress("tune", outcome.total) as progress:
        for run, directions in steps:
            try:
                for direction, call in run.calls(device).items():
                    if direction in directions:
                        progress.show(f"{run}, {direction}; {_best(outcome.tuned)}")
                        call()
                        torch.cuda.synchronize(device)
            except Exception as error:  # the other runs may still work
                outcome.failures[str(run)] = first_line(error)
            finally:
                outcome.tuned = tuning.report(earlier)
            if any(row.stopped == "interrupted" for row in outcome.tuned):
                raise KeyboardInterrupt  # the tuner met it, and kept what is known
            if _spent() and outcome.done + 1 < outcome.total:
                outcome.stopped = "total"
                return
            outcome.done += 1
            progress.advance(_best(outcome.tuned))


def _spent() -> bool:
    """Whether the engine has no time left to measure anything more in this process."""
    from torchkiln import tuning

    total = _native.control("tune.set")["total_ms"]
    return sum(row.gpu_ms for row in tuning.report()) >= float(total)


# --- printing -----------------------------------------------------------------------------------


def _best(tuned: Sequence[tuning.Tuned]) -> str:
    """The kernel that was tuned last, and the best gain so far."""
    if not tuned:
        return "nothing tuned yet"
    best = max(tuned, key=lambda row: row.gain)
    return f"{_name(tuned[-1])} {_gain(tuned[-1])}; best {_gain(best)} ({_name(best)})"


def _name(row: tuning.Tuned) -> str:
    """File and entry of a kernel."""
    return row.kernel.partition("<")[0]


def _gain(row: tuning.Tuned) -> str:
    return f"{100 * row.gain:.0f} %"


def reason(row: tuning.Tuned) -> str:
    """Why the choice is what it is."""
    known = f"{row.measured + row.reused + 1} of {row.points} points"  # one is the default
    if row.best != row.default:
        parts = ["faster than the default" + ("" if row.verified else ", not compared")]
    elif row.points == 1:
        parts = ["the only point"]
    elif row.default_us:
        parts = ["nothing beats the default"]
    else:
        parts = []
    if row.stopped == "budget":
        parts.append(f"time was up after {known}")
    elif row.stopped == "interrupted":
        parts.append(f"interrupted after {known}")
    elif row.stopped:
        parts.append(f"not measured: {row.stopped}")
    if row.failed:
        parts.append(f"{len(row.failed)} cannot be chosen: {row.failed[0]['reason']}")
    return "; ".join(parts)


def emit(outcome: Outcome, as_json: bool) -> None:
    """Prints a table with the greatest gain first, failures and totals."""
    if as_json:
        emit_json(outcome.to_json())
        return
    emit_table(
        "Tuned",
        ("kernel", "problem", "default µs ", "best µs ", "gain ", "choice", "reason"),
        [
            (
                f"{_name(row)}<{pairs_text(row.statics)}>",
                pairs_text(row.sizes),
                f"{row.default_us:.1f}",
                f"{row.best_us:.1f}",
                _gain(row),
                pairs_text(row.best),
                reason(row),
            )
            for row in sorted(outcome.tuned, key=lambda row: -row.gain)
        ],
    )
    for name, sentence in outcome.failures.items():
        click.echo(f"{name}: {sentence}", err=True)
    if outcome.unreached:
        click.echo(unreached_sentence(outcome.unreached))
    click.echo(summary(outcome))


def unreached_sentence(kernels: Sequence[str]) -> str:
    """One sentence, however many there are."""
    some = ", ".join(kernels[:3])
    more = f" and {len(kernels) - 3} more" if len(kernels) > 3 else ""
    return (
        f"No workload launches {some}{more} of the manifest: tune "
        f"{'it' if len(kernels) == 1 else 'them'} in your program, inside torchkiln.autotune()."
    )


def summary(outcome: Outcome) -> str:
    """One line for people."""
    tuned = outcome.tuned
    better = sum(row.best != row.default for row in tuned)
    gpu_ms = sum(row.gpu_ms for row in tuned)
    text = (
        f"{len(tuned)} problems were measured, {better} of them have a better choice than the "
        f"default; what was known is not measured again. GPU time {gpu_ms / 1e3:.1f} s, wall time "
        f"{outcome.seconds:.1f} s."
    )
    if outcome.stopped:
        why = "Interrupted" if outcome.stopped == "interrupted" else "The time (--total-ms) was up"
        text += (
            f" {why} with {outcome.total - outcome.done} of {outcome.total} workloads to go; what "
            "is known is kept, and the same command goes on from there."
        )
    return text


def emit_spaces(operators: Sequence[str] | None, target: str | None, as_json: bool) -> None:
    """Prints the search spaces of operators; UsageError names what is known."""
    _native.load_operators()
    try:
        reply = _native.control("tune.list", operators=operators, target=target)
    except _native.ControlError as error:
        if error.is_usage:
            raise UsageError(f"--{error}") from error
        raise
    if as_json:
        emit_json(reply)
        return
    emit_table(
        f"{len(reply['spaces'])} search spaces",
        ("kernel", "operators", "sizes", "tunables", "points ", "legal ", "defaults"),
        [
            (
                space["kernel"].replace(".cuh:", "."),
                ", ".join(space["operators"]),
                ", ".join(size["name"] for size in space["sizes"] if size["bucket"] != "none"),
                "; ".join(
                    f"{t['name']} {' '.join(map(str, t['values']))}" for t in space["tunables"]
                ),
                str(space["points"]),
                str(space["legal"]),
                "; ".join(pairs_text(default) for default in space["defaults"]),
            )
            for space in reply["spaces"]
        ],
    )
