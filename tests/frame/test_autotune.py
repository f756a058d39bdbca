"""Runs autotune_on_fake_gpu.py in a process whose driver is the fake one."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import sys
from pathlib import Path

from support.machine import ROOT, Machine


def test_autotune_from_python_on_a_fake_gpu(tmp_path: Path) -> None:
    done = Machine(tmp_path).run(
        *(sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"),
        "--noconftest",  # which asks torch for GPUs, by the driver that is none
        *("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")),
        str(ROOT / "tests" / "frame" / "autotune_on_fake_gpu.py"),
        PYTHONPATH=str(ROOT / "tests"),
        FAKE_BEST_BLOCK="128",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) == 7
