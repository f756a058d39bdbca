"""tune: what it runs, prints and keeps, on a tuner that measures nothing.

Operators, kernels and manifests are the real ones; only launches and the commands about tuning and
recording are planted.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from torchkiln import _control, testing
from torchkiln_cli import _output, tune

IOU = "detection/box_iou.forward<float, mode=0, vector=4, block_size=256>"
IOU_HALF = IOU.replace("float", "half")
LOSS = "detection/box_iou.forward<float, mode=1, vector=4, block_size=256>"
LOSS_BACKWARD = "detection/box_iou.backward<float, mode=1, block_size=32>"
FOCAL = "detection/sigmoid_focal_loss.forward<float, i32, labels={}, gamma={}, output=1, vector=4, "
FOCAL += "block_size=256, items=1>"
# Six workloads, ten kernels and problems.
FAMILY = ("--ops", "box_iou", "--dtypes", "float32")
BY_MODE = {f: i for i, f in enumerate(testing.find()["box_iou"].functions)}


class FakeTuner:
    """Tunes each kernel and size once, and remembers that over commands."""

    def __init__(self) -> None:
        self.real = _control.control
        self.state = {"mode": "lookup", "budget_ms": 300, "total_ms": 60000}
        self.rows: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.modes: list[str] = []
        self.known: set[tuple[str, str]] = set()
        self.recording: str | None = None
        self.gains = iter(())
        self.changes: dict[int, Any] = {}  # of a kernel by its number: fields, or an exception
        self.tried = 0

    def control(self, command: str, request: dict[str, Any]) -> dict[str, Any]:
        if command == "tune.set":
            before, self.state = self.state, {**self.state, **request}
            return before
        if command == "tune.report":
            return {"next": len(self.rows), "tuned": self.rows[request["since"] :]}
        if command == "record.start":
            self.recording = request["path"]
            return {"recording": 1}
        if command == "record.stop":
            self.recording = None
            return {"kernels": 1}
        return self.real(command, request)

    def launch(self, run: testing.Run, direction: str) -> None:
        self.calls.append(f"{run}, {direction}")
        self.modes.append(self.state["mode"])
        kernels = kernels_of(run, direction)
        if self.recording and kernels:
            manifest = {"format": 1, "kernels": kernels}
            Path(self.recording).write_text(json.dumps(manifest))
        for kernel in kernels if self.state["mode"] == "tune" else ():
            self.tune(kernel, dict(run.sizes))

    def tune(self, kernel: str, sizes: dict[str, int]) -> None:
        change = self.changes.pop(self.tried, {})
        self.tried += 1
        if isinstance(change, BaseException):
            raise change
        key = (kernel, str(sizes))
        if key in self.known or sum(r["gpu_ms"] for r in self.rows) >= self.state["total_ms"]:
            return
        self.rows.append(row(kernel, sizes, next(self.gains, 0.0)) | change)
        self.known.add(key)


def row(kernel: str, sizes: dict[str, int], gain: float) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "statics": {"scalar": "float", "labels": "true"},
        "sizes": sizes,
        "default": {"block_size": 256},
        "best": {"block_size": 128 if gain else 256},
        "default_us": 10.0,
        "best_us": 10.0 * (1 - gain),
        "gain": gain,
        "noise": 0.004,
        "points": 4,
        "measured": 3,
        "reused": 0,
        "failed": [],
        "gpu_ms": 50.0,
        "wall_ms": 80.0,
        "stopped": "",
        "verified": True,
    }


def kernels_of(run: testing.Run, direction: str) -> list[str]:
    """What the real operators would launch, for the two that the tests use."""
    scalar = {"float32": "float", "float16": "half"}.get(str(run.dtype)[6:])
    if scalar is None:
        return []
    if run.parity.op == "box_iou":
        mode = BY_MODE[run.function]
        found = [f"detection/box_iou.forward<{scalar}, mode={mode}, vector=4, block_size=256>"]
        if direction != "forward":
            found += [f"detection/box_iou.backward<{scalar}, mode={mode}, block_size=32>"]
        return found
    labels = "true" if "labels" in run.workload.name else "false"
    return [FOCAL.format(labels, run.sizes["gamma"]).replace("float", scalar, 1)]


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> FakeTuner:
    fake = FakeTuner()
    monkeypatch.setattr(_control, "control", fake.control)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def calls(run, device):
        assert device.type == "cuda"
        return {d: (lambda d=d: fake.launch(run, d)) for d in sorted(run.directions)}

    monkeypatch.setattr(testing.Run, "calls", calls)
    return fake


def manifest(folder: Path, *kernels: str) -> str:
    path = folder / "app.json"
    path.write_text(json.dumps({"format": 1, "kernels": sorted(kernels)}))
    return str(path)


# --- what it runs ---------------------------------------------------------------------------------


def test_operators_run_forward_and_backward_in_the_usual_dtypes(tuner, invoke):
    result = invoke("tune", "--ops", "generalized_box_iou", "--budget-ms", "20")
    assert result.exit_code == 0, result.output
    assert tuner.calls == [
        f"generalized_box_iou loss {dtype}, {direction}"
        for dtype in ("float16", "bfloat16", "float32")
        for direction in ("forward", "forward+backward")
    ]
    assert set(tuner.modes) == {"tune"}
    assert tuner.state == {"mode": "lookup", "budget_ms": 300, "total_ms": 60000}


def test_all_operators(tuner, invoke, monkeypatch):
    monkeypatch.setattr(tuner, "launch", lambda run, _: tuner.calls.append(run.parity.op))
    assert invoke("tune", "--all", "--dtypes", "float32").exit_code == 0
    # Other tests may have declared operators of their own, which have no workloads.
    with_workloads = {name for name, parity in testing.find().items() if parity.workloads}
    assert set(tuner.calls) == with_workloads


def test_sizes_are_exchanged(tuner, invoke):
    invoke("tune", "--ops", "box_iou", "--dtypes", "float64", "--sizes", "n=7,m=5")
    parsed = tune.parse_sizes("n=7, m=5")
    assert parsed == {"n": 7, "m": 5}
    result = invoke("tune", "--ops", "sigmoid_focal_loss", "--dtypes", "float32", "--sizes",
                    "gamma=0", "--json")  # fmt: skip
    assert {r["sizes"]["gamma"] for r in json.loads(result.stdout)["tuned"]} == {0}


def test_the_times_are_given_to_the_tuner(tuner, invoke, monkeypatch):
    states = []
    monkeypatch.setattr(tuner, "launch", lambda *_: states.append(dict(tuner.state)))
    arguments = ("tune", *FAMILY)
    invoke(*arguments, "--budget-ms", "20", "--total-ms", "500", "--device", "cuda:1")
    assert states[0] == {"mode": "tune", "budget_ms": 20, "total_ms": 500}
    states.clear()
    invoke(*arguments)
    assert states[0] == {"mode": "tune", "budget_ms": 300, "total_ms": 60000}


# --- what it prints -------------------------------------------------------------------------------


def test_json_has_exactly_the_promised_fields(tuner, invoke):
    tuner.gains = iter([0.2])
    result = invoke("tune", *FAMILY, "--json")
    assert result.exit_code == 0
    reply = json.loads(result.stdout)
    assert reply.pop("wall_ms") >= 0
    first = row(IOU, {"n": 201600, "m": 100}, 0.2)
    assert reply["tuned"][0] == first
    rows = reply.pop("tuned")
    assert len(rows) == 10
    assert reply == {
        "complete": True,
        "workloads": 6,
        "done": 6,
        "stopped": "",
        "gpu_ms": 500.0,
        "failed": [],
        "unreached": [],
    }


def test_the_table_has_the_greatest_gain_first_and_says_why(tuner, invoke):
    tuner.gains = iter([0.0, 0.31, 0.1])
    tuner.changes = {
        2: {"verified": False, "failed": [{"point": {"block_size": 64}, "reason": "spills"}]},
    }
    result = invoke("tune", *FAMILY)
    lines = [line for line in result.stdout.splitlines() if "detection/" in line]
    gains = [float(re.search(r"(\d+) %", line)[1]) for line in lines]
    assert gains == sorted(gains, reverse=True)
    text = " ".join(result.stdout.split())
    for part in (
        "box_iou.forward<scalar=float,",
        "labels=true>",
        "faster than the default",
        "nothing beats the default",
        "n=201600, m=100",
        "10 problems were measured, 2 of them have a better choice than the default; ",
        "GPU time 0.5 s, wall time ",
    ):
        # The table breaks lines inside words.
        assert part.replace(" ", "") in text.replace(" ", ""), result.stdout


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "nothing beats the default"),
        ({"best": {"block_size": 64}}, "faster than the default"),
        ({"best": {"block_size": 64}, "verified": False}, "faster than the default, not compared"),
        ({"points": 1, "measured": 0}, "the only point"),
        (
            {"stopped": "budget", "measured": 1, "reused": 1},
            "nothing beats the default; time was up after 3 of 4 points",
        ),
        (
            {"stopped": "interrupted", "default_us": 0, "measured": 0},
            "interrupted after 1 of 4 points",
        ),
        ({"stopped": "no memory", "default_us": 0}, "not measured: no memory"),
        (
            {"failed": [{"point": {}, "reason": "too much shared memory"}]},
            "nothing beats the default; 1 cannot be chosen: too much shared memory",
        ),
    ],
)
def test_reasons(change, expected):
    from torchkiln.tuning import Tuned

    assert tune.reason(Tuned(**{**row(IOU, {}, 0.0), **change})) == expected


def test_progress_names_the_kernel_and_the_best_gain(tuner, invoke, monkeypatch):
    now = iter(range(0, 10_000, 6))
    monkeypatch.setattr(_output.time, "monotonic", lambda: float(next(now)))
    tuner.gains = iter([0.31])
    result = invoke("tune", *FAMILY)
    assert (
        "tune: 1 of 6, detection/box_iou.forward 31 %; best 31 % (detection/box_iou.forward)\n"
        "tune: 1 of 6, box_iou proposals float32, forward; detection/box_iou.forward 31 %; best "
    ) in result.stderr


# --- what stops it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "planted",
    [KeyboardInterrupt(), {"stopped": "interrupted", "measured": 2}],
    ids=["raised in Python", "met by the tuner"],
)
def test_interrupt_keeps_what_is_known(tuner, invoke, planted):
    tuner.changes = {1: planted}
    result = invoke("tune", *FAMILY)
    assert result.exit_code == 1
    assert "Interrupted with 5 of 6 workloads to go" in result.stdout
    assert "the same command goes on from there" in result.stdout
    assert "detection/box_iou.forward" in result.stdout
    assert tuner.state["mode"] == "lookup"


def test_a_second_run_goes_on(tuner, invoke):
    tuner.changes = {1: KeyboardInterrupt()}
    invoke("tune", *FAMILY)
    tuner.changes = {}
    result = invoke("tune", *FAMILY, "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["tuned"]) == 9  # one was known


def test_it_ends_when_the_time_is_up(tuner, invoke):
    result = invoke("tune", *FAMILY, "--total-ms", "80")
    assert result.exit_code == 1
    assert "The time (--total-ms) was up with 5 of 6 workloads to go" in result.stdout
    assert len(tuner.rows) == 2
    assert tuner.calls[-1] == "box_iou proposals float32, forward"


def test_a_spent_budget_of_a_kernel_is_not_complete(tuner, invoke):
    tuner.changes = {0: {"stopped": "budget", "measured": 1}}
    result = invoke("tune", *FAMILY, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["done"] == 6


def test_a_workload_that_fails_does_not_stop_the_others(tuner, invoke):
    tuner.changes = {0: MemoryError("no room\nfor this")}
    result = invoke("tune", *FAMILY)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "box_iou anchors float32: MemoryError: no room"
    assert "box_iou loss float32, forward+backward" in tuner.calls


# --- manifests ------------------------------------------------------------------------------------


def tuned_calls(tuner: FakeTuner) -> list[str]:
    pairs = zip(tuner.calls, tuner.modes, strict=True)
    return [call for call, mode in pairs if mode == "tune"]


def test_a_manifest_chooses_operators_dtypes_and_directions(tuner, invoke, tmp_path):
    result = invoke("tune", "--manifest", manifest(tmp_path, IOU_HALF))
    assert result.exit_code == 0, result.output
    assert {call.split()[2].strip(",") for call in tuner.calls} == {"float16"}
    # Workloads whose calls launch another mode, or a backward, are only looked at.
    assert tuned_calls(tuner) == [
        "box_iou anchors float16, forward",
        "box_iou proposals float16, forward",
        "box_iou loss float16, forward",
    ]
    assert set(tuner.modes) == {"off", "tune"}
    assert "No workload" not in result.stdout


def test_what_runs_among_others_is_tuned_when_nothing_else_is_left(tuner, invoke, tmp_path):
    # A backward does not come without its forward.
    result = invoke("tune", "--manifest", manifest(tmp_path, LOSS_BACKWARD))
    assert result.exit_code == 0
    assert tuned_calls(tuner) == ["generalized_box_iou loss float32, forward+backward"]
    tuner.calls.clear()
    tuner.modes.clear()
    invoke("tune", "--manifest", manifest(tmp_path, LOSS_BACKWARD, LOSS))
    assert tuned_calls(tuner) == [
        f"generalized_box_iou loss float32, {d}" for d in ("forward", "forward+backward")
    ]


def test_layer_constants_are_sizes(tuner, invoke, tmp_path):
    invoke("tune", "--manifest", manifest(tmp_path, FOCAL.format("true", 3)))
    assert [r["sizes"] for r in tuner.rows] == [{"rows": 200000, "classes": 80, "gamma": 3}]


def test_kernels_that_no_workload_reaches_are_named_in_one_sentence(tuner, invoke, tmp_path):
    scalar = "detection/box_iou.forward<float, mode={}, vector=1, block_size=64>"
    unreached = [scalar.format(mode) for mode in range(4)]
    path = manifest(tmp_path, IOU, *unreached)
    result = invoke("tune", "--manifest", path)
    assert result.exit_code == 0
    (sentence,) = (line for line in result.stdout.splitlines() if "No workload" in line)
    assert sentence.startswith(
        "No workload launches detection/box_iou.forward<scalar=float, mode=0, vector=1>, "
    )
    assert " and 1 more of the manifest: tune them in your program, inside " in sentence
    assert len(json.loads(invoke("tune", "--manifest", path, "--json").stdout)["unreached"]) == 4


def test_kernels_of_another_version_do_not_stop_the_rest(tuner, invoke, tmp_path):
    result = invoke("tune", "--manifest", manifest(tmp_path, IOU, "detection/gone.forward<float>"))
    assert result.exit_code == 1
    assert "detection/gone.forward<float>: manifest must name kernels of this " in result.stderr
    assert "box_iou anchors float32, forward" in tuned_calls(tuner)


def test_a_workload_that_fails_is_not_chosen(tuner, invoke, tmp_path, monkeypatch):
    launch = tuner.launch

    def failing(run, direction):
        if run.workload.name == "anchors":
            raise MemoryError("no room")
        launch(run, direction)

    monkeypatch.setattr(tuner, "launch", failing)
    result = invoke("tune", "--manifest", manifest(tmp_path, IOU))
    assert result.exit_code == 1
    assert "box_iou anchors float32: MemoryError: no room" in result.stderr
    assert tuned_calls(tuner) == [f"box_iou {w} float32, forward" for w in ("proposals", "loss")]


NMS = ("--ops", "nms")


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give one of --manifest, --ops and --all"),
        (["--ops", "box_iou", "--all"], "Give one of --manifest, --ops and --all"),
        (["--ops", "boxiou"], "--ops must be among "),
        ([*NMS, "--dtypes", "int8"], "--dtypes must be among float16, bfloat16, float32"),
        ([*NMS, "--sizes", "rows=3"], "--sizes must be among boxes, classes, most; got rows"),
        ([*NMS, "--sizes", "boxes"], "--sizes must look like regions=512,bins=14; got boxes"),
        ([*NMS, "--sizes", "most=2,classes=3"], "--ops must name operators that have workloads of"),
        ([*NMS, "--device", "cpu"], "--device must look like cuda or cuda:0; got cpu"),
        ([*NMS, "--device", "gpu0"], "--device must look like cuda or cuda:0; got gpu0"),
        ([*NMS, "--device", "cuda:2"], "--device must be among cuda:0, cuda:1; got cuda:2"),
        ([*NMS, "--budget-ms", "-1"], "--budget-ms"),
        ([*NMS, "--arch", "sm_90"], "--arch goes with --list; tuning runs on --device"),
        (["--manifest", "{}", "--sizes", "n=3"], "--sizes goes with --ops or --all"),
        (["--manifest", "{}", "--dtypes", "float32"], "--dtypes goes with --ops or --all"),
        (["--list", "--dtypes", "float32"], "--list goes with --ops and --arch"),
    ],
)
def test_wrong_usage_is_a_sentence(tuner, invoke, tmp_path, arguments, sentence):
    path = manifest(tmp_path, IOU)
    result = invoke("tune", *[argument.format(path) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.stderr.split())
    assert not tuner.calls


def test_without_a_gpu(tuner, invoke, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = invoke("tune", "--ops", "nms")
    assert result.exit_code == 2
    assert "torch sees none" in result.stderr
    assert "torchkiln tune --list" in result.stderr


SPACES = [
    {
        "kernel": "detection/roi_align.cuh:backward",
        "operators": ["roi_align"],
        "statics": [{"name": "scalar", "values": ["float", "half"]}],
        "sizes": [{"name": "k", "bucket": "pow2"}, {"name": "n", "bucket": "none"}],
        "tunables": [{"name": "tile_h", "values": [4, 8]}, {"name": "tile_w", "values": [8, 16]}],
        "points": 4,
        "legal": 3,
        "defaults": [{"tile_h": 8, "tile_w": 16}],
    }
]


def test_list_prints_the_search_spaces(engine, invoke):
    asked = []
    engine.replies["tune.list"] = lambda request: asked.append(request) or {"spaces": SPACES}
    assert json.loads(invoke("tune", "--list", "--json").stdout) == {"spaces": SPACES}
    result = invoke("tune", "--list", "--ops", "roi_align", "--arch", "sm_90")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for part in (
        "1 search spaces",
        "detection/roi_align.backward",
        "tile_h 4 8; tile_w 8 16",
        "8 16 4 3 tile_h=8, tile_w=16",
    ):
        assert part in text
    assert asked == [
        {"operators": None, "target": None},
        {"operators": ["roi_align"], "target": "sm_90"},
    ]


def test_list_refuses_in_a_sentence(engine, invoke):
    engine.replies["tune.list"] = engine.error("ops must be among nms; got nmms", kind=2)
    result = invoke("tune", "--list", "--ops", "nmms")
    assert result.exit_code == 2
    assert "--ops must be among nms; got nmms" in result.stderr
    engine.replies["tune.list"] = engine.error("on fire")
    assert invoke("tune", "--list").stderr == "Error: on fire\n"
