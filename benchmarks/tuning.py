"""Measures the tuner on a GPU: does it find the same again, what does it cost, what does it bring?

    python -m benchmarks.tuning --output docs/reports/tuning-h200
    python -m benchmarks.tuning --output docs/reports/tuning-h200 --only defaults,host

Every section runs in processes of its own, on an empty cache folder, and ends in the JSON file as
soon as it is done; the page is made from that. Times are those of graph replays on inputs that are
not in L2, sides in turn (`benchmarks/harness.py`): not the tuner's own.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.clock import ClockLog
from benchmarks.harness import CudaBench, Inputs, Settings, Side, Work, sample_all, summarize
from benchmarks.run import facts

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("repeat", "space", "defaults", "host", "ranks")
REPEATS = 20
# The same kernels again and again: each has a space worth searching.
REPEATED = (
    "box_iou anchors float32",
    "nms_padded padded float32",
    "roi_align pyramid float32 contiguous",
    "roi_align pyramid float16 channels_last",
    "roi_pool pyramid float32 contiguous",
    "sigmoid_focal_loss labels float32",
)
ENDLESS_MS = 1e9
LONG_BUDGET_MS = 5000.0
CLOSE = 1.02  # a choice within 2 % is as good
SETTINGS = Settings(rounds=11, sample_us=5000.0)
HOST_CALLS, HOST_ROUNDS = 300, 31


# --- processes ------------------------------------------------------------------------------------


def in_process(name: str, *arguments: str, cache: Path | None = None, **environment: str) -> Any:
    """Runs a part of this file in a new process, on an empty cache unless one is given."""
    with tempfile.TemporaryDirectory(prefix="torchkiln-tuning-") as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "benchmarks.tuning", "--part", name, "--output", str(out)]
        own = {"TORCHKILN_CACHE_DIR": str(cache or Path(folder) / "cache"), **environment}
        subprocess.run(
            [*command, *arguments], cwd=ROOT, env={**os.environ, **own}, check=True, timeout=540
        )
        return json.loads(out.read_text())


def control(command: str, **request: Any) -> dict[str, Any]:
    """A command of the engine."""
    from torchkiln import _control

    reply: dict[str, Any] = _control.control(command, request)
    return reply


def runs(dtypes: Sequence[str], names: Iterable[str] = ()) -> list[Any]:
    """Workloads of all operators; of these names, if any."""
    from torchkiln import testing

    wanted = [getattr(torch, name) for name in dtypes]
    found = testing.runs(testing.find().values(), wanted)
    return [run for run in found if not names or str(run) in names]


def tune(run: Any, direction: str, arguments: Inputs) -> list[dict[str, Any]]:
    """Launches once in mode tune; what was tuned for it."""
    first = control("tune.report", since=0)["next"]
    run.bind(direction, arguments)()
    torch.cuda.synchronize()
    rows: list[dict[str, Any]] = control("tune.report", since=first)["tuned"]
    return rows


class Setting:
    """What the engine is told before a side is prepared; told again only when it changes."""

    def __init__(self) -> None:
        self._now: Any = None

    def use(self, mode: str, records: list[Any] | None = None) -> None:
        """Sets the mode, and the records if they are given."""
        wanted = (mode, id(records))
        if wanted == self._now:
            return
        control("tune.set", mode=mode)
        if records is not None:
            control("records.import", records=records)
        self._now = wanted


def compare(
    bench: CudaBench, arguments: Inputs, prepared: dict[str, Callable[[Inputs], Any]]
) -> dict[str, Any] | None:
    """Microseconds of each side, sampled in turn; None where a call cannot be captured.

    A graph holds the kernels that were chosen when it was captured; anything else would run
    whatever the last setting says.
    """
    work = Work(arguments, [Side(name, prepare) for name, prepare in prepared.items()])
    with bench.side_context():
        lanes = [bench.open(side, work, None) for side in work.sides]
        if any(lane.facts["how"] != "graph" for lane in lanes):
            return None
        metric = "cold" if all("cold" in lane.timers for lane in lanes) else "warm"
        for lane in lanes:
            lane.timers = {metric: lane.timers[metric]}
        windows = sample_all(bench, lanes)
    summaries = {n.side.name: summarize(n, windows[n.side.name], bench.log) for n in lanes}
    return {name: summary[f"{metric}_us"] for name, summary in summaries.items()}


# --- (a) the same again ---------------------------------------------------------------------------


def part_once(budget_ms: str) -> dict[str, Any]:
    """Tunes the repeated workloads: the choices by call, and the records."""
    import torchkiln

    choices: dict[str, dict[str, Any]] = {}
    with torchkiln.autotune(float(budget_ms), total_ms=ENDLESS_MS):
        for run in runs(("float32", "float16"), REPEATED):
            arguments, known = run.arguments("cuda"), {}
            for direction in sorted(run.directions):
                for row in tune(run, direction, arguments):
                    known[f"{row['kernel'].partition('<')[0]} {row['sizes']}"] = row["best"]
                choices[f"{run}, {direction}"] = dict(known)
    return {"choices": choices, "records": control("records.export")["records"]}


def part_choices(folder: str) -> dict[str, Any]:
    """Times every choice that a process made, and that of the long search, side by side."""
    made = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    result, setting = {}, Setting()
    with ClockLog(0) as log:
        bench = CudaBench(SETTINGS, log)
        for run in runs(("float32", "float16"), REPEATED):
            arguments = run.arguments("cuda")
            for direction in sorted(run.directions):
                name = f"{run}, {direction}"
                chosen = [json.dumps(m["choices"][name], sort_keys=True) for m in made]
                distinct = {text: made[chosen.index(text)]["records"] for text in chosen}

                def prepared(records: list[Any], run: Any = run, d: str = direction) -> Any:
                    def prepare(inputs: Inputs) -> Any:
                        setting.use("lookup", records)
                        return run.bind(d, inputs)

                    return prepare

                times = compare(bench, arguments, {t: prepared(r) for t, r in distinct.items()})
                if times is not None:
                    result[name] = judged(chosen, times)
    return result


def judged(chosen: list[str], times: dict[str, Any]) -> dict[str, Any]:
    """How many of the repeats, which are all but the last, are as good as the usual choice."""
    best = min(time["median"] for time in times.values())
    relative = {text: time["median"] / best for text, time in times.items()}
    counts = collections.Counter(chosen[:-1])
    usual = counts.most_common(1)[0][0]
    return {
        "repeats": len(chosen) - 1,
        "best_us": best,
        "good": sum(relative[text] <= CLOSE * relative[usual] for text in chosen[:-1]),
        "choices": [
            {
                "choice": json.loads(text),
                "times": counts[text],
                "relative": relative[text],
                "long": text == chosen[-1],
            }
            for text in sorted(times, key=lambda text: -counts[text])
        ],
    }


def repeat(repeats: int) -> dict[str, Any]:
    """Tunes the same kernels in fresh cache folders, then compares the choices."""
    with tempfile.TemporaryDirectory(prefix="torchkiln-choices-") as folder:
        for i in range(repeats + 1):  # the last one takes its time
            budget = LONG_BUDGET_MS if i == repeats else 300
            made = in_process("once", str(budget))
            (Path(folder) / f"{i:03}.json").write_text(json.dumps(made))
            click.echo(f"repeat: {i + 1} of {repeats + 1}")
        return in_process("choices", folder)  # type: ignore[no-any-return]


# --- (b) what a search costs ----------------------------------------------------------------------

# 32 points: 4 x 4 x 2.
SPACE_SOURCE = """
template <class Scalar, int vector, int block_size, bool backwards>
__global__ void scaled(const Scalar* x, Scalar* out, long long n, float scale) {
  const long long thread = blockIdx.x * static_cast<long long>(block_size) + threadIdx.x;
  for (int i = 0; i < vector; ++i) {
    const long long at = thread * vector + (backwards ? vector - 1 - i : i);
    if (at < n) out[at] = static_cast<Scalar>(scale * static_cast<float>(x[at]));
  }
}
"""


def part_space() -> dict[str, Any]:
    """Tunes one key of a space of 32 points, or of the space of ours that is nearest to that."""
    import torchkiln

    with torchkiln.autotune(300, total_ms=ENDLESS_MS):
        if hasattr(torchkiln, "Kernel"):
            tune_own_kernel(torchkiln.Kernel)
        else:
            for run in runs(("float32",), ("roi_align pyramid float32 contiguous",)):
                for direction in sorted(run.directions):
                    tune(run, direction, run.arguments("cuda"))
    rows = control("tune.report", since=0)["tuned"]
    row = min(rows, key=lambda row: abs(row["points"] - 32))
    cores = len(os.sched_getaffinity(0))
    return {**row, "cores": cores, "compiles": torchkiln.statistics()["compiles"]}


def tune_own_kernel(kernel: Any) -> None:
    """Declares the kernel above as a user would, and launches it once."""
    scaled = kernel(
        SPACE_SOURCE,
        "scaled",
        name="scaled",
        template={"Scalar": [torch.float32]},
        tunables={
            "vector": [1, 2, 4, 8],
            "block_size": [64, 128, 256, 512],
            "backwards": [False, True],
        },
        args={"x": "in Scalar", "out": "out Scalar", "n": "size i64", "scale": "float"},
        grid=lambda p: -(-p.n // (p.block_size * p.vector)),
        default={"vector": 4, "block_size": 256, "backwards": False},
    )
    x = torch.randn(1 << 26, device="cuda")
    scaled(x, torch.empty_like(x), x.numel(), 0.5)


# --- (c) tuned against default --------------------------------------------------------------------


def part_defaults(dtypes: str, seconds: str) -> dict[str, Any]:
    """Tunes every workload; times the calls whose kernels got another choice than the default."""
    import torchkiln

    end, setting = time.monotonic() + float(seconds), Setting()
    kernels: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    left, not_captured = 0, []
    everything = runs(dtypes.split(","))
    changed = []
    with torchkiln.autotune(300, total_ms=ENDLESS_MS):
        for run in everything:
            arguments, better = run.arguments("cuda"), False
            for direction in sorted(run.directions):
                rows = tune(run, direction, arguments)
                kernels += [{**row, "call": f"{run}, {direction}"} for row in rows]
                better |= any(row["best"] != row["default"] for row in rows)
                if better:
                    changed.append((run, direction))
    with ClockLog(0) as log:
        bench = CudaBench(SETTINGS, log)
        for run, direction in changed:
            if time.monotonic() > end:
                left += 1
                continue

            def prepared(mode: str, run: Any = run, d: str = direction) -> Any:
                def prepare(inputs: Inputs) -> Any:
                    setting.use(mode)
                    return run.bind(d, inputs)

                return prepare

            sides = {"default": prepared("off"), "tuned": prepared("lookup")}
            times = compare(bench, run.arguments("cuda"), sides)
            if times is None:
                not_captured.append(f"{run}, {direction}")
            else:
                ratio = times["default"]["median"] / times["tuned"]["median"]
                calls.append({"call": f"{run}, {direction}", "ratio": ratio, **times})
    kernels.sort(key=lambda row: row["gain"], reverse=True)
    calls.sort(key=lambda row: row["ratio"], reverse=True)
    return {
        "workloads": len(everything),
        "kernels": kernels,
        "calls": calls,
        "not_captured": not_captured,
        "left": left,
    }


# --- (d) what a recorded choice costs -------------------------------------------------------------


def part_host() -> list[dict[str, Any]]:
    """Host time of tiny warm calls, with a record and in mode off, in turn."""
    import torchkiln

    rows = []
    for name in ("box_iou", "roi_align"):
        (run,) = (r for r in runs(("float32",)) if r.function == name and r.workload.name in
                  ("proposals", "coarse"))  # fmt: skip
        sizes = {key: min(value, 8) for key, value in run.sizes.items()}
        arguments = run.workload.arguments(sizes, run.dtype, run.layout, "cuda")
        call = run.bind("forward", arguments)
        with torchkiln.autotune(300, total_ms=ENDLESS_MS):
            call()
        samples: dict[str, list[float]] = {"lookup": [], "off": []}
        for _ in range(HOST_ROUNDS):
            for mode, values in samples.items():
                with torchkiln.tuning.mode(mode):  # type: ignore[arg-type]
                    for _ in range(20):
                        call()
                    values.append(host_microseconds(call))
        medians = {mode: statistics.median(values) for mode, values in samples.items()}
        records = len(control("records.export")["records"])
        rows.append({"call": name, "records": records, **medians})
    return rows


def host_microseconds(call: Callable[[], object]) -> float:
    """Wall time of one call, back to back, without waiting for the device in between."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / HOST_CALLS * 1e6


