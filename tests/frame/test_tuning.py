"""Modes and reports: on an engine that only remembers what it was told, then on the real one."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

import torchkiln
from torchkiln import tuning

REAL = tuning._control
START = {"mode": "lookup", "budget_ms": 300, "total_ms": 60000}
ROW = {
    "kernel": "detection/nms.merge<float, classes=true, lanes=8, block_size=256>",
    "statics": {"scalar": "float", "classes": "true"},
    "sizes": {"n": 4741},
    "default": {"lanes": 32, "block_size": 256},
    "best": {"lanes": 8, "block_size": 256},
    "default_us": 12.0,
    "best_us": 9.0,
    "gain": 0.25,
    "noise": 0.004,
    "points": 10,
    "measured": 8,
    "reused": 1,
    "failed": [{"point": {"lanes": 1}, "reason": "spills"}],
    "gpu_ms": 92.5,
    "wall_ms": 210.0,
    "stopped": "",
    "verified": True,
}


class FakeEngine:
    """Keeps the three fields of tune.set, and how often they were set."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = dict(START)
        self.rows: list[dict[str, Any]] = []
        self.fails = False

    def control(self, command: str, request: dict[str, Any]) -> dict[str, Any]:
        if command == "tune.report":
            return {"next": len(self.rows), "tuned": self.rows[request["since"] :]}
        assert command == "tune.set"
        if self.fails:
            raise RuntimeError("not now")
        before, self.state = self.state, {**self.state, **request}
        return before


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(tuning, "_control", fake)
    return fake


def test_autotune_tunes_inside_and_gives_back_what_was_before(engine: FakeEngine) -> None:
    with torchkiln.autotune(budget_ms=50, total_ms=1000):
        assert engine.state == {"mode": "tune", "budget_ms": 50, "total_ms": 1000}
    assert engine.state == START
    with torchkiln.autotune():
        assert engine.state == {**START, "mode": "tune"}
    assert engine.state == START


def test_an_exception_ends_the_block(engine: FakeEngine) -> None:
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), torchkiln.autotune(7):
            raise error
        assert engine.state == START


def test_blocks_nest(engine: FakeEngine) -> None:
    with torchkiln.autotune(50, total_ms=1000):
        with tuning.mode("off"):
            assert engine.state == {"mode": "off", "budget_ms": 50, "total_ms": 1000}
            with torchkiln.autotune(20):
                assert engine.state == {"mode": "tune", "budget_ms": 20, "total_ms": 1000}
            assert engine.state["mode"] == "off"
        assert engine.state == {"mode": "tune", "budget_ms": 50, "total_ms": 1000}
    assert engine.state == START


def test_blocks_of_two_threads_end_in_any_order(engine: FakeEngine) -> None:
    opened, end = threading.Event(), threading.Event()

    def other() -> None:
        with torchkiln.autotune(20):
            opened.set()
            end.wait(10)

    thread = threading.Thread(target=other)
    with torchkiln.autotune(50):
        thread.start()
        opened.wait(10)
        assert engine.state["budget_ms"] == 20
    assert engine.state == {**START, "mode": "tune", "budget_ms": 20}  # its block is still open
    end.set()
    thread.join()
    assert engine.state == START


def test_equal_blocks_are_two(engine: FakeEngine) -> None:
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(torchkiln.autotune(50))
    second.enter_context(torchkiln.autotune(50))
    first.close()
    assert engine.state["mode"] == "tune"
    second.close()
    assert engine.state == START


def test_a_function_may_be_decorated(engine: FakeEngine) -> None:
    @torchkiln.autotune(budget_ms=9)
    def count_down(n: int) -> list[float]:
        return [engine.state["budget_ms"], *(count_down(n - 1) if n else [])]

    assert count_down(2) == [9, 9, 9]
    assert engine.state == START


def test_a_block_that_cannot_begin_leaves_nothing(engine: FakeEngine) -> None:
    engine.fails = True
    with pytest.raises(RuntimeError, match="not now"), torchkiln.autotune():
        pass
    engine.fails = False
    engine.state = {**START, "budget_ms": 77}
    with torchkiln.autotune(5):
        pass
    assert engine.state["budget_ms"] == 77


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_times_must_be_numbers(engine: FakeEngine, value: float) -> None:
    with (
        pytest.raises(ValueError, match=rf"budget_ms must be a number of at least 0; got {value}"),
        torchkiln.autotune(value),
    ):
        pass
    with pytest.raises(ValueError, match="total_ms must"), torchkiln.autotune(total_ms=value):
        pass
    assert engine.state == START


def test_modes_are_three(engine: FakeEngine) -> None:
    sentence = "name must be 'off', 'lookup' or 'tune'; got 'fast'"
    with pytest.raises(ValueError, match=sentence), tuning.mode("fast"):  # type: ignore[arg-type]
        pass


def test_report(engine: FakeEngine) -> None:
    # Fields that later versions add are not in the way.
    engine.rows = [{**ROW, "new": 1}, {**ROW, "kernel": "another", "failed": []}]
    first, second = tuning.report()
    assert first.gain == 0.25
    assert first.best == {"lanes": 8, "block_size": 256}
    assert first.failed == ({"point": {"lanes": 1}, "reason": "spills"},)
    assert second.failed == ()
    assert tuning.report(1) == [second]


# --- the real engine ------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    return REAL.control("tune.set", {})


def test_the_real_engine_changes_its_mode_and_back() -> None:
    before = state()
    with torchkiln.autotune(20, total_ms=400):
        assert state() == {"mode": "tune", "budget_ms": 20, "total_ms": 400}
        with tuning.mode("off"):
            assert state() == {"mode": "off", "budget_ms": 20, "total_ms": 400}
    assert state() == before


def test_the_real_engine_has_a_default_mode_and_times() -> None:
    program = "import json; from torchkiln import _control; "
    program += "print(json.dumps(_control.control('tune.set', {})))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCHKILN_")}
    output = subprocess.run(
        [sys.executable, "-c", program], env=clean, check=True, capture_output=True, text=True
    ).stdout
    assert json.loads(output) == START


def test_the_real_engine_reports() -> None:
    assert tuning.report(10**6) == []


def test_docs_and_settings_agree_about_the_defaults() -> None:
    for function in (torchkiln.autotune, tuning.mode):
        assert "60,000" in (function.__doc__ or "")
    budget = inspect.signature(torchkiln.autotune).parameters["budget_ms"].default
    assert budget == START["budget_ms"]
