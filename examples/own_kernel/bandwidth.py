"""How near the operator comes to a copy that moves the same bytes, measured in the same run.

Needs a GPU. The kernels are tuned first.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from bias_gelu import bias_gelu, bias_gelu_backward
from torch.nn import functional

import torchkiln

# Of the copy's bandwidth.
ENOUGH = 0.85
# Tokens and features of a wide layer: many times what the L2 holds.
ROWS, COLUMNS = 32768, 4096
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CALLS, ROUNDS = 10, 15

Call = Callable[[], Any]


def medians(sides: dict[str, Call]) -> dict[str, float]:
    """Microseconds of a call; the sides take turns, so that all meet the same clocks."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, call in sides.items():
            call()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def sides_of(direction: str, dtype: torch.dtype) -> tuple[dict[str, Call], int]:
    """What is timed, and the bytes that must move, each once."""
    x, grad = (torch.randn(ROWS, COLUMNS, device="cuda", dtype=dtype) for _ in range(2))
    bias = torch.randn(COLUMNS, device="cuda", dtype=dtype)
    mask = (torch.rand(ROWS, COLUMNS, device="cuda") < 0.8).to(torch.uint8)
    if direction == "forward":
        moved = 2 * x.nbytes + mask.nbytes
        own = lambda: bias_gelu(x, bias, mask, 1.25)  # noqa: E731
        plain = lambda: functional.gelu(x + bias) * mask * 1.25  # noqa: E731
    else:
        moved = 3 * x.nbytes + mask.nbytes
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = functional.gelu(leaves[0] + leaves[1]) * mask * 1.25
        own = lambda: bias_gelu_backward(grad, x, bias, mask, 1.25)  # noqa: E731
        plain = lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)  # noqa: E731
    source, target = torch.zeros(2, moved // 2, device="cuda", dtype=torch.uint8)
    return {"copy": lambda: target.copy_(source), "own": own, "plain": plain}, moved


def measure() -> list[dict[str, Any]]:
    """Tunes and times both directions in each dtype of training."""
    rows = []
    for dtype in DTYPES:
        for direction in ("forward", "backward"):
            sides, moved = sides_of(direction, dtype)
            with torchkiln.autotune(budget_ms=300):
                sides["own"]()
            us = medians(sides)
            share = us["copy"] / us["own"]
            row = {"direction": direction, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"rows": ROWS, "columns": COLUMNS, "bytes": moved, "us": us}
            row |= {"gb_per_s": {name: moved / us[name] / 1e3 for name in ("copy", "own")}}
            rows.append(row | {"share": share, "ok": share >= ENOUGH})
            del sides
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Measures and prints; 1 below the share that is enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bandwidth: there must be a CUDA device; found none. Run it on a machine with one")
    rows = measure()
    if options.json:
        print(json.dumps({"enough": ENOUGH, "device": torch.cuda.get_device_name(), "rows": rows}))
    for row in () if options.json else rows:
        us, speed = row["us"], row["gb_per_s"]
        print(
            f"{row['dtype']:8} {row['direction']:8}  {us['own']:5.0f} us, {speed['own']:.0f} GB/s, "
            f"{row['share']:.0%} of a copy's {speed['copy']:.0f}; "
            f"plain PyTorch {us['plain']:.0f} us{'' if row['ok'] else '  FAILED'}"
        )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