# --- (e) ranks ------------------------------------------------------------------------------------


def part_rank(rank: str, world: str, rendezvous: str) -> dict[str, Any]:
    """One rank: tunes something of its own, then takes over what rank 0 has."""
    import torch.distributed as dist

    import torchkiln

    number = int(rank)
    torch.cuda.set_device(number)
    dist.init_process_group(
        "nccl", init_method=f"file://{rendezvous}", rank=number, world_size=int(world)
    )
    (run,) = runs(("float32",), (REPEATED[number % 2],))
    with torchkiln.autotune(300):
        run.bind("forward", run.arguments("cuda"))()
    before = control("records.export")
    start = time.perf_counter()
    digest = torchkiln.tuning.sync()
    seconds = time.perf_counter() - start
    # A rank that is warm for nothing, and one that is cold, must not wait for each other.
    again = torchkiln.tuning.sync()
    after = control("records.export")
    dist.destroy_process_group()
    return {
        "tuned": str(run),
        "records": [len(before["records"]), len(after["records"])],
        "digests": [before["digest"], digest, again, after["digest"]],
        "seconds": seconds,
    }


def ranks() -> dict[str, Any]:
    """A process for each of two GPUs, with cache folders of their own."""
    if torch.cuda.device_count() < 2:
        return {"skipped": f"{torch.cuda.device_count()} GPU"}
    with tempfile.TemporaryDirectory(prefix="torchkiln-ranks-") as folder:
        command = [sys.executable, "-m", "benchmarks.tuning", "--part", "rank"]
        processes = []
        for rank in range(2):
            own = {"TORCHKILN_CACHE_DIR": f"{folder}/cache{rank}"}
            options = ["--output", f"{folder}/{rank}.json", str(rank), "2", f"{folder}/rendezvous"]
            processes.append(
                subprocess.Popen([*command, *options], cwd=ROOT, env={**os.environ, **own})
            )
        codes = [process.wait(timeout=300) for process in processes]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        reports = [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(2)]
    same = len({digest for report in reports for digest in report["digests"][1:]}) == 1
    return {"ranks": reports, "same": same}


