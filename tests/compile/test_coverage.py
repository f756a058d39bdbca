"""Every kernel compiles with the real NVRTC: no GPU is needed, and none is used."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import compile_all  # noqa: E402

SLOWEST = 10


def coverage(selection, folder, record_property):
    """Rows of the report of a selection, compiled in a process and a cache folder of their own."""
    report = folder / "report"
    program = [sys.executable, str(ROOT / "tools/compile_all.py"), *selection]
    done = subprocess.run(
        [*program, "--cache", str(folder / "cache"), "--output", str(report)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.with_suffix(".json").exists(), done.stderr
    rows = json.loads(report.with_suffix(".json").read_text())["kernels"]
    record_property(
        "summary", f"{len(rows)} kernels compiled; the slowest, with two or more at once:"
    )
    for row in sorted(rows, key=lambda r: -r["milliseconds"])[:SLOWEST]:
        name = f"{row['specialization']}@{row['arch']}"
        record_property("summary", f"{row['milliseconds']:8.0f} ms {name}")
    assert [row["error"] for row in rows if row["status"] == "failed"] == []
    assert done.returncode == 0, done.stderr
    return rows


def test_each_default_compiles(tmp_path, record_property):
    """Each entry on every third architecture, in turn; `make compile-all` takes all of them."""
    rows = coverage(["--points", "rotation", "--share", "3"], tmp_path, record_property)
    assert {row["status"] for row in rows} == {"compiled"}
    # Each entry was tried with each type that it has.
    specializations = [row["specialization"] for row in rows]
    assert any("<half" in text for text in specializations)
    assert any("<double" in text for text in specializations)
    assert len({row["arch"] for row in rows}) > 8


def test_the_corners_of_the_space_compile(tmp_path, record_property):
    # One in sixteen; `make compile-all` takes all of them.
    selection = ["--points", "spread", "--arch", "sm_90", "--share", "16"]
    rows = coverage(selection, tmp_path, record_property)
    assert {row["status"] for row in rows} == {"compiled"}
    spills = [
        f"{row['specialization']}: {row['spill_bytes']} bytes"
        for row in rows
        if row["default"] and row["spill_bytes"] and not compile_all.reason(row["path"], "spills")
    ]
    assert spills == [], "add a line such as '// spills: reason' to the kernel's file"


def test_reason_is_read_from_the_file_of_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_all, "TEMPLATES", tmp_path)
    (tmp_path / "a.cuh").write_text("// A kernel.\n// spills: double needs more than there are\n")
    assert compile_all.reason("a.cuh", "spills") == "double needs more than there are"
    assert compile_all.reason("a.cuh", "compile time") == ""


def test_second_run_compiles_nothing_and_tells_the_same(tmp_path):
    def run():
        program = [sys.executable, str(ROOT / "tools/compile_all.py"), "--points", "rotation"]
        folders = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "report")]
        done = subprocess.run(
            [*program, "--arch", "sm_90", *folders], capture_output=True, text=True, check=True
        )
        return done.stdout, json.loads((tmp_path / "report.json").read_text())

    _, first = run()
    output, second = run()
    assert "0 compiled" in output
    for report in (first, second):
        for row in report["kernels"]:
            del row["status"]
    assert first == second
    assert first["summary"]["median_ms"] > 0
    text = (tmp_path / "report.md").read_text()
    assert all(row["specialization"] in text for row in first["kernels"])
