"""Measures the rows of `benchmarks/cases.py` and writes one JSON file as it goes.

    python -m benchmarks.run --ops nms,roi_align --output docs/reports/five --quick

A run that is killed keeps what it has; the same command goes on from there. Rows of another commit,
GPU or torch are measured again. `python -m benchmarks.report` makes the page.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cases, mmcv_sides, peer_sides
from benchmarks.cases import OURS, Case
from benchmarks.clock import ClockLog
from benchmarks.harness import CpuBench, CudaBench, Settings, short
from torchkiln_cli import _native
from torchkiln_cli.warm import schemas_of

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 2
# A row is not begun with less left than this.
LEAST_SECONDS = 5.0
# A kernel that hangs cannot be interrupted; this long after the budget the process is ended.
GRACE_SECONDS = 60.0
# That compile at once for times of compiles: few, as a program waits for one kernel at a time, and
# many slow each other.
COLD_PROCESSES = 3
# What each takes from the queue on average: more even them out, but starting one takes seconds.
SHARES_PER_PROCESS = 4
QUICK = Settings(rounds=7, sample_us=2000.0)
FULL = Settings(rounds=11, sample_us=5000.0)


class Deadline:
    """How much of the budget is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def git_commit() -> str:
    """The commit of the tree, with a plus sign when files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain") else "")


def version_of(package: str) -> str:
    """The version of a package that is installed, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def facts(commit: str, settings: Settings, on_gpu: bool) -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    row: dict[str, Any] = {
        "commit": commit or git_commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        "mmcv": importlib.import_module("mmcv").__version__ if mmcv_sides.is_built() else "none",
        "peers": ", ".join(filter(peer_sides.can_import, peer_sides.MODULES)) or "none",
        "triton": version_of("triton"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": settings.rounds,
        "gpu": "none",
    }
    if on_gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        except OSError:
            answer = ""
        properties = torch.cuda.get_device_properties()
        row |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": int(getattr(properties, "L2_cache_size", 0)),
            "driver": answer.split("\n")[0],
            "cuda": str(torch.version.cuda),
        }
    return row


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Store:
    """The JSON file: facts of each run, and the rows by key. Written after every change."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "runs": [], "rows": {}}
        if path.exists() and not fresh:
            data = json.loads(path.read_text())
            if data.get("schema") == SCHEMA:
                self.data = data
        self._ran_out()

    def begin(self, run: dict[str, Any]) -> None:
        """Starts a run, or goes on with one of the same facts."""
        runs = self.data["runs"]
        if not runs or any(runs[-1].get(name) != run[name] for name in run):
            runs.append(run)
        self.save()

    @property
    def run(self) -> dict[str, Any]:
        """The facts of this run."""
        return self.data["runs"][-1]  # type: ignore[no-any-return]

    def has(self, case: Case) -> bool:
        """True if the row was measured, or failed, with this commit on this machine."""
        row = self.data["rows"].get(case.key)
        if row is None:
            return False
        run = self.data["runs"][row["run"]]
        names = ("commit", "gpu", "torch", "torchvision", "processor")
        return all(run.get(name) == self.run.get(name) for name in names)

    def put(self, case: Case, measured: dict[str, Any]) -> None:
        """Records a row, also one that has only begun."""
        row = case.described() | measured | {"run": len(self.data["runs"]) - 1}
        self.data["rows"][case.key] = row
        self.save()

    def save(self) -> None:
        """Replaces the file at once: a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)

    def _ran_out(self) -> None:
        """A row that an earlier run began and never ended is a failure, and is not tried again."""
        for row in self.data["rows"].values():
            if row.pop("begun", False):
                row["failure"] = "the process ended while this row was measured"


def sentence(row: dict[str, Any]) -> str:
    """A finished row in a line."""
    if "failure" in row:
        return row["failure"]  # type: ignore[no-any-return]
    parts = []
    for name, numbers in row["sides"].items():
        time_us = numbers.get("cold_us") or numbers.get("warm_us")
        note = numbers.get("failure") or numbers.get("skipped", "")
        parts.append(f"{name} {time_us['median']:.1f} µs" if time_us else f"{name}: {note[:80]}")
    return f"{'; '.join(parts)} ({row['seconds']:.1f} s)"


