"""Calls operators with random arguments, compares them with their references, keeps the count.

Calls are numbered for each operator, and each has a seed of its own. They run in slices, each in a
process of its own, so that a crash or a hang ends a slice and gets a name. What is done stands in
one file: the same command goes on where the last one ended.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torchkiln.testing import Parity

# As in torchkiln.testing._fuzz, which the parent does not import: it must survive anything.
WRONG = ("failed", "crashed")
# To import torch on a busy machine.
START_LIMIT = 300.0
# More are counted, but not kept.
MOST_KEPT = 50
READY = "ready"


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


def make_calls(plan: Plan, part: Slice) -> Iterator[list[Any]]:
    """Yields number, verdict, message and description of each call."""
    import torch

    from torchkiln.testing import _fuzz

    warnings.simplefilter("ignore")
    parity = parities(plan.modules)[part.op]
    yield [READY]
    for number in range(part.first, part.end):
        call = _fuzz.draw_call(parity, plan.seed, number, plan.device, part.configurations)
        outcome = _fuzz.judge(parity, call)
        yield [number, outcome.verdict, outcome.message, str(call)]
        if outcome.verdict == _fuzz.FAILED and plan.device != "cpu":
            torch.cuda.synchronize()  # after a fault no call succeeds: it raises, the child dies


def run_child(plan: Plan, part: Slice) -> None:
    """Makes the calls of a slice. Nothing is buffered: the next call may be the last."""
    for line in make_calls(plan, part):
        os.write(1, json.dumps(line).encode() + b"\n")


# ---- the parent: starts children, notes what they say and how they end ----


def lines_of(child: subprocess.Popen[bytes], limit: float) -> Iterator[list[Any]]:
    """Yields what a child writes until it ends; TimeoutError where a call exceeds the limit."""
    assert child.stdout is not None
    pending, patience = b"", START_LIMIT
    while True:
        if not select.select([child.stdout], [], [], patience)[0]:
            raise TimeoutError
        patience = limit
        chunk = os.read(child.stdout.fileno(), 1 << 16)
        if not chunk:
            return
        *whole, pending = (pending + chunk).split(b"\n")
        yield from map(json.loads, whole)


def run_slice(plan: Plan, part: Slice, limit: float) -> Tally:
    """Runs a slice up to its end, or up to the call that ends its process."""
    tally = Tally()
    command = [sys.executable, __file__, "--child", json.dumps([vars(plan), vars(part)])]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        started, number, end = False, part.first, ""
        try:
            for line in lines_of(child, limit):
                if line == [READY]:
                    started = True
                    continue
                tally.add(line[0], line[1], f"{line[3]}: {line[2]}")
                number = line[0] + 1
        except TimeoutError:
            end = f"no answer for {limit:g} seconds"
            child.kill()
        except BaseException:
            child.kill()
            child.wait()
            raise
        code = child.wait()
        if not end and code:
            end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if end:
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip()[-2000:]
            if not started:
                raise click.ClickException(f"a child did not start: {end}\n{text}")
            tally.add(number, "crashed", f"{end}. {text.splitlines()[-1] if text else ''}".strip())
    return tally


# ---- the state: one file, replaced as a whole ----


def read_state(path: Path) -> dict[str, Any]:
    """What earlier commands have done, by device."""
    if not path.exists():
        return {"runs": {}}
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Whoever reads it finds the old state or the new one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        json.dump(state, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def run_of(state: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The state's run on the plan's device; it must have the plan's seed."""
    run: dict[str, Any] = state["runs"].setdefault(plan.device, {"seed": plan.seed, "ops": {}})
    if run["seed"] != plan.seed:
        raise click.ClickException(
            f"fuzz: --seed must be that of the state ({run['seed']}); got {plan.seed}. "
            "Give another --state"
        )
    return run


def record(entry: dict[str, Any], tally: Tally) -> None:
    """Adds a slice to what is known of its operator."""
    entry["calls"] += tally.calls
    for verdict, count in tally.verdicts.items():
        entry["verdicts"][verdict] = entry["verdicts"].get(verdict, 0) + count
    entry["wrong"] = (entry["wrong"] + tally.wrong)[:MOST_KEPT]


