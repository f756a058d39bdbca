"""Measures what a user feels before any kernel is fast: first calls, host time per call, import.

Prints one JSON object; `tools/gpu_report.py` turns it into the report. Every measure that needs a
fresh process runs in one of its own, several times; the median is reported with the spread.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import click

# Run in a new interpreter: context first, so that only our own work is in the measured call.
FIRST_CALL = """
import json, sys, time, torch
torch.ones(1, device="cuda").sum().item()
import torchkiln
from torchkiln import _control
boxes = torch.tensor([[0., 0., 4., 4.], [1., 1., 5., 5.]], device="cuda")
image = torch.randn(1, 4, 16, 16, device="cuda")
rois = torch.cat([torch.zeros(2, 1, device="cuda"), boxes], 1)
calls = {
    "box_iou": lambda: torchkiln.ops.box_iou(boxes, boxes),
    "roi_align": lambda: torchkiln.ops.roi_align(image, rois, 7, 1.0, 2),
}
torch.cuda.synchronize()
start = time.perf_counter()
calls[sys.argv[1]]()
torch.cuda.synchronize()
print(json.dumps({"ms": (time.perf_counter() - start) * 1e3, **_control.control("statistics", {})}))
"""

IMPORT = """
import time, torch
start = time.perf_counter()
import torchkiln
print((time.perf_counter() - start) * 1e3)
"""


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Runs `code` in a new interpreter and returns the last line that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    return done.stdout.strip().splitlines()[-1]


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of some milliseconds or microseconds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def first_calls(operator: str, repeats: int) -> dict[str, object]:
    """Cold (empty cache) and warm (new process, cache on disk) first calls of one operator."""
    cold, warm = [], []
    warm_counters: dict[str, object] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            cache = {"TORCHKILN_CACHE_DIR": folder}
            cold.append(json.loads(run_python(FIRST_CALL, operator, **cache))["ms"])
            warm_counters = json.loads(run_python(FIRST_CALL, operator, **cache))
            warm.append(warm_counters.pop("ms"))
    return {
        "operator": operator,
        "cold_ms": spread(cold),
        "from_disk_ms": spread(warm),
        "from_disk_counters": warm_counters,
    }


def host_microseconds(call: Callable[[], object], calls: int = 300) -> float:
    """Wall time of one call, back to back, without waiting for the device in between."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def host_times(rounds: int = 15) -> list[dict[str, object]]:
    """Tiny calls of ours and torchvision's, alternating, no gradient."""
    import torch
    import torchvision

    import torchkiln

    boxes = torch.rand(8, 4, device="cuda") * 8
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(8, device="cuda")
    image = torch.randn(1, 4, 16, 16, device="cuda")
    rois = torch.cat([torch.zeros(8, 1, device="cuda"), boxes], 1)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "roi_align": (
            lambda: torchkiln.ops.roi_align(image, rois, 7, 1.0, 2),
            lambda: torchvision.ops.roi_align(image, rois, 7, 1.0, 2),
        ),
        "nms": (
            lambda: torchkiln.ops.nms(boxes, scores, 0.5),
            lambda: torchvision.ops.nms(boxes, scores, 0.5),
        ),
    }
    rows = []
    for name, (ours, theirs) in pairs.items():
        samples: tuple[list[float], list[float]] = ([], [])
        for call in (ours, theirs):
            host_microseconds(call, 50)
        for _ in range(rounds):
            samples[0].append(host_microseconds(ours))
            samples[1].append(host_microseconds(theirs))
        ratio = statistics.median(samples[0]) / statistics.median(samples[1])
        rows.append(
            {
                "operator": name,
                "ours_us": spread(samples[0]),
                "torchvision_us": spread(samples[1]),
                "ratio": ratio,
            }
        )
    return rows


@click.command()
@click.option("--repeats", default=5, help="Fresh processes per first-call measure.")
def main(repeats: int) -> None:
    """Prints the measures as JSON."""
    result = {
        "first_calls": [first_calls(name, repeats) for name in ("box_iou", "roi_align")],
        "import_ms": spread([float(run_python(IMPORT)) for _ in range(2 * repeats)]),
        "host": host_times(),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