@dataclass
class Session:
    """One run over the rows."""

    store: Store
    deadline: Deadline
    settings: Settings
    log: ClockLog
    cuda: CudaBench | None

    def __post_init__(self) -> None:
        self.cpu = CpuBench(self.settings, self.log)
        self.threads = torch.get_num_threads()

    def measure(self, wanted: Sequence[Case]) -> None:
        """Every row that is not there yet, until the budget is spent."""
        todo = [case for case in wanted if not self.store.has(case)]
        click.echo(f"{len(wanted)} rows, {len(todo)} to measure, {self.deadline.left():.0f} s")
        for number, case in enumerate(todo, start=1):
            if self.deadline.left() < LEAST_SECONDS:
                click.echo(f"budget spent: {len(todo) - number + 1} rows left; run again to go on")
                return
            click.echo(f"[{number}/{len(todo)}] {case.key}")
            self.store.put(case, {"begun": True, "sides": {}})
            row = self.measured(case)
            self.store.put(case, row)
            click.echo(f"    {sentence(row)}")
            if "failure" in row:
                self.check_device()

    def measured(self, case: Case) -> dict[str, Any]:
        """The row, or its failure."""
        try:
            if case.device == "cpu":
                torch.set_num_threads(case.threads or self.threads)
                return self.cpu.measure(case.make(torch.device("cpu")))
            assert self.cuda is not None
            return self.cuda.measure(case.make(torch.device("cuda")))
        except Exception as error:
            return {"sides": {}, "failure": short(error)}
        finally:
            torch.set_num_threads(self.threads)
            self.clean()

    def count(self, wanted: Sequence[Case]) -> None:
        """Launches and synchronisations, after all timing: a profiler slows later calls down."""
        rows = self.store.data["rows"]
        todo = [case for case in wanted if case.device == "cuda" and self.store.has(case)]
        for case in todo:
            row = rows[case.key]
            sides = {n: s for n, s in row["sides"].items() if "how" in s and "launches" not in s}
            if self.deadline.left() < LEAST_SECONDS:
                return
            if sides:
                self.count_row(case, sides)
                self.store.save()
        click.echo(f"launches counted: {len(todo)} rows")

    def count_row(self, case: Case, sides: dict[str, Any]) -> None:
        """Adds the counts to the sides that were timed."""
        assert self.cuda is not None
        try:
            work = case.make(torch.device("cuda"))
            for side in work.sides:
                # Compiled code is left out: it would be compiled again.
                if side.name in sides and not side.compiled:
                    sides[side.name]["launches"] = self.cuda.count(side, work.inputs)
        except Exception as error:
            click.echo(f"counting {case.key}: {short(error)}")
        finally:
            self.clean()

    def clean(self) -> None:
        """Gives the memory of graphs and inputs back."""
        gc.collect()
        if self.cuda is not None:
            try:
                torch.cuda.empty_cache()
            except Exception as error:
                click.echo(f"    {short(error)}")

    def check_device(self) -> None:
        """After an illegal access a process can do nothing more: a new one takes over."""
        if self.cuda is None:
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            click.echo(f"the device's context is lost ({short(error)}); starting anew")
            left = max(0, int(self.deadline.left()))
            arguments = [a for a in sys.argv[1:] if a != "--fresh"]
            command = [sys.executable, "-m", "benchmarks.run", *arguments]
            self.log.close()
            sys.stdout.flush()
            os.execv(sys.executable, [*command, "--budget-seconds", str(left)])


def with_kernels(operators: Sequence[str]) -> list[str]:
    """Those that launch kernels of ours; the others are tensor operations, and compile nothing."""
    _native.load_operators()
    kernels = _native.control("kernels")["kernels"]
    known = {schema for kernel in kernels for schema in kernel["operators"]}
    return [name for name in operators if known.intersection(schemas_of([name]))]


def cold_compiles(operators: Sequence[str], deadline: Deadline) -> dict[str, Any]:
    """Compiles every default kernel into an empty cache; few processes, one at a time each."""
    n_shares = COLD_PROCESSES * SHARES_PER_PROCESS
    shares = [share for k in range(n_shares) if (share := operators[k::n_shares])]
    try:
        with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(COLD_PROCESSES) as pool:
            compiled = partial(compiled_cold, cache=cache, deadline=deadline)
            found = list(pool.map(compiled, shares))
    except (subprocess.TimeoutExpired, OSError) as error:
        return {"failure": short(error)}
    except (ValueError, KeyError) as error:
        return {"failure": f"torchkiln warm told no kernels: {short(error)}"}
    # What operators of two shares have in common is compiled for one, and a hit for the other.
    kernels = [kernel for share in found for kernel in share if kernel.get("status") != "hit"]
    good = sorted((k["milliseconds"], k["specialization"]) for k in kernels if "error" not in k)
    if not good:
        return {"failure": kernels[0].get("error", "no kernel") if kernels else "no kernel"}
    return {
        "processes": min(COLD_PROCESSES, len(shares)),
        "kernels": len(good),
        "failed": len(kernels) - len(good),
        "median_ms": good[len(good) // 2][0],
        "worst": [{"ms": ms, "specialization": name} for ms, name in good[:-6:-1]],
    }


def compiled_cold(operators: Sequence[str], cache: str, deadline: Deadline) -> list[dict[str, Any]]:
    """The default kernels of some operators, their status and the milliseconds that each took."""
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "torchkiln", "warm", "--ops", ",".join(operators)]
    command += ["--dtypes", "float32,float16", "--arch", f"sm_{major}{minor}"]
    command += ["--jobs", "1", "--json"]
    done = subprocess.run(
        command,
        env=os.environ | {"TORCHKILN_CACHE_DIR": cache, "TORCHKILN_COMPILE_JOBS": "1"},
        capture_output=True,
        text=True,
        timeout=deadline.left(),
        check=False,
    )
    if not done.stdout:
        raise ValueError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout)["kernels"]  # type: ignore[no-any-return]


