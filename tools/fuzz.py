"""Calls operators with random arguments, compares them with their references, keeps the count.

Calls are numbered for each operator, and each has a seed of its own. They run in slices, by other
processes (fuzz_workers.py), so that a crash or a hang ends a slice and gets a name. What is done
stands in one file: the same command goes on where the last one ended.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from fuzz_workers import (
    WRONG,
    Plan,
    Pool,
    Slice,
    Tally,
    make_calls,
    parities,
    run_child,
)

# More are counted, but not kept.
MOST_KEPT = 50


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


def slices(
    run: dict[str, Any], ops: Sequence[str], share: int, size: int, end: float
) -> Iterator[Slice]:
    """Calls of the operator that has had fewest, until all have had their share or time is up."""
    begun = {op: int(run["ops"][op]["calls"]) for op in ops}
    while time.monotonic() < end:
        op = min(ops, key=begun.__getitem__)
        first = begun[op]
        if first >= share:
            return
        begun[op] = min(share, first + size)
        yield Slice(op, first, begun[op], run["ops"][op]["configurations"])


def prepare(run: dict[str, Any], ops: Sequence[str], configurations: int | None) -> None:
    """Adds the operators that a run does not have yet."""
    from torch import __version__

    run["torch"] = __version__.partition("+")[0]
    each = None if configurations is None else max(1, configurations // len(ops))
    for op in ops:
        new = {"calls": 0, "configurations": each, "verdicts": {}, "wrong": []}
        run["ops"].setdefault(op, new)


def run_slices(plan: Plan, ops: Sequence[str], path: Path, settings: dict[str, Any]) -> int:
    """Runs slices until each operator has had its share; returns how many calls were wrong."""
    import rich.console
    import rich.progress

    state = read_state(path)
    run = run_of(state, plan)
    prepare(run, ops, settings["configurations"])
    share = -(-settings["calls"] // len(ops))
    end = time.monotonic() + 60 * settings["minutes"]
    parts = slices(run, ops, share, settings["slice_size"], end)
    # An operator's calls count from the first one on: slices that end early wait for those before.
    early: dict[str, dict[int, Tally]] = {op: {} for op in ops}
    console = rich.console.Console(stderr=True)
    written = 0.0
    with rich.progress.Progress(console=console) as bar:
        task = bar.add_task("", total=share * len(ops))
        try:
            for part, tally in Pool(plan, parts, settings["limit"]).run(settings["jobs"]):
                early[part.op][part.first] = tally
                entry = run["ops"][part.op]
                while entry["calls"] in early[part.op]:
                    record(entry, early[part.op].pop(entry["calls"]))
                if time.monotonic() > written + 1:
                    write_state(path, state)
                    written = time.monotonic()
                done = sum(min(share, run["ops"][op]["calls"]) for op in ops)
                bar.update(task, completed=done, description=part.op)
                for wrong in tally.wrong:
                    console.print(f"{part.op} {wrong['call']}: {wrong['message']}", markup=False)
                    console.print(f"  {reproduction(plan, part, wrong['call'])}", markup=False)
        finally:
            write_state(path, state)
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
    _, verdict, message, call = next(make_calls(plan, part, parities(plan.modules)))
    click.echo(f"{call}\n{verdict}{': ' * bool(message)}{message}")
    return verdict not in WRONG


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
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Processes that make calls side by side.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=0), default=float("inf"),
              help="Begins nothing more after so long; the same command goes on.")  # fmt: skip
@click.option("--slice", "slice_size", type=click.IntRange(min=1), default=50,
              show_default=True, help="Calls that a process makes at a time.")  # fmt: skip
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
    Interrupted, it goes on with the slices in which it was.
    """
    if child is not None:
        run_child(Plan(**json.loads(child)))
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
