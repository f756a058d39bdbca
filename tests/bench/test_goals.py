"""What the table of targets says of rows, of two rows of ours and of a whole family."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import goals, report
from benchmarks.rows import Row


def side(us: float, **facts: Any) -> dict[str, Any]:
    """A side that took so long on the device, and as long when called eagerly."""
    spread = {"median": us, "p10": us, "p90": us}
    return {"cold_us": spread, "eager_us": {**spread, "median": facts.pop("eager", us)}, **facts}


def row(operator: str, sides: dict[str, dict[str, Any]], **fields: Any) -> Row:
    """A row of a report."""
    data = {
        "operator": operator, "size": "1x2", "dtype": "float32", "direction": "forward",
        "layout": "", "data": "", "device": "cuda", "threads": 0, "targets": [], "baselines": [],
        "run": 0, "sides": sides, **fields,
    }  # fmt: skip
    return Row("key", data, {"copy_bandwidth": 1e12, "cores": 16})


def ours(us: float, **facts: Any) -> dict[str, dict[str, Any]]:
    return {"torchkiln": side(us, **facts)}


def lines(*rows: Row, compiled: dict[str, Any] | None = None) -> list[list[str]]:
    """Rule, measure and verdict of every goal."""
    return [goal.line()[1:] for goal in goals.goals(rows, compiled)]


def scan(us: float, rule: str, **fields: Any) -> Row:
    # The CPU's row is asked for on every page with a scan.
    return row("selective_scan", ours(us), data=rule, **fields)


OPEN = ["50x PyTorch, aim 150x", "not measured", "**open**"]


@pytest.mark.parametrize(
    ("us", "verdict"), [(119.0, "aim met"), (149.0, "met"), (151.0, "**missed**")]
)
def test_a_discretization_is_compared_with_mamba(us: float, verdict: str) -> None:
    rule = "≤ 1.5x the time of our mamba, aim 1.2x"
    found = lines(scan(us, "foh"), scan(100.0, "mamba"))
    assert found == [[rule, f"{us / 100:.2f}x", verdict], OPEN]


def test_a_row_of_another_type_or_direction_is_no_measure() -> None:
    others = [scan(1.0, "mamba", dtype="float16"), scan(1.0, "mamba", direction="backward")]
    assert ["not measured", "**open**"] in [line[1:] for line in lines(scan(9.0, "foh"), *others)]


def test_what_is_not_causal_may_take_longer() -> None:
    found = lines(scan(155.0, "poly"), scan(100.0, "mamba"))
    assert found[0] == ["≤ 1.6x the time of our mamba, aim 1.3x", "1.55x", "met"]


def test_a_comparison_of_two_runs_says_so() -> None:
    found = lines(scan(130.0, "foh"), scan(100.0, "mamba", run=1))
    assert found[0][1] == "1.30x, *of two runs*"


@pytest.mark.parametrize("place", ["size", "data"])
def test_the_fixed_order_is_compared_with_the_fast_form(place: str) -> None:
    names = {"size": "1x2, deterministic"} if place == "size" else {"data": "deterministic"}
    slow = row("deformable_aggregation", ours(190.0), **names)
    fast = row("deformable_aggregation", ours(100.0))
    rule = "≤ 2x the time of our fast form, aim 1.3x"
    assert lines(slow, fast) == [[rule, "1.90x", "met"]]


def test_the_fixed_order_of_a_scan_is_no_other_rule() -> None:
    found = lines(scan(190.0, "mamba, deterministic"), scan(100.0, "mamba"))
    assert found == [OPEN, ["≤ 2x the time of our fast form, aim 1.3x", "1.90x", "met"]]


def test_half_precision_is_compared_with_our_float32() -> None:
    half = row("deformable_aggregation", ours(80.0), dtype="float16")
    single = row("deformable_aggregation", ours(100.0))
    assert lines(half, single) == [["1.4x our float32, aim 1.8x", "1.25x", "**missed**"]]


def test_memory_is_compared_with_the_peers() -> None:
    sides = {"torchkiln": side(1, extra_bytes=60), "mamba-ssm": side(2, extra_bytes=100)}
    found = lines(row("selective_scan", sides, data="mamba"))
    assert found[0] == ["extra memory ≤ 1x mamba-ssm's, aim 0.5x", "0.600x", "met"]
    sides["torchkiln"]["extra_bytes"] = 0
    assert lines(row("selective_scan", sides, data="mamba"))[0][2] == "aim met"


def test_the_longest_sequence_must_run() -> None:
    sides = {"torchkiln": side(1), "mamba-ssm": side(2)}
    found = lines(row("selective_scan", sides, data="mamba", size=goals.LONGEST))
    assert ["runs, aim 3x mamba-ssm", "2.00x", "met"] in found


def test_host_time_is_that_of_eager_calls() -> None:
    sides = {
        "torchkiln": side(10, eager=40),
        "deformops": side(30, eager=90),
        "deformops, CUDA": side(11, eager=36),
    }
    found = lines(row("multi_scale_deformable_attention", sides, size="decoder, images 1"))
    assert found == [
        ["1x deformops, aim 1.4x", "1.10x", "met"],
        ["eager: 1x deformops, aim 1.4x", "0.900x", "**missed**"],
        ["eager: aim ≤ 30 µs", "40.0 µs", "aim missed"],
    ]


def test_a_rule_leaves_what_a_row_declares_alone() -> None:
    target = {"kind": "baseline", "must": 3, "aim": 9, "peer": "deformops"}
    sides = {"torchkiln": side(10), "deformops": side(20)}
    found = lines(row("multi_scale_deformable_attention", sides, targets=[target]))
    assert [line[0] for line in found] == ["3x deformops, aim 9x", "eager: 1x deformops, aim 1.4x"]


def test_the_scan_on_all_threads_is_asked_for_until_it_is_measured() -> None:
    sides = {"torchkiln": side(1), "PyTorch": side(60)}
    on_cpu = row("selective_scan", sides, data="mamba", device="cpu")
    with_one = row("selective_scan", sides, data="mamba", device="cpu", threads=1)
    assert lines(with_one) == [OPEN]
    assert lines(with_one, on_cpu) == [["50x PyTorch, aim 150x", "60.0x", "met"]]


def test_a_wrong_peer_is_named_as_such() -> None:
    target = {"kind": "speedup", "must": 3, "aim": 9, "peer": "mmcv"}
    wrong = {"max": 1.0, "mean": 0.5, "scale": 1.0}
    sides = {"torchkiln": side(10), "mmcv": side(40, error=wrong)}
    found = lines(row("border_align", sides, targets=[target]))
    assert found == [["3x mmcv, aim 9x", "4.00x, *the peer's answer is wrong*", "met"]]


# ---- the family ----


def family(**of_first: Any) -> list[Row]:
    """A row of each operator that the issue names, twice as fast as mmcv."""
    sides = {"torchkiln": side(10), "mmcv": side(20)}
    rows = [row(operator, sides) for operator in goals.FAMILY[1:]]
    return [row(goals.FAMILY[0], {**sides, **of_first}), *rows]


def of_family(rows: list[Row], compiled: dict[str, Any] | None = None) -> dict[str, list[str]]:
    """Measure and verdict of the lines for the whole family."""
    found = [goal.line() for goal in goals.goals(rows, compiled)]
    return {line[0]: line[2:] for line in found if line[0].startswith("the family")}


def test_a_page_of_other_operators_has_no_family() -> None:
    assert of_family(family()[1:]) == {}


def test_means_losses_and_errors_are_of_all_rows() -> None:
    error = {"max": 1e-6, "scale": 1.0}
    slow = {
        "torchkiln": side(10, error={**error, "mean": 3e-8}),
        "mmcv": side(8, error={**error, "mean": 2e-8}),
    }
    back = row("nms3d", {"torchkiln": side(1), "mmcv": side(16)}, direction="backward")
    found = of_family([*family(**slow), back])
    mean = (0.8 * 2 ** (len(goals.FAMILY) - 1)) ** (1 / len(goals.FAMILY))
    assert found["the family: forward"] == [f"{mean:.2f}x", "**missed**"]
    assert found["the family: with a gradient"] == ["16.0x", "aim met"]
    named = "box_iou_rotated forward, 1x2, float32"
    losses = found["the family: rows that take longer than the fastest peer"]
    assert losses == [f"1 row: {named} (1.25x)", "**missed**"]
    errors = found["the family: rows whose mean error is above the fastest peer's"]
    assert errors == [f"1 row: {named} (1.50x)", "**missed**"]


def test_what_was_not_measured_is_open() -> None:
    back = row("nms3d", {"torchkiln": side(1), "mmcv": side(16)}, direction="backward")
    found = of_family([*family(), back])
    still_open = [name for name, line in found.items() if line == ["not measured", "**open**"]]
    assert still_open == [
        "the family: CPU, one thread",
        "the family: CPU, 16 threads",
        "the family: cold compile, median kernel",
        "the family: cold compile, worst kernel",
    ]


def test_the_slowest_row_of_the_cpu_counts() -> None:
    on_cpu = [
        row("nms", {"torchkiln": side(10), "torchvision": side(us)}, device="cpu", threads=threads)
        for us, threads in ((15, 1), (30, 1), (70, 0))
    ]
    found = of_family([*family(), *on_cpu])
    one = "1.50x, nms forward, 1x2, float32, CPU, 1 thread"
    assert found["the family: CPU, one thread"] == [one, "met"]
    every = "7.00x, nms forward, 1x2, float32, CPU, all 16 threads"
    assert found["the family: CPU, 16 threads"] == [every, "met"]


def test_cold_compiles_are_judged() -> None:
    compiled = {"median_ms": 80.0, "worst": [{"ms": 260.0, "specialization": "x"}]}
    found = of_family(family(), compiled)
    assert found["the family: cold compile, median kernel"] == ["80.0 ms", "met"]
    assert found["the family: cold compile, worst kernel"] == ["260 ms", "**missed**"]


def test_cold_compiles_say_how_many_processes_ran() -> None:
    compiled = {"kernels": 2, "median_ms": 80.0, "worst": [{"ms": 260.0, "specialization": "x"}]}
    assert "at once" not in report.cold_compile_text(compiled)
    assert ", 3 processes at once.\n" in report.cold_compile_text(compiled | {"processes": 3})


# ---- the table of costs ----


def test_costs_stand_beside_those_of_the_fastest_peer() -> None:
    sides = {
        "torchkiln": side(10, eager=12, extra_bytes=1024),
        "mmcv": side(40, eager=41, extra_bytes=0),
        "mamba-ssm": side(30, eager=33, extra_bytes=2048),
        "torchkiln, unfused": side(1, eager=1, extra_bytes=0),
    }
    table = report.costs_table([row("scan", sides), row("scan", ours(9, extra_bytes=0), size="7")])
    beside, alone = table.splitlines()[2:]
    assert beside.startswith("| forward, 1x2, float32 | mamba-ssm | 12.0 ‖ 33.0 |")
    assert "1.0 KiB ‖ 2.0 KiB" in beside
    assert alone.startswith("| forward, 7, float32 |  | 9.00 |")
    assert "torchvision" not in table
