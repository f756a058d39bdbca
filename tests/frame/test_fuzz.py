"""Random calls of every operator, and the fuzzer itself on operators with planted faults."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner, Result

from support import planted
from torchkiln import testing
from torchkiln.reference.detection.roi_align import takes_all_samples
from torchkiln.testing import _fuzz
from torchkiln.testing._cases import declared
from torchkiln.testing._draw import Draw

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import fuzz  # noqa: E402

OURS = {
    op: parity
    for op, parity in testing.find().items()
    # Other tests of the process may have declared operators of their own.
    if "::" not in op
    and getattr(parity.function, "__module__", "torchkiln.").startswith("torchkiln.")
}
PLANTED = declared(planted)
CALLS = 12


# ---- the operators ----


def test_every_operator_is_fuzzed() -> None:
    assert [op for op, parity in OURS.items() if parity.fuzz is None] == []


@pytest.mark.parametrize("op", [op for op, parity in OURS.items() if parity.fuzz])
def test_random_calls(op: str, device: str) -> None:
    if device not in OURS[op].devices:
        pytest.skip(f"the operator does not run on {device}")
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(CALLS):
            call = _fuzz.draw_call(OURS[op], 0, number, device, configurations=4)
            outcome = _fuzz.judge(OURS[op], call)
            if outcome.verdict == _fuzz.FAILED:
                wrong.append(f"{number}: {call}: {outcome.message}")
    assert wrong == []


# ---- what is drawn ----


@pytest.mark.parametrize("op", ["box_iou", "nms", "roi_align"])
def test_a_call_is_drawn_from_its_number_alone(op: str) -> None:
    first, again = ([_fuzz.draw_call(OURS[op], 3, n) for n in numbers] for numbers in
                    (range(8), reversed(range(8))))  # fmt: skip
    for call, other in zip(first, reversed(again), strict=True):
        assert str(call) == str(other)
        for a, b in zip(call.arguments.values(), other.arguments.values(), strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert len({str(call) for call in first}) == 8
    assert str(_fuzz.draw_call(OURS[op], 4, 0)) != str(first[0])


def test_configurations_bound_what_is_static() -> None:
    static = set()
    shapes = set()
    for number in range(200):
        call = _fuzz.draw_call(OURS["roi_align"], 0, number, configurations=5)
        names = ("output_size", "sampling_ratio", "aligned", "pool_mode")
        if not call.is_spoiled:
            values = [call.arguments[name] for name in names]
            static.add(str([*values, call.arguments["input"].shape[1], call.draw.dtype]))
            shapes.add(call.arguments["boxes"].shape[0])
    assert len(static) == 5
    assert len(shapes) > 5


def test_every_kind_of_value_and_size_is_drawn() -> None:
    calls = [_fuzz.draw_call(OURS["box_iou"], 0, number) for number in range(300)]
    assert {call.draw.kind for call in calls} == set(_fuzz_kinds())
    boxes = [call.arguments["boxes1"] for call in calls if not call.is_spoiled]
    assert {0, 1} <= {len(rows) for rows in boxes}
    assert max(len(rows) for rows in boxes) > 64
    assert any(rows.isnan().any() for rows in boxes)
    assert any(rows.isinf().any() for rows in boxes)
    assert any((rows[:, 2:] < rows[:, :2]).any() for rows in boxes)
    assert any(not rows.is_contiguous() for rows in boxes)
    assert any(rows.storage_offset() for rows in boxes)


def _fuzz_kinds() -> list[str]:
    from torchkiln.testing._draw import KINDS

    return list(KINDS)


@pytest.mark.parametrize(
    ("kind", "ratio", "is_judged"),
    [("scaled", -1, False), ("scaled", 2, True), ("plain", -1, True)],
)
def test_no_value_may_be_promised_for_arguments_as_they_were_spoiled(
    kind: str, ratio: int, is_judged: bool
) -> None:
    """A ratio of -1 is right where 2 was drawn, and the reference would go over every sample."""
    draw = Draw("call", "configuration", ("roi_align",), (torch.float32,))
    draw.kind, draw.is_judged = kind, True
    draw.undefined("scaled", where=takes_all_samples)
    draw.settle({"sampling_ratio": ratio})
    assert draw.is_judged == is_judged


def test_rows_that_must_differ_are_not_repeated() -> None:
    for number in range(200):
        call = _fuzz.draw_call(OURS["causal_conv1d_update"], 0, number)
        rows = call.arguments["conv_state_indices"]
        assert call.is_spoiled or len(rows.unique()) == len(rows)


# ---- the judge ----


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("wrong", "error"),
        ("rude", "right arguments raised ValueError: invalid argument"),
        ("writing", "changed an input"),
    ],
)
def test_a_planted_fault_is_found(op: str, message: str) -> None:
    verdicts = judged(f"planted_{op}")
    found = [outcome.message for outcome in verdicts if outcome.verdict == _fuzz.FAILED]
    assert any(message in text for text in found)
    assert len(found) < len(verdicts) / 2


def test_a_right_operator_passes() -> None:
    assert _fuzz.FAILED not in {outcome.verdict for outcome in judged("planted_right")}


def test_what_rounding_explains_is_undecided() -> None:
    counts = Counter(outcome.verdict for outcome in judged("planted_cancelling"))
    assert counts[_fuzz.UNDECIDED]
    assert not counts[_fuzz.FAILED]


def test_rounding_excuses_no_more_than_it_explains() -> None:
    parity = PLANTED["planted_cancelling"]
    off = testing.Parity(
        op="planted_cancelling",
        tier="A",
        cases=parity.cases,
        dtypes=(torch.float32,),
        function=lambda x: planted.cancelling(x) + 1,
        reference=planted.cancelling,
        fuzz=parity.fuzz,
    )
    plain = [call for call in drawn(off, 80) if call.draw.kind == "plain" and not call.is_spoiled]
    verdicts = {_fuzz.judge(off, call).verdict for call in plain if call.arguments["x"].numel()}
    assert verdicts == {_fuzz.FAILED}


def drawn(parity: testing.Parity, count: int) -> list[_fuzz.Call]:
    return [_fuzz.draw_call(parity, 0, number) for number in range(count)]


def judged(op: str) -> list[_fuzz.Outcome]:
    return [_fuzz.judge(PLANTED[op], call) for call in drawn(PLANTED[op], 80)]


# ---- the tool ----


def run(state: Path, *arguments: str) -> Result:
    everything = ["--import", "support.planted", "--state", str(state), *arguments]
    return CliRunner().invoke(fuzz.main, everything, catch_exceptions=False)


def entry(state: Path, op: str) -> dict[str, Any]:
    return json.loads(state.read_text())["runs"]["cpu"]["ops"][op]


@pytest.fixture
def child_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the processes of the slices find the planted operators."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)


@pytest.mark.usefixtures("child_path")
def test_a_crash_is_reported_with_its_call_and_the_run_goes_on(tmp_path: Path) -> None:
    state, page = tmp_path / "fuzz.json", tmp_path / "fuzz.md"
    op = "planted_crashing"
    crash = first_fatal(op)
    arguments = ["--ops", op, "--calls", f"{crash + 3}", "--jobs", "2", "--slice", "4"]
    done = run(state, *arguments, "--report", str(page))
    assert state.exists(), done.output
    assert done.exit_code == 1
    found = entry(state, op)
    assert found["calls"] == crash + 3
    assert [(wrong["call"], wrong["message"]) for wrong in found["wrong"]] == [
        (crash, "killed by SIGSEGV.")
    ]
    assert found["verdicts"]["crashed"] == 1
    assert f"| `{op}` | {crash + 3} |" in page.read_text()
    again = [sys.executable, "tools/fuzz.py", "--ops", op, "--seed", "0", "--call", str(crash)]
    assert " ".join(["python", *again[1:]]) in done.stderr
    alone = subprocess.run([*again, "--import", "support.planted"], cwd=ROOT, check=False)
    assert alone.returncode == -signal.SIGSEGV


@pytest.mark.usefixtures("child_path")
def test_a_hang_is_reported(tmp_path: Path) -> None:
    state, op = tmp_path / "fuzz.json", "planted_hanging"
    hang = first_fatal(op)
    done = run(state, "--ops", op, "--calls", f"{hang + 1}", "--limit", "1")
    assert state.exists(), done.output
    assert entry(state, op)["wrong"] == [
        {"call": hang, "verdict": "crashed", "message": "no answer for 1 seconds."}
    ]


def first_fatal(op: str) -> int:
    calls = enumerate(drawn(PLANTED[op], 200))
    return next(number for number, call in calls if planted.is_fatal(call.arguments["x"]))


class InProcess:
    """Makes calls in this process, which is quicker; the second slice of all is interrupted."""

    slices: ClassVar[list[fuzz.Slice]]

    def __init__(self, plan: fuzz.Plan, parts: Iterable[fuzz.Slice], limit: float) -> None:
        self.plan, self.parts = plan, parts

    def run(self, jobs: int) -> Iterator[tuple[fuzz.Slice, fuzz.Tally]]:
        """Slices end in groups, the last one of each first."""
        parts, known = iter(self.parts), fuzz.parities(self.plan.modules)
        while group := list(itertools.islice(parts, jobs)):
            for part in reversed(group):
                tally = fuzz.Tally()
                for number, verdict, message, call in fuzz.make_calls(self.plan, part, known):
                    tally.add(number, verdict, f"{call}: {message}")
                self.slices.append(part)
                if len(self.slices) == 2:
                    raise KeyboardInterrupt
                yield part, tally


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[fuzz.Slice]:
    """Slices run in this process; returns them."""
    monkeypatch.setattr(InProcess, "slices", [], raising=False)
    monkeypatch.setattr(fuzz, "Pool", InProcess)
    return InProcess.slices


def test_an_interrupted_run_goes_on_with_the_same_calls(
    tmp_path: Path, in_process: list[fuzz.Slice]
) -> None:
    parts, whole = tmp_path / "parts.json", tmp_path / "whole.json"
    arguments = ["--ops", "planted_wrong,planted_right", "--calls", "90"]
    assert run(parts, *arguments, "--slice", "20").exit_code == 1
    assert sum(entry(parts, op)["calls"] for op in ("planted_wrong", "planted_right")) == 20
    assert run(parts, *arguments, "--slice", "30").exit_code == 1
    assert run(whole, *arguments, "--slice", "45").exit_code == 1
    assert json.loads(parts.read_text()) == json.loads(whole.read_text())
    # The call that was interrupted was made again, and none twice.
    numbers = [n for part in in_process[2:-2] for n in range(part.first, part.end)]
    assert len(numbers) == 70
    # What it says is wrong is wrong by its number alone.
    wrong = entry(whole, "planted_wrong")["wrong"]
    assert wrong
    for call in wrong:
        again = run(whole, "--ops", "planted_wrong", "--call", str(call["call"]))
        assert again.exit_code == 1
        assert "failed: forward: error" in again.stdout


def test_slices_may_end_in_any_order(tmp_path: Path, in_process: list[fuzz.Slice]) -> None:
    in_process += [fuzz.Slice("", 0, 0, None)] * 2  # past the interruption
    parts, whole = tmp_path / "parts.json", tmp_path / "whole.json"
    arguments = ["--ops", "planted_wrong,planted_right", "--calls", "90"]
    run(parts, *arguments, "--slice", "10", "--jobs", "5")
    assert [part.first for part in in_process[2:]] != sorted(part.first for part in in_process[2:])
    run(whole, *arguments)
    assert json.loads(parts.read_text()) == json.loads(whole.read_text())


def test_a_state_has_one_seed_and_can_be_begun_anew(
    tmp_path: Path, in_process: list[fuzz.Slice]
) -> None:
    state = tmp_path / "fuzz.json"
    arguments = ["--ops", "planted_right", "--calls", "5"]
    assert run(state, *arguments).exit_code == 0
    refused = run(state, *arguments, "--seed", "1")
    assert refused.exit_code == 1
    assert "--seed must be that of the state (0); got 1" in refused.stderr
    in_process.append(in_process[0])  # past the interruption
    run(state, *arguments)
    assert len(in_process) == 2
    run(state, *arguments, "--anew")
    assert len(in_process) == 3


def test_a_state_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "fuzz.json"
    fuzz.write_state(state, {"runs": {}})

    def die(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        fuzz.write_state(state, {"runs": {"cpu": {}}})
    assert fuzz.read_state(state) == {"runs": {}}


def test_an_unknown_operator_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "fuzz.json", "--ops", "nonsense")
    assert done.exit_code == 1
    assert "--ops must be among" in done.stderr
    assert "got nonsense" in done.stderr
