"""Runs every operator's kernels under compute-sanitizer on a GPU machine, and writes a report.

memcheck looks at all cases that the references declare, forward and backward, in float32;
racecheck at one call for each kernel. A first pass without the sanitizer compiles the kernels and
notes which call launches which; a kernel that no case launches is met by a workload, a small one
where that launches it. Few processes make all calls: where one dies, another goes on behind the
call that killed it.

`python tools/sanitize.py --output docs/reports/sanitizer-h200` writes `<output>.json` and
`<output>.md`; torchkiln must be importable, compute-sanitizer on the PATH.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from gpu_report import facts, table

TOOLS = ("memcheck", "racecheck")
# What each tool needs to see: our kernels, and every allocation as one of its own.
OPTIONS = {
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
}
COMMON = ["--print-limit", "20", "--kernel-name", "kns=torchkiln", "--error-exitcode", "86"]
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Without the stack on the host, which is the way of any call.
FINDING = re.compile(r"^=========(?!.*(?:Host Frame|host backtrace)).*", re.MULTILINE)
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# Sizes that decide how much there is to do, not what a kernel does; racecheck takes minutes for
# 1000 regions, and looks at a block as well where there are few.
COUNTS = frozenset({"regions", "queries", "height", "width"})
SMALL = 8


@dataclass(frozen=True)
class Task:
    """One call: a case of a reference or a workload, forward and backward.

    Args:
        op: the parity.
        function: the public function.
        name: of the case or of the workload.
        layout: of the workload; empty for a case.
        shrink: what the workload's counts are divided by.
        deterministic: None where the function has no such argument.
    """

    op: str
    function: str
    name: str
    layout: str = ""
    shrink: int = 1
    deterministic: bool | None = None


@dataclass
class Seen:
    """What a process notes of a task; the kernels only without the sanitizer."""

    kernels: list[str]
    elements: int
    seconds: float


@dataclass
class Share:
    """What one process has to do, and what came of it.

    Args:
        tool: of the sanitizer; empty for none.
        tasks: in the order in which they run.
        seen: those that ended.
        errors: where a process died or its tool complained: the call that it died of, how many
            errors, and what was said.
        unreached: those that the time did not reach, or that it cut off.
    """

    tool: str
    tasks: list[Task]
    seen: dict[Task, Seen] = field(default_factory=dict)
    errors: list[tuple[Task | None, int, str]] = field(default_factory=list)
    unreached: list[Task] = field(default_factory=list)


# ---- tasks ----


def all_tasks(ops: Sequence[str]) -> list[Task]:
    """Every case of the operators on CUDA, and every workload whole and small.

    Both ways to a gradient.
    """
    from torchkiln import ops as functions
    from torchkiln import testing

    found = []
    for parity in testing.find().values():
        if "cuda" not in parity.devices or (ops and parity.op not in ops):
            continue
        calls = [(function, case.name, "", 1) for function, case in parity.runs]
        calls += [
            (function, workload.name, layout, shrink)
            for workload in parity.workloads
            for function in workload.functions or parity.functions
            for layout in workload.layouts
            for shrink in ((1, SMALL) if COUNTS & set(workload.sizes) else (1,))
        ]
        for function, name, layout, shrink in calls:
            public = parity.function or function
            if isinstance(public, str):
                public = getattr(functions, public)
            known = "deterministic" in inspect.signature(public).parameters
            ways = (True, False) if known else (None,)
            found += [Task(parity.op, function, name, layout, shrink, way) for way in ways]
    return found


def run_task(task: Task) -> int:
    """Makes the call and waits for it; returns how many numbers its arguments have."""
    import torch

    from torchkiln import testing
    from torchkiln.testing._parity import evaluate

    parity = testing.find()[task.op]
    dtype = torch.float32 if torch.float32 in parity.dtypes else parity.dtypes[0]
    if task.layout:
        workload = next(w for w in parity.workloads if w.name == task.name)
        sizes = {
            size: max(1, count // task.shrink) if size in COUNTS else count
            for size, count in workload.sizes.items()
        }
        arguments = workload.arguments(sizes, dtype, task.layout, "cuda")
        names = parity.differentiable if workload.gradient else ()
    else:
        case = next(c for f, c in parity.runs if (f, c.name) == (task.function, task.name))
        arguments = testing.prepare(case, dtype, "cuda")
        names = parity.differentiated(case)
    if task.deterministic is not None:
        arguments["deterministic"] = task.deterministic
    evaluate(parity.native(task.function), arguments, names)
    torch.cuda.synchronize()
    return sum(x.numel() for x in arguments.values() if isinstance(x, torch.Tensor))


def run_child(order: Path, with_kernels: bool) -> None:
    """Runs the tasks of a file; adds a line to `<file>.done` after each."""
    from torchkiln import deployment

    done = order.with_suffix(".done")
    manifest = order.with_suffix(".manifest")
    for number, fields in enumerate(json.loads(order.read_text())):
        start = time.monotonic()
        if with_kernels:
            manifest.unlink(missing_ok=True)
            with deployment.record(manifest):
                elements = run_task(Task(**fields))
            known = json.loads(manifest.read_text())["kernels"] if manifest.exists() else []
        else:
            elements, known = run_task(Task(**fields)), []
        line = {"task": number, "elements": elements, "kernels": sorted(known)}
        with done.open("a") as file:
            file.write(json.dumps(line | {"seconds": time.monotonic() - start}) + "\n")


# ---- processes ----


def run_tasks(
    tasks: list[Task], folder: Path, prefix: Sequence[str] = (), limit: float = 600.0
) -> tuple[list[dict[str, Any]], str, bool]:
    """Runs tasks in one process.

    Returns what it noted of those that ended, its output, and whether it came to an end.
    """
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
        json.dump([asdict(task) for task in tasks], file)
    command = [*prefix, sys.executable, __file__, "--child", file.name]
    command += [] if prefix else ["--with-kernels"]
    ended = True
    try:
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, timeout=limit, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
        )  # fmt: skip
        output = done.stdout
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        output = said.decode(errors="replace") if isinstance(said, bytes) else said
        output += f"\nno end after {limit:g} seconds"
        ended = False
    notes = Path(file.name).with_suffix(".done")
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [json.loads(line) for line in lines], output, ended


def shares_of(tasks: Iterable[Task], count: int, cost: Mapping[Task, float]) -> list[list[Task]]:
    """Divides tasks so that none has much more to do than another; the long ones come last."""
    shares: list[list[Task]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for task in sorted(tasks, key=lambda task: -cost.get(task, 0.0)):
        least = loads.index(min(loads))
        shares[least].append(task)
        loads[least] += cost.get(task, 0.0) + 0.01
    return [share[::-1] for share in shares if share]


def scouts(tasks: list[Task], jobs: int) -> list[Share]:
    """Shares for a pass without the sanitizer: it compiles, all processes into one cache."""
    return [Share("", tasks[number::jobs]) for number in range(min(jobs, len(tasks)))]


def kernels_of(seen: Mapping[Task, Seen]) -> set[str]:
    """What cases and whole workloads launch; a small one may meet others, which nobody needs."""
    whole = (found for task, found in seen.items() if task.shrink == 1)
    return {kernel for found in whole for kernel in found.kernels}


def covering(seen: Mapping[Task, Seen], wanted: set[str]) -> list[Task]:
    """Few small tasks that launch all of the wanted kernels."""
    chosen, open_kernels = [], set(wanted)
    for task in sorted(seen, key=lambda task: seen[task].elements):
        if open_kernels & set(seen[task].kernels):
            chosen.append(task)
            open_kernels -= set(seen[task].kernels)
    return chosen


def run_share(share: Share, folder: Path, limit: float, end: float) -> None:
    """Runs a share under its tool until `end`, in a new process after each call that kills one."""
    rest = list(share.tasks)
    prefix = []
    if share.tool:
        prefix = ["compute-sanitizer", "--tool", share.tool, *OPTIONS[share.tool], *COMMON]
    while rest:
        left = end - time.monotonic()
        if left <= 0:
            share.unreached += rest
            return
        notes, output, ended = run_tasks(rest, folder, prefix, min(limit, left))
        share.seen |= {rest[note.pop("task")]: Seen(**note) for note in notes}
        dead = rest[len(notes)] if len(notes) < len(rest) else None
        summary = SUMMARY.search(output)
        findings = FINDING.findall(output)[1:]  # behind the tool's name
        is_late = not ended and left < limit
        silent = bool(share.tool) and summary is None
        count = int(summary[1]) if summary else 0
        if is_late:
            share.unreached += rest[len(notes) :]
            if findings:
                share.errors.append((dead, len(findings), "\n".join(findings[:60])))
            return
        if dead is not None or silent or count:
            share.errors.append((dead, max(1, count), "\n".join(findings[:60]) or output[-2000:]))
        if silent and not notes:  # it does not even start
            return
        rest = rest[len(notes) + 1 :]


def run_shares(shares: Sequence[Share], folder: Path, limit: float, end: float) -> None:
    """Runs all of them side by side."""
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda share: run_share(share, folder, limit, end), shares))


# ---- the report ----


def launched_in(message: str, kernels: Iterable[str]) -> bool:
    """Whether a message names one of the kernels: `detection/nms.sort<...>` is `nms::sort`."""
    names = {name.partition("<")[0].rpartition("/")[2].replace(".", "::") for name in kernels}
    return any(name in message for name in names)


def rows_of(seen: Mapping[Task, Seen], shares: Sequence[Share]) -> Iterator[dict[str, Any]]:
    """What each operator met."""
    for op in sorted({task.op for task in seen}):
        own = {task: found for task, found in seen.items() if task.op == op}
        kernels = kernels_of(own)
        row: dict[str, Any] = {"operator": op, "kernels": sorted(kernels)}
        for tool in TOOLS:
            ours = [share for share in shares if share.tool == tool]
            seconds = [
                found.seconds
                for share in ours
                for task, found in share.seen.items()
                if task.op == op
            ]
            errors = [
                {"call": asdict(task) if task else None, "count": count, "message": message}
                for share in ours
                for task, count, message in share.errors
                if (task.op == op if task else launched_in(message, kernels))
            ]
            row[tool] = {"calls": len(seconds), "seconds": sum(seconds), "errors": errors}
        yield row


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    text = f"# compute-sanitizer: {report['facts']['gpu']}\n\n"
    text += "Written by `tools/sanitize.py`; the numbers are in the JSON file beside it.\n\n"
    text += table([["", ""], *([key, value] for key, value in report["facts"].items())])
    head = ["operator", "kernels"]
    head += [f"{tool}: {what}" for tool in TOOLS for what in ("calls", "errors", "seconds")]
    rows = [head]
    for row in report["operators"]:
        cells = [f"`{row['operator']}`", str(len(row["kernels"]))]
        for tool in TOOLS:
            found = row[tool]
            errors = sum(error["count"] for error in found["errors"])
            cells += [str(found["calls"]), str(errors), f"{found['seconds']:.1f}"]
        rows.append(cells)
    text += "\n\n" + table(rows) + "\n"
    missing = ", ".join(f"`{name}`" for name in report["never_launched"]) or "none"
    text += f"\nKernels that no call launched: {missing}.\n"
    if report["unreached"]:
        text += "\nCalls that the time did not reach, or cut off:\n\n"
        text += "".join(f"- {call}\n" for call in report["unreached"])
    for error in report["errors"]:
        call = error["call"] or "a call of this process"
        text += f"\n## {error['tool']}, {call}\n\n```\n{error['message']}\n```\n"
    return text


def entries(ops: set[str]) -> set[str]:
    """All kernels that are declared for the operators, as `detection/nms.sort`."""
    from torchkiln_cli import _native

    found = _native.control("kernels")["kernels"]
    return {
        f"{kernel['path'].removesuffix('.cuh')}.{kernel['entry']}"
        for kernel in found
        if ops & set(kernel["operators"])
    }


@click.command()
@click.option("--output", help="Report to write, without suffix.")
@click.option("--ops", default="", help="Operators, separated by commas; all by default.")
@click.option("--jobs", type=click.IntRange(min=2), default=8, show_default=True,
              help="Processes side by side.")  # fmt: skip
@click.option("--limit", type=float, default=400.0, show_default=True,
              help="Seconds after which a process counts as hung.")  # fmt: skip
@click.option("--seconds", type=float, default=float("inf"),
              help="Time for all; the report names what it did not reach.")  # fmt: skip
@click.option("--commit", default="", help="Commit of the tree, when it is no git checkout.")
@click.option("--child", type=Path, hidden=True)
@click.option("--with-kernels", is_flag=True, hidden=True)
def main(output: str | None, ops: str, jobs: int, limit: float, seconds: float, commit: str,
         child: Path | None, with_kernels: bool) -> None:  # fmt: skip
    """Runs the kernels under memcheck and racecheck; exits with 1 when something was found."""
    if child is not None:
        run_child(child, with_kernels)
        return
    if output is None:
        raise click.ClickException("sanitize: --output must be given")
    if shutil.which("compute-sanitizer") is None:
        raise click.ClickException("sanitize: compute-sanitizer must be on the PATH")
    start = time.monotonic()
    tasks = all_tasks(list(filter(None, ops.split(","))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = scouts(tasks, jobs)
        run_shares(first, folder, limit, start + seconds)
        seen = {task: found for share in first for task, found in share.seen.items()}
        click.echo(f"{len(seen)} calls without the sanitizer: {time.monotonic() - start:.0f} s")
        shares = list(planned(seen, jobs))
        run_shares(shares, folder, limit, start + seconds)
    report = report_of(seen, [*first, *shares], commit, time.monotonic() - start)
    Path(f"{output}.json").write_text(json.dumps(report, indent=1) + "\n")
    Path(f"{output}.md").write_text(markdown(report))
    counts = f"{len(report['errors'])} processes with errors, {len(report['unreached'])} calls"
    click.echo(f"{counts} not reached, {report['facts']['seconds']} s")
    sys.exit(bool(report["errors"]))


def planned(seen: Mapping[Task, Seen], jobs: int) -> Iterator[Share]:
    """What each process does: half of them for each tool."""
    kernels = kernels_of(seen)
    cases = [task for task in seen if not task.layout]
    met = {kernel for task in cases for kernel in seen[task].kernels}
    cost = {task: found.elements * 1e-6 + 0.05 for task, found in seen.items()}
    chosen = {
        "memcheck": [*cases, *covering(seen, kernels - met)],
        "racecheck": covering(seen, kernels),
    }
    for tool in TOOLS:
        for part in shares_of(dict.fromkeys(chosen[tool]), jobs // 2, cost):
            yield Share(tool, part)


def report_of(
    seen: Mapping[Task, Seen], shares: Sequence[Share], commit: str, seconds: float
) -> dict[str, Any]:
    """All numbers."""
    named = {name for task in seen for name in (task.op, task.function)}
    launched = {k.partition("<")[0] for found in seen.values() for k in found.kernels}
    version = subprocess.run(
        ["compute-sanitizer", "--version"], capture_output=True, text=True, check=False
    ).stdout
    return {
        "facts": facts(commit) | {"seconds": f"{seconds:.0f}",
                                  "sanitizer": " ".join(re.findall(r"Version .*", version))},
        "operators": list(rows_of(seen, shares)),
        "never_launched": sorted(entries(named) - launched),
        "unreached": [
            f"{share.tool or 'no tool'}: {task.function} {task.name}"
            + ("" if task.shrink == 1 else ", small")
            + ("" if task.deterministic is None else f", deterministic={task.deterministic}")
            for share in shares
            for task in share.unreached
        ],
        "errors": [
            {"tool": share.tool or "no tool", "call": str(task) if task else None, "count": count,
             "message": message}
            for share in shares
            for task, count, message in share.errors
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main()