def selected(operators: str, device: str, quick: bool) -> list[Case]:
    """The rows of the operators that were asked for; those of the issue first."""
    if device == "cpu":
        rows = cases.cpu_cases(quick)
    else:
        rows = cases.gpu_cases(quick)
        if device == "both":
            first = [case for case in rows if case.quick]
            rows = [*first, *cases.cpu_cases(quick=False), *rows[len(first) :]]
    names = [name.strip() for name in operators.split(",") if name.strip()]
    known = sorted({case.operator for case in rows})
    for name in names:
        if name not in known:
            raise click.BadParameter(f"must be among {', '.join(known)}; got {name}")
    return [case for case in rows if not names or case.operator in names]


def chosen_device(device: str) -> str:
    """Both kinds where there is a GPU, else the CPU."""
    if device == "auto":
        return "both" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise click.BadParameter("there is no CUDA device; use --device cpu")
    return device


@click.command()
@click.option("--ops", default="", help="Operators, for example nms,roi_align; all by default.")
@click.option("--output", default="benchmarks-output", help="File to write, without suffix.")
@click.option("--quick/--full", default=True, help="Only rows with a target, or all.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu", "both"]), default="auto")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@click.option("--compile-seconds", default=45.0, help="Most that torch.compile may take for a row.")
@click.option("--no-count", is_flag=True, help="Do not count launches with the profiler.")
@click.option("--cold-compile", is_flag=True, help="Time the compile of every default kernel, too.")
@click.option("--budget-seconds", default=600.0, help="No row is begun after this long.")
@click.option("--rounds", default=0, help="Rounds per row; 7 for --quick and 11 for --full.")
@click.option("--commit", default="", help="Commit of the tree, when it is no git checkout.")
@click.option("--fresh", is_flag=True, help="Forget what the file has.")
def main(
    ops: str,
    output: str,
    quick: bool,
    device: str,
    no_compile: bool,
    compile_seconds: float,
    no_count: bool,
    cold_compile: bool,
    budget_seconds: float,
    rounds: int,
    commit: str,
    fresh: bool,
) -> None:
    """Measures torchkiln's operators and their peers."""
    faulthandler.dump_traceback_later(budget_seconds + GRACE_SECONDS, exit=True)
    deadline = Deadline(budget_seconds)
    base = QUICK if quick else FULL
    settings = Settings(
        rounds=rounds or base.rounds,
        sample_us=base.sample_us,
        compile=not no_compile,
        compile_seconds=compile_seconds,
    )
    device = chosen_device(device)
    wanted = selected(ops, device, quick)
    on_gpu = device != "cpu"
    # Not with_suffix: a name may have a dot of its own.
    store = Store(Path(f"{output}.json"), fresh)
    store.begin(facts(commit, settings, on_gpu))
    with ClockLog(torch.cuda.current_device() if on_gpu else None) as log:
        session = Session(
            store, deadline, settings, log, CudaBench(settings, log) if on_gpu else None
        )
        if session.cuda is not None and "copy_bandwidth" not in store.run:
            store.run["copy_bandwidth"] = session.cuda.copy_bandwidth()
            click.echo(f"copy: {store.run['copy_bandwidth'] / 1e12:.2f} TB/s")
        session.measure(wanted)
        if on_gpu and not no_count:
            session.count(wanted)
    if on_gpu and cold_compile and deadline.left() > LEAST_SECONDS:
        operators = with_kernels(sorted({case.operator for case in wanted}))
        found = cold_compiles(operators, deadline)
        store.data["cold_compile"] = {"commit": store.run["commit"], **found}
        store.save()
        click.echo(f"cold compile: {store.data['cold_compile']}")
    rows = [store.data["rows"][case.key] for case in wanted if case.key in store.data["rows"]]
    bad = sum("failure" in row or "failure" in row["sides"].get(OURS, {}) for row in rows)
    click.echo(f"{len(rows)} of {len(wanted)} rows in {store.path}; ours failed in {bad}")
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
