"""Measures deployment: what a bundle of all operators costs, how it serves, what a GPU says.

`measure` runs on any machine, without a GPU; `gpu` runs under TORCHKILN_JIT=forbid with nothing but
a bundle that was made elsewhere. Each writes a part of one JSON file; `report` makes the page.

    python -m benchmarks.deployment measure --output docs/reports/deployment
    python -m benchmarks.deployment gpu --bundle all.bundle --output docs/reports/deployment
    python -m benchmarks.deployment report --output docs/reports/deployment

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "sm_75,sm_80,sm_86,sm_89,sm_90,sm_100,sm_103,sm_120"
CLI = [sys.executable, "-m", "torchkiln_cli.main"]
OBJECT_BYTES = 5120  # the object whose lookup is timed is the one next to this size

# One process per call. The context exists before the clock starts, as in a program that uses torch.
FIRST_CALL = """
import json, sys, time, torch
torch.ones(1, device="cuda").sum().item()
import torchkiln
from torchkiln import _control
from torchkiln.testing import _cases, _parity
name, dtype = sys.argv[1], getattr(torch, sys.argv[2])
function, case = next(
    (function, case) for parity in _cases.find().values() for function, case in parity.runs
    if function == name
)
arguments = _parity.prepare(case, dtype, "cuda")
call = getattr(torchkiln.ops, function)
torch.cuda.synchronize()
before = _control.control("statistics")
start = time.perf_counter()
if sys.argv[3] == "graph":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(**arguments)
    graph.replay()
else:
    result = call(**arguments)
torch.cuda.synchronize()
elapsed = (time.perf_counter() - start) * 1e3
after = _control.control("statistics")
outputs = result if isinstance(result, tuple) else (result,)
# What came out of the bundle must be what the reference says.
with torchkiln.backend("reference"):
    expected = call(**arguments)
expected = expected if isinstance(expected, tuple) else (expected,)
for got, wanted in zip(outputs, expected):
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2, check_dtype=False)
kernels = after["loads"] - before["loads"]
print(json.dumps({"ms": elapsed, "kernels": kernels, **after}))
"""

SERVE = """
import json, torch
import torchkiln
from torchkiln import _control, testing
results = testing.verify(device="cuda")
print(json.dumps({
    "checks": len(results),
    "failed": [[r.op, r.case, r.dtype, r.direction, r.message] for r in results if not r.ok],
    "statistics": _control.control("statistics"),
}))
"""


def run(command: Sequence[str], **environment: str) -> str:
    """Runs a command and returns what it printed."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def processor_seconds() -> float:
    """What the children of this process have used so far, on all cores together."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def create(bundle: Path) -> dict[str, Any]:
    """Makes the bundle of all operators for eight architectures from an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        start, used = time.monotonic(), processor_seconds()
        command = [*CLI, "bundle", "create", "--all", "--arch", ARCHS, "--out", str(bundle)]
        reply = json.loads(run([*command, "--json"], TORCHKILN_CACHE_DIR=cache))
        seconds, used = time.monotonic() - start, processor_seconds() - used
        verified = json.loads(run([*CLI, "bundle", "verify", str(bundle), "--json"]))
    return {
        "seconds": seconds,
        "processor_seconds": used,
        "cores": len(os.sched_getaffinity(0)),
        "objects": reply["bundle"]["objects"],
        "bytes": reply["bundle"]["bytes"],
        "compile_ms": statistics.median(row["milliseconds"] for row in reply["kernels"]),
        "complete": verified["ok"],
        "spilling": len(verified["spilling"]),
        "compilers": verified["compilers"],
    }


def starts(bundle: Path, repeats: int) -> dict[str, float]:
    """Median wall time of commands that need no operator, in milliseconds."""
    commands = {
        "--help": ["--help"],
        "cache stat": ["cache", "stat", "--json"],
        "bundle verify --help": ["bundle", "verify", "--help"],
        "bundle verify (64 kernels)": ["bundle", "verify", str(bundle), "--json"],
    }
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, arguments in commands.items():
            samples = []
            for _ in range(repeats):
                start = time.perf_counter()
                run([*CLI, *arguments], TORCHKILN_CACHE_DIR=cache)
                samples.append((time.perf_counter() - start) * 1e3)
            times[name] = statistics.median(samples)
    return times


def lookup(bundle: Path, program: str) -> dict[str, Any]:
    """Opening, finding and verifying, by the C++ program of benchmarks/lookup.cpp."""
    with tempfile.TemporaryDirectory() as cache:
        return dict(json.loads(run([program, str(bundle), cache, str(OBJECT_BYTES)])))


def save(output: str, part: str, values: dict[str, Any]) -> None:
    """Writes one part, and keeps the others."""
    path = Path(output + ".json")
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[part] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=1) + "\n")


@click.group()
def main() -> None:
    """Deployment in numbers."""


