"""Builds this tree on a GPU machine, runs every test there, measures, and writes a report.

Needs what a build needs (CMake, a C++ compiler, the packages of `pyproject.toml`) and nothing from
a network. `python tools/gpu_report.py --output docs/reports/road-h200` writes `<output>.json` and
`<output>.md`.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent


class Step:
    """One command of the report: its output goes to a log, its verdict into the report."""

    def __init__(self, name: str, logs: Path) -> None:
        self.name, self.log = name, logs / f"{name}.log"
        self.seconds = 0.0
        self.code = -1
        self.output = ""

    def run(self, command: list[str], timeout: float, **environment: str) -> Step:
        """Runs a command to its end, or stops it after `timeout` seconds."""
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
            self.code, self.output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout or b""
            self.output = output.decode(errors="replace") if isinstance(output, bytes) else output
            self.output += f"\nstopped after {timeout:.0f} s\n"
        self.seconds = time.monotonic() - start
        self.log.write_text(self.output)
        click.echo(f"{self.name}: exit {self.code} in {self.seconds:.0f} s")
        return self


def git_commit() -> str:
    """The commit of the tree, with a plus sign when files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain") else "")


def facts(commit: str) -> dict[str, str]:
    """GPU, driver and versions: what a reader needs to place the numbers."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    driver = answer.split("\n")[0]
    return {
        "commit": commit or git_commit() or "unknown",
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
    }


def count_line(output: str) -> str:
    """The closing line of pytest or ctest."""
    verdict = re.compile(r"\d+ (passed|failed)|tests passed")
    lines = [line for line in output.splitlines() if verdict.search(line)]
    return re.sub(r"=+", "", lines[-1]).strip() if lines else "no closing line"


def build(prefix: str, site: Path, logs: Path) -> tuple[Path, Step]:
    """Compiles libraries, control module and C++ tests, and lays the package out in `site`."""
    folder = ROOT / "build" / "gpu"
    configure = [
        "cmake", "-S", ".", "-B", str(folder), "-G", "Ninja",
        "-DTORCHKILN_BUILD_TESTS=ON", "-DSKBUILD=ON", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_PREFIX_PATH={prefix}",
    ]  # fmt: skip
    step = Step("configure", logs).run(configure, 120)
    if step.code == 0:
        step = Step("build", logs).run(["cmake", "--build", str(folder)], 420)
    if step.code == 0:
        lay_out(folder, site)
    return folder, step


def lay_out(folder: Path, site: Path) -> None:
    """Puts the Python sources and the built parts together, as an installed package has."""
    shutil.rmtree(site, ignore_errors=True)
    install = ["cmake", "--install", str(folder), "--prefix", str(site)]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    for package in ("torchkiln", "torchkiln_cli"):
        target = site / package
        target.mkdir(parents=True, exist_ok=True)
        for source in (ROOT / "python" / package).iterdir():
            (target / source.name).symlink_to(source)
    version = re.search(r"torchkiln VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]  # type: ignore[index]
    metadata = site / f"torchkiln-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torchkiln\nVersion: {version}\n")


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def road_rows(road: dict[str, object]) -> list[list[str]]:
    """The measures of `benchmarks/road.py` beside what they must reach."""
    limits = {"box_iou": ("100", "5"), "roi_align": ("150", "5")}
    host_limits = {"roi_align": "0.8", "nms": "0.5"}
    rows = [["measure", "median", "min - max", "must reach"]]

    def row(name: str, spread: dict[str, float], limit: str, unit: str) -> None:
        rows.append([
            name,
            f"{spread['median']:.2f} {unit}",
            f"{spread['min']:.2f} - {spread['max']:.2f}",
            limit,
        ])  # fmt: skip

    for first in road["first_calls"]:  # type: ignore[attr-defined]
        cold, disk = limits[first["operator"]]
        row(f"first call, empty cache: {first['operator']}", first["cold_ms"], f"≤ {cold} ms", "ms")
        name = first["operator"]
        row(f"first call from disk: {name}", first["from_disk_ms"], f"≤ {disk} ms", "ms")
        opened = first["from_disk_counters"]["nvrtc_opened"]
        rows.append([f"libnvrtc opened by us, from disk: {name}", str(opened), "", "0"])
    row("import torchkiln after torch", road["import_ms"], "≤ 60 ms", "ms")  # type: ignore[arg-type]
    for host in road["host"]:  # type: ignore[attr-defined]
        name = host["operator"]
        row(f"host time of a tiny call: {name}, ours", host["ours_us"], "", "µs")
        row(f"host time of a tiny call: {name}, torchvision", host["torchvision_us"], "", "µs")
        rows.append([f"ratio: {name}", f"{host['ratio']:.2f}", "", f"≤ {host_limits[name]}"])
    return rows


def markdown(report: dict[str, object]) -> str:
    """The report for people."""
    context: dict[str, str] = report["facts"]  # type: ignore[assignment]
    steps: list[dict[str, object]] = report["steps"]  # type: ignore[assignment]
    text = f"# Report: {context['gpu']}\n\n"
    text += "Written by `tools/gpu_report.py`; the numbers are in the JSON file beside it.\n\n"
    text += table([["", ""], *([key, value] for key, value in context.items())])
    text += "\n\n## Steps\n\n"
    text += table([
        ["step", "exit", "seconds", "result"],
        *([str(s["name"]), str(s["code"]), f"{s['seconds']:.0f}", str(s["result"])] for s in steps),
    ])  # fmt: skip
    if "road" in report:
        text += "\n\n## Measured\n\n" + table(road_rows(report["road"]))  # type: ignore[arg-type]
    return text + "\n"


@click.command()
@click.option("--output", required=True, help="Report to write, without suffix.")
@click.option("--prefix", default="", help="Where C++ packages lie (CMAKE_PREFIX_PATH).")
@click.option("--logs", default="build/gpu-logs", help="Folder for the logs of the steps.")
@click.option("--commit", default="", help="Commit of the tree, when it is no git checkout.")
@click.option("--only", default="ctest,pytest,road", help="Steps to run after the build.")
@click.option("--pytest-args", default="-q -n 8", help="Arguments of pytest.")
def main(output: str, prefix: str, logs: str, commit: str, only: str, pytest_args: str) -> None:
    """Builds, tests and measures; exits with 1 when a step failed."""
    folder = Path(logs)
    folder.mkdir(parents=True, exist_ok=True)
    site = ROOT / "build" / "gpu-site"
    binaries, built = build(prefix, site, folder)
    steps = [built]
    report: dict[str, object] = {"facts": facts(commit)}
    python_path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    commands = {
        "ctest": ["ctest", "--test-dir", str(binaries), "--output-on-failure", "-j", "8"],
        "pytest": [sys.executable, "-m", "pytest", *pytest_args.split()],
        "road": [sys.executable, "benchmarks/road.py"],
    }
    for name in filter(None, only.split(",")) if built.code == 0 else []:
        steps.append(Step(name, folder).run(commands[name], 500, **environment))
        if name == "road" and steps[-1].code == 0:
            report["road"] = json.loads(steps[-1].output.strip().splitlines()[-1])
    report["steps"] = [
        {"name": s.name, "code": s.code, "seconds": s.seconds, "result": count_line(s.output)}
        for s in steps
    ]
    Path(output + ".json").write_text(json.dumps(report, indent=1) + "\n")
    Path(output + ".md").write_text(markdown(report))
    sys.exit(any(s.code != 0 for s in steps))


if __name__ == "__main__":
    main()