def next_slice(run: dict[str, Any], ops: Sequence[str], share: int, size: int) -> Slice | None:
    """Calls of the operator that has had fewest."""
    op = min(ops, key=lambda name: int(run["ops"][name]["calls"]))
    entry = run["ops"][op]
    first = entry["calls"]
    end = min(share, first + size)
    return Slice(op, first, end, entry["configurations"]) if first < share else None


def run_slices(plan: Plan, ops: Sequence[str], path: Path, settings: dict[str, Any]) -> int:
    """Runs slices until each operator has had its share; returns how many calls were wrong."""
    import rich.console
    import rich.progress
    import torch

    state = read_state(path)
    run = run_of(state, plan)
    run["torch"] = torch.__version__.partition("+")[0]
    configurations = settings["configurations"]
    each = None if configurations is None else max(1, configurations // len(ops))
    for op in ops:
        new = {"calls": 0, "configurations": each, "verdicts": {}, "wrong": []}
        run["ops"].setdefault(op, new)
    share = -(-settings["calls"] // len(ops))
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console) as bar:
        task = bar.add_task("", total=share * len(ops))
        while part := next_slice(run, ops, share, settings["slice_size"]):
            done = sum(min(share, run["ops"][op]["calls"]) for op in ops)
            bar.update(task, completed=done, description=part.op)
            tally = run_slice(plan, part, settings["limit"])
            record(run["ops"][part.op], tally)
            write_state(path, state)
            for wrong in tally.wrong:
                console.print(f"{part.op} {wrong['call']}: {wrong['message']}", markup=False)
                console.print(f"  {reproduction(plan, part, wrong['call'])}", markup=False)
        bar.update(task, completed=share * len(ops))
    return sum(run["ops"][op]["verdicts"].get(verdict, 0) for op in ops for verdict in WRONG)


def reproduction(plan: Plan, part: Slice, number: int) -> str:
    """The command that makes one call again."""
    text = f"python tools/fuzz.py --ops {part.op} --seed {plan.seed} --call {number}"
    if plan.device != "cpu":
        text += f" --device {plan.device}"
    if part.configurations is not None:
        text += f" --configurations {part.configurations}"
    return text + "".join(f" --import {name}" for name in plan.modules)


def reproduce(plan: Plan, part: Slice) -> bool:
    """Makes one call in this process and prints it; False if it went wrong."""
    for line in make_calls(plan, part):
        if line != [READY]:
            _, verdict, message, call = line
            click.echo(f"{call}\n{verdict}{': ' * bool(message)}{message}")
            return verdict not in WRONG
    return False


# ---- the report ----

HEAD = """# Fuzzing

Random calls of each operator, judged by its reference in float64. `tools/fuzz.py` wrote this page
from the counts in [fuzz.json](fuzz.json). Call `n` of an operator is made again by
`python tools/fuzz.py --ops OP --seed SEED --call n`.

| column | what came of a call |
|---|---|
| equal | the result is within the operator's tolerance of the reference |
| refused | wrong arguments were answered by an error of the documented type and form |
| undecided | rounding of the inputs makes the same difference in the reference: a decision at a threshold, cancellation, overflow |
| ended | no value is promised (numbers up to the end of the dtype, and what the generator names); the call returned |
| disagreements | anything else that returned or raised |
| crashes | the process died or hung |"""  # noqa: E501


def report(state: dict[str, Any]) -> str:
    """The page of a state."""
    rows = [HEAD]
    for device, run in state["runs"].items():
        rows += ["", f"## On {device}, seed {run['seed']}, torch {run['torch']}", ""]
        rows += table(run)
        for op, entry in run["ops"].items():
            for wrong in entry["wrong"]:
                message = " ".join(wrong["message"].split())[:400].replace("|", "\\|")
                rows += ["", f"- `{op}` call {wrong['call']}, {wrong['verdict']}: {message}"]
    return "\n".join(rows) + "\n"


def table(run: dict[str, Any]) -> list[str]:
    """One line for each operator, and their sum."""
    columns = ("equal", "refused", "undecided", "ended", *WRONG)
    titles = ("operator", "calls", *columns[:4], "disagreements", "crashes")
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    total: Counter[str] = Counter()
    for op, entry in sorted(run["ops"].items()):
        numbers = {"calls": entry["calls"], **entry["verdicts"]}
        total.update(numbers)
        cells = [f"{numbers.get(name, 0):,}" for name in ("calls", *columns)]
        rows.append(f"| `{op}` | {' | '.join(cells)} |")
    cells = [f"{total[name]:,}" for name in ("calls", *columns)]
    return [*rows, f"| all | {' | '.join(cells)} |"]


# ---- the command ----


def chosen(plan: Plan, ops: str | None) -> list[str]:
    """The operators that are named, or all that run on the device; ClickException for others."""
    known = parities(plan.modules)
    runnable = [op for op, parity in known.items() if plan.device in parity.devices]
    names = ops.split(",") if ops else runnable
    unknown = sorted(set(names) - set(runnable))
    if unknown:
        raise click.ClickException(
            f"fuzz: --ops must be among {', '.join(runnable)}; got {', '.join(unknown)}"
        )
    return names


@click.command()
@click.option("--ops", help="Operators, separated by commas; all by default.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--calls", type=click.IntRange(min=0), default=100_000, show_default=True,
              help="How many there are to be in the state, shared by the operators.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of all calls.")
@click.option("--state", type=click.Path(dir_okay=False, path_type=Path), default="fuzz.json",
              show_default=True, help="What is done; the run goes on from it.")  # fmt: skip
@click.option("--configurations", type=click.IntRange(min=1),
              help="At most so many static configurations, so that compiling ends.")  # fmt: skip
@click.option("--slice", "slice_size", type=click.IntRange(min=1), default=1000,
              show_default=True, help="Calls of one process.")  # fmt: skip
@click.option("--limit", type=click.FloatRange(min=0), default=120.0, show_default=True,
              help="Seconds after which a call counts as hung.")  # fmt: skip
@click.option("--call", "number", type=click.IntRange(min=0),
              help="Makes only this call of the one operator, in this process.")  # fmt: skip
@click.option("--anew", is_flag=True, help="Forgets what the state knows of the operators first.")
@click.option("--report", "page", type=click.Path(dir_okay=False, path_type=Path),
              help="Writes a page about the state at the end.")  # fmt: skip
@click.option("--import", "modules", multiple=True, metavar="MODULE",
              help="A module that declares operators by parity() or parities().")  # fmt: skip
@click.option("--child", hidden=True)
def main(ops: str | None, device: str, seed: int, state: Path, modules: tuple[str, ...],
         number: int | None, anew: bool, page: Path | None, child: str | None,
         **settings: Any) -> None:  # fmt: skip
    """Calls operators with random arguments and compares them with their references.

    Ends with status 1 where the state holds a wrong result, a wrong error, a crash or a hang.
    Interrupted, it goes on with the slice in which it was.
    """
    if child is not None:
        plan, part = json.loads(child)
        run_child(Plan(**plan), Slice(**part))
        return
    plan = Plan(device, seed, modules)
    names = chosen(plan, ops)
    if number is not None:
        if len(names) != 1:
            raise click.ClickException("fuzz: --call must come with one operator in --ops")
        part = Slice(names[0], number, number + 1, settings["configurations"])
        sys.exit(0 if reproduce(plan, part) else 1)
    if anew and state.exists():
        known = read_state(state)
        for name in names:
            run_of(known, plan)["ops"].pop(name, None)
        write_state(state, known)
    wrong = run_slices(plan, names, state, settings)
    if page is not None:
        page.write_text(report(read_state(state)), encoding="utf-8")
    click.echo(f"{wrong} wrong calls" if wrong else "no wrong call", err=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
