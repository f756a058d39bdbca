"""Runs every test of the cache under attack in full, and writes docs/reports/cache.md.

Kills at every system call, exits at every millisecond, 10,000 damaged files under the sanitizers:
about half an hour on two cores. `python tools/cache_report.py` needs what `make setup` makes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support import attack  # noqa: E402

ATTACK = "tests/deploy/attack"


@dataclass
class Tests:
    """Outcome of the Python tests: names by verdict, and the lines they want to have read."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    summaries: dict[str, str] = field(default_factory=dict)
    forks: int = 0


def run_tests() -> Tests:
    """Runs the Python tests, one at a time, because some of them measure."""
    tests = Tests()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", ATTACK, "--exhaustive"]
        command += ["-o", "junit_family=xunit1"]  # the newer family has no properties
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False)
        cases = ET.parse(report).getroot().iter("testcase")
        for case in cases:
            name = case.get("name", "")
            if case.find("failure") is not None or case.find("error") is not None:
                tests.failed.append(name)
            elif case.find("skipped") is not None:
                tests.skipped.append(name)
            else:
                tests.passed.append(name)
            for item in case.iter("property"):
                if item.get("name") == "summary":
                    tests.summaries[name] = item.get("value", "")
    return tests


def run_forks() -> int:
    """Runs the test that forks in the ordinary build; returns how often it did, 0 if it failed."""
    program = attack.build_folder() / "torchkiln_jit_tests"
    command = [str(program), "--gtest_filter=AttackTest.Forks*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"\[ forks *\] (\d+)", done.stdout)
    return int(found[1]) if found and done.returncode == 0 else 0


def run_sanitizers(rounds: int) -> dict[str, Any]:
    """Runs `make sanitize`; returns its verdict, what it counted and how many tests passed."""
    command = ["make", "sanitize", f"ROUNDS={rounds}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    reports = re.findall(r"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:", output)
    damages = re.findall(r"\[ damages *\] (\d+ \w+)", output)
    return {
        "ok": done.returncode == 0,
        "reports": len(reports),
        "damages": ", ".join(damages),
        "tail": output.splitlines()[-30:],
    }


def table(tests: Tests, sanitizers: dict[str, Any], lookup: dict[str, Any]) -> list[str]:
    """Returns the rows of the report: what is measured, what it must reach, what it is."""

    def said(*names: str) -> str:
        return "; ".join(tests.summaries.get(name, f"{name} did not run") for name in names)

    exits = [f"test_exit_at_any_moment_of_the_first_compile[{name}]" for name in ("main", "other")]
    times = lookup["microseconds"]
    opened = ", ".join(f"{name}: {lookup[name]}" for name in ("libnvrtc_opened", "libcuda_opened"))
    verdict = "all passed" if sanitizers["ok"] else "FAILED"
    rows = {
        "64 processes, one key, empty cache": (
            "1 compile, wall < compile + 100 ms",
            said("test_sixty_four_processes_compile_one_key_once"),
        ),
        "16 processes x 200 keys in random order": (
            "200 compiles",
            said("test_sixteen_processes_compile_two_hundred_keys_once_each"),
        ),
        "kill -9 at each system call": (
            "a valid object or a miss, the old file or the new one; litter swept",
            said(
                "test_death_while_publishing",
                "test_death_while_evicting",
                "test_death_of_the_whole_core",
                "test_death_while_creating_a_bundle",
                "test_death_while_merging_bundles[new]",
                "test_death_while_merging_bundles[a]",
                "test_death_while_recording[0]",
                "test_death_while_recording[1]",
            ),
        ),
        "random damage of objects, bundles and manifests": (
            "10,000 of each under ASan + UBSan: 0 crashes, 0 wrong kernels, each healed",
            f"{sanitizers['damages']} (under ASan + UBSan, then under TSan): {verdict}",
        ),
        "forks while two threads compile": (
            "1,000: 0 dead-locks",
            f"{tests.forks}: 0 dead-locks" if tests.forks else "FAILED",
        ),
        "ASan + UBSan, TSan over the core with the fake compiler": (
            "0 reports",
            f"{sanitizers['reports']} reports; {verdict}",
        ),
        "exit() at each of 200 ms of the first compile of NVRTC": ("no crash", said(*exits)),
        f"warm look-up and checks, {lookup['payload_bytes']} bytes of code": (
            "<= 40 µs; no libnvrtc, no CUDA context",
            f"median {times['median']:.1f} µs, p90 {times['p90']:.1f} µs; {opened}",
        ),
    }
    lines = ["| measure | must reach | measured |", "|---|---|---|"]
    return lines + [f"| {name} | {goal} | {value} |" for name, (goal, value) in rows.items()]


HEAD = """# The cache under attack and under load

Written by `tools/cache_report.py` on a machine of {cores} cores that others used at the same time,
without a GPU. The compiler is a fake that sleeps and counts, except where NVRTC is named.

"""
REST = """
{passed} Python tests passed, {failed} failed, {skipped} were skipped. Among them:

- {faults} cases of one failing system call (EACCES, EROFS, ENOSPC, EDQUOT, EMFILE, EIO, ESTALE,
  EXDEV, EPERM, EMLINK in create, write, fsync, link, mkdir, open, read, rename, unlink; empty and
  filled cache): every kernel right, at most one sentence for reading and one for writing, nothing
  damaged afterwards.
- A network folder on which what others make appears 80 ms late and one call in 23 to 25 fails with
  ESTALE: {network}. Every kernel right; the lag costs compiles.
- Relative root, symbolic link, group-writable ancestor, foreign owner, no home, a file in the way:
  memory only, with one sentence.
- Few descriptors, small files, little address space, no more threads, small stacks, Ctrl-C,
  SIGTERM, SIGKILL, SIGSTOP, an interpreter that ends, several NVRTC in one process.
"""


def page(tests: Tests, sanitizers: dict[str, Any], lookup: dict[str, Any]) -> str:
    """Returns the report."""
    rest = REST.format(
        passed=len(tests.passed),
        failed=len(tests.failed),
        skipped=len(tests.skipped),
        faults=sum(name.startswith("test_failing_calls") for name in tests.passed),
        network="; ".join(text for name, text in tests.summaries.items() if "network" in name),
    )
    lines = table(tests, sanitizers, lookup)
    text = HEAD.format(cores=os.cpu_count()) + "\n".join(lines) + "\n" + rest
    if tests.failed:
        text += "\nFailed: " + ", ".join(tests.failed) + "\n"
    if tests.skipped:
        text += "\nSkipped: " + ", ".join(tests.skipped) + "\n"
    if not sanitizers["ok"]:
        text += "\n```\n" + "\n".join(sanitizers["tail"]) + "\n```\n"
    return text


@click.command(help=__doc__)
@click.option("--rounds", default=10_000, show_default=True, help="damaged files")
@click.option("--output", default="docs/reports/cache.md", show_default=True)
def main(rounds: int, output: str) -> None:
    """Runs everything and writes the page."""
    benchmark = [sys.executable, "benchmarks/cache_lookup.py"]
    lookup = json.loads(subprocess.run(benchmark, cwd=ROOT, capture_output=True, check=True).stdout)
    tests = run_tests()
    tests.forks = run_forks()
    sanitizers = run_sanitizers(rounds)
    (ROOT / output).write_text(page(tests, sanitizers, lookup), encoding="utf-8")
    click.echo(f"written: {output}")
    sys.exit(bool(tests.failed) or not sanitizers["ok"])


if __name__ == "__main__":
    main()