PARTS: dict[str, Callable[..., Any]] = {
    "once": part_once,
    "choices": part_choices,
    "space": part_space,
    "defaults": part_defaults,
    "host": part_host,
    "rank": part_rank,
}


@click.command()
@click.option("--output", required=True, help="Report to write, without suffix.")
@click.option("--only", default=",".join(SECTIONS), show_default=True, help="Sections to measure.")
@click.option("--repeats", default=REPEATS, show_default=True)
@click.option("--dtypes", default="float32,float16,bfloat16", show_default=True)
@click.option("--seconds", default=240.0, show_default=True, help="For the calls of `defaults`.")
@click.option("--commit", default="", help="Commit of the tree, when it is no git checkout.")
@click.option("--part", default="", hidden=True)
@click.argument("arguments", nargs=-1)
def main(
    output: str,
    only: str,
    repeats: int,
    dtypes: str,
    seconds: float,
    commit: str,
    part: str,
    arguments: tuple[str, ...],
) -> None:
    """Measures sections and writes OUTPUT.json and OUTPUT.md; other sections stay as they are."""
    if part:
        Path(output).write_text(json.dumps(PARTS[part](*arguments)))
        return
    from benchmarks import tuning_page

    measures: dict[str, Callable[[], Any]] = {
        "repeat": lambda: repeat(repeats),
        "space": lambda: in_process("space"),
        "defaults": lambda: in_process("defaults", dtypes, str(seconds)),
        "host": lambda: in_process("host"),
        "ranks": ranks,
    }
    file = Path(output + ".json")
    report = json.loads(file.read_text()) if file.exists() else {}
    report["facts"] = facts(commit, SETTINGS, on_gpu=True)
    for name in only.split(","):
        start = time.monotonic()
        report[name] = measures[name]()
        click.echo(f"{name}: {time.monotonic() - start:.0f} s")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
        Path(output + ".md").write_text(tuning_page.markdown(report))


if __name__ == "__main__":
    main()