@main.command()
@click.option("--output", required=True, help="Report, without suffix.")
@click.option("--bundle", help="Where the bundle goes; a temporary folder by default.")
@click.option("--program", required=True, help="torchkiln_lookup_benchmark of the build folder.")
@click.option("--repeats", default=11, help="Starts per command.")
def measure(output: str, bundle: str | None, program: str, repeats: int) -> None:
    """Measures everything that needs no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(bundle or folder + "/all.bundle").absolute()
        small = Path(folder) / "small.bundle"
        arguments = ["--ops", "box_iou", "--dtypes", "float32,float16", "--arch", "sm_80,sm_90"]
        run([*CLI, "bundle", "create", "--out", str(small), *arguments], TORCHKILN_CACHE_DIR=folder)
        save(output, "lookup_small", lookup(small, program))
        save(output, "starts_ms", starts(small, repeats))
        save(output, "create", create(path))
        save(output, "lookup", lookup(path, program))


@main.command()
@click.option("--bundle", required=True, type=click.Path(exists=True), help="Made without a GPU.")
@click.option("--output", required=True, help="Report, without suffix.")
@click.option("--repeats", default=5, help="Fresh processes per first call.")
def gpu(bundle: str, output: str, repeats: int) -> None:
    """Runs every operator from the bundle alone, where compiling is forbidden."""
    import torch

    sealed = {
        "TORCHKILN_BUNDLES": os.path.abspath(bundle),
        "TORCHKILN_JIT": "forbid",
        "TORCHKILN_CACHE_DIR": "/proc/nowhere",
        "TORCHKILN_NVRTC_PATH": "/nowhere",
        "HOME": "/nowhere",
    }
    rows = []
    for operator in FIRST_CALLS:
        for how in ("eager", "graph"):
            if how == "graph" and operator in SYNCHRONISING:
                continue
            command = [sys.executable, "-c", FIRST_CALL, operator, "float32", how]
            samples = [json.loads(run(command, **sealed)) for _ in range(repeats)]
            rows.append({
                "operator": operator,
                "how": how,
                "ms": statistics.median(s["ms"] for s in samples),
                "ms_max": max(s["ms"] for s in samples),
                "kernels": samples[0]["kernels"],
                "compiles": max(s["compiles"] for s in samples),
                "nvrtc_opened": max(s["nvrtc_opened"] for s in samples),
                "hits_bundle": samples[0]["hits_bundle"],
            })  # fmt: skip
    save(output, "gpu", {
        "name": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "served": json.loads(run([sys.executable, "-c", SERVE], **sealed).splitlines()[-1]),
        "first_calls": rows,
    })  # fmt: skip


FIRST_CALLS = ("box_iou", "nms", "batched_nms", "nms_padded", "roi_align", "roi_pool",
               "sigmoid_focal_loss")  # fmt: skip
SYNCHRONISING = ("nms", "batched_nms")  # their result has a data-dependent size


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def cpu_rows(data: dict[str, Any]) -> list[list[str]]:
    """What needs no GPU."""
    made, found = data["create"], data["lookup"]
    mib = made["bytes"] / 2**20
    rows = [
        ["measure", "value", "must reach"],
        ["kernels of all operators for 8 architectures", str(made["objects"]), ""],
        [f"time to make them, {made['cores']} cores, no GPU", f"{made['seconds']:.0f} s", ""],
        ["processor time of that", f"{made['processor_seconds']:.0f} s", ""],
        ["size of the bundle", f"{mib:.1f} MiB", ""],
        ["complete by `bundle verify`", "yes" if made["complete"] else "no", "yes"],
        ["opening it", f"{found['open_us'] / 1e3:.3f} ms", "≤ 1 ms"],
    ]
    for name, key in (("the bundle", "bundle_us"), ("the cache folder", "store_us")):
        what = f"finding and verifying a kernel of {found['object_bytes']} bytes in {name}"
        rows.append([what, f"{found[key]:.1f} µs", "≤ 40 µs"])
    opened = found["libnvrtc_opened"] or found["libcuda_opened"]
    rows.append(["libnvrtc or libcuda opened for that", "yes" if opened else "no", "no"])
    for name, milliseconds in data["starts_ms"].items():
        limit = "" if name == "bundle verify --help" else "≤ 150 ms"
        rows.append([f"`torchkiln {name}`", f"{milliseconds:.0f} ms", limit])
    return rows


def gpu_text(gpu_data: dict[str, Any]) -> str:
    """What ran from the bundle alone."""
    served = gpu_data["served"]
    counters = served["statistics"]
    text = (
        f"\n## On a GPU\n\n{gpu_data['name']}, torch {gpu_data['torch']}; the bundle was made on a "
        "machine without a GPU. No compiler, no cache folder, no home directory, "
        "`TORCHKILN_JIT=forbid`.\n\n"
        f"`torchkiln verify` over all operators, dtypes and directions: {served['checks']} checks, "
        f"{len(served['failed'])} failed, {counters['compiles']} compiles, "
        f"{counters['hits_bundle']} kernels from the bundle, {counters['generic_variants']} "
        f"generic variants, {counters['missing']} missing.\n\n"
        "First call of a fresh process after the CUDA context exists, to the end of its kernels "
        "(must reach: ≤ 2 ms). `graph` is the whole capture, instantiation and first replay.\n\n"
    )
    rows = [["operator", "how", "median", "max", "kernels loaded", "compiles"]]
    rows += [
        [r["operator"], r["how"], f"{r['ms']:.2f} ms", f"{r['ms_max']:.2f} ms", str(r["kernels"]),
         str(r["compiles"])]
        for r in gpu_data["first_calls"]
    ]  # fmt: skip
    return text + table(rows) + "\n"


@main.command()
@click.option("--output", required=True, help="Report, without suffix.")
def report(output: str) -> None:
    """Writes the page."""
    data = json.loads(Path(output + ".json").read_text())
    text = (
        "# Report: deployment\n\nWritten by `benchmarks/deployment.py`; the numbers are in the "
        "JSON file beside it. Times are medians.\n\n" + table(cpu_rows(data)) + "\n"
    )
    text += f"\nCompiled by {', '.join(data['create']['compilers'])}.\n"
    if "load" in data:  # written into the JSON by whoever measured on a machine in use
        text += f"\nOn this machine {data['load']}.\n"
    if "gpu" in data:
        text += gpu_text(data["gpu"])
    Path(output + ".md").write_text(text)


if __name__ == "__main__":
    main()
