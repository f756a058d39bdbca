"""Compiles kernels for many architectures on a machine without a GPU, and writes what each costs.

`make compile-all` compiles every generic variant with every point of the search space for every
architecture that NVRTC knows. That takes hours; what is done stays in a cache folder of its own,
and the same command goes on from there. The tests run the same program on smaller selections.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import os
import re
import statistics
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "kernel_templates"
SLOW_MS = 250  # a cold compile above it needs its reason in the kernel's file

Specialization = dict[str, Any]
Work = list[tuple[Specialization, str]]


def expand(points: str, arch: str) -> list[Specialization]:
    """All generic variants with these points of the space that a GPU of this architecture runs."""
    from torchkiln_cli import _native

    reply = _native.control("expand", points=points, target=arch)
    found: list[Specialization] = reply["specializations"]
    return [s for s in found if int(arch.removeprefix("sm_")) >= s.get("min_architecture", 0)]


def by_entry(specializations: Iterable[Specialization]) -> Iterator[list[Specialization]]:
    """One list for each kernel entry."""

    def name(s: Specialization) -> tuple[str, str]:
        return s["path"], s["entry"]

    for _, group in itertools.groupby(sorted(specializations, key=name), key=name):
        yield list(group)


def dtype_of(specialization: Specialization) -> str:
    """The type that the kernel computes with; empty when it knows none."""
    values = {a["name"]: a["value"] for a in specialization["arguments"]}
    return str(values.get("scalar", ""))


@functools.cache
def tunable_names() -> dict[tuple[str, str], frozenset[str]]:
    """Names of the tunables of each kernel entry."""
    from torchkiln_cli import _native

    return {
        (k["path"], k["entry"]): frozenset(p["name"] for p in k["parameters"] if p["tunable"])
        for k in _native.control("kernels")["kernels"]
    }


def tunables_of(specialization: Specialization) -> tuple[Any, ...]:
    """The point of the search space."""
    names = tunable_names()[specialization["path"], specialization["entry"]]
    return tuple(a["value"] for a in specialization["arguments"] if a["name"] in names)


def rotate(architectures: list[str], share: int) -> Work:
    """Each entry's default on every architecture: one dtype in rotation, and the other statics.

    With a share each entry goes to one architecture in so many, the next one begins with another.
    """
    work: Work = []
    for number, arch in enumerate(architectures):
        for entry, group in enumerate(by_entry(expand("defaults", arch))):
            if (number + entry) % share != 0:
                continue
            dtypes = sorted({dtype_of(s) for s in group})
            turn, place = divmod(number // share, len(dtypes))
            variants = [s for s in group if dtype_of(s) == dtypes[place]]
            work.append((variants[turn % len(variants)], arch))
    return work


def spread(architectures: list[str]) -> Work:
    """Every variant with its defaults; every dtype with every corner, the other statics in turn."""
    work: Work = []
    for arch in architectures:
        found = {s["text"]: s for s in expand("defaults", arch)}
        for group in by_entry(expand("corners", arch)):
            corners = collections.defaultdict(list)
            for s in group:
                corners[dtype_of(s), tunables_of(s)].append(s)
            for number, variants in enumerate(corners.values()):
                chosen = variants[number % len(variants)]
                found[chosen["text"]] = chosen
        work += [(s, arch) for s in found.values()]
    return work


def product(points: str, architectures: list[str]) -> Work:
    """Every variant with these points and with the defaults, on every architecture."""
    work: Work = []
    for arch in architectures:
        found = {s["text"]: s for s in [*expand("defaults", arch), *expand(points, arch)]}
        work += [(s, arch) for s in found.values()]
    return work


def reason(path: str, what: str) -> str:
    """What a kernel's file says in a line such as '// spills: double needs 300 registers'."""
    text = (TEMPLATES / path).read_text(encoding="utf-8")
    found = re.search(rf"^// {what}: (\S.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def rows_of(work: Work, outcome: Any) -> list[dict[str, Any]]:
    """What the report tells of each kernel, in the order of the request."""
    sources = {s["text"]: s for s, _ in work}
    defaults = {s["text"] for arch in {a for _, a in work} for s in expand("defaults", arch)}
    rows = []
    for row in map(dataclasses.asdict, outcome.rows):
        source = sources[row["specialization"]]
        row.update(path=source["path"], entry=source["entry"])
        row["default"] = row["specialization"] in defaults
        row["milliseconds"] = round(row.pop("compile_milliseconds"), 1)
        rows.append(row)
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers about all rows."""
    compiled = [row for row in rows if row["status"] != "failed"]
    times = [row["milliseconds"] for row in compiled] or [0.0]
    slow = [row for row in compiled if row["milliseconds"] > SLOW_MS]
    return {
        "kernels": len(rows),
        "failed": len(rows) - len(compiled),
        "median_ms": statistics.median(times),
        "worst_ms": max(times),
        "slow_without_reason": sum(not reason(row["path"], "compile time") for row in slow),
        "spilling": sum(row["spill_bytes"] > 0 for row in compiled),
        "bytes": sum(row["bytes"] for row in compiled),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people: a summary, a line for each entry and one for each kernel."""
    total, rows = report["summary"], report["kernels"]
    lines = [
        "# Every kernel",
        "",
        f"Written by `tools/compile_all.py` with NVRTC {report['nvrtc']} for "
        f"{', '.join(report['architectures'])}.",
        "",
        f"{total['kernels']} kernels, {total['failed']} failed. Cold compile: median "
        f"{total['median_ms']:.0f} ms, worst {total['worst_ms']:.0f} ms; "
        f"{total['slow_without_reason']} above {SLOW_MS} ms without a reason in their file. "
        f"{total['spilling']} spill registers. {total['bytes']} bytes of machine code.",
        "",
        "| entry | kernels | median ms | worst ms | most registers | most spilled bytes | bytes |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for group in by_entry(rows):
        times = [row["milliseconds"] for row in group]
        most = {key: max(r[key] for r in group) for key in ("registers", "spill_bytes", "bytes")}
        lines.append(
            f"| {group[0]['path']} {group[0]['entry']} | {len(group)} | "
            f"{statistics.median(times):.0f} | {max(times):.0f} | {most['registers']} | "
            f"{most['spill_bytes']} | {most['bytes']} |"
        )
    lines += [
        "",
        "| specialisation | arch | ms | registers | spilled bytes | bytes |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda r: -r["milliseconds"]):
        verdict = "failed" if row["status"] == "failed" else f"{row['milliseconds']:.0f}"
        lines.append(
            f"| {row['specialization']} | {row['arch']} | {verdict} | {row['registers']} | "
            f"{row['spill_bytes']} | {row['bytes']} |"
        )
    return "\n".join(lines) + "\n"


def write_report(output: Path, architectures: list[str], rows: list[dict[str, Any]]) -> None:
    """Writes `<output>.json` and `<output>.md`."""
    from torchkiln_cli import _native

    report = {
        "nvrtc": _native.control("nvrtc", load=True)["version"],
        "architectures": architectures,
        "summary": summarize(rows),
        "kernels": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(report))
    click.echo(f"Written: {output.with_suffix('.json')} and {output.with_suffix('.md')}")


@click.command(help=__doc__)
@click.option("--arch", help="Architectures, such as sm_80,sm_90; all by default.")
@click.option(
    "--points",
    type=click.Choice(["rotation", "spread", "defaults", "corners", "all"]),
    default="all",
    show_default=True,
    help="rotation: each entry's default once for each architecture. "
    "spread: every variant with its defaults, every dtype with every corner of the space.",
)
@click.option("--share", type=click.IntRange(1), default=1, help="Only one kernel in so many.")
@click.option("--jobs", type=int, help="Compiles at a time; by default one for each core.")
@click.option("--count", is_flag=True, help="Only tell how many kernels there are.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=ROOT / "build/compile-all/cache",
    help="Folder of the compiled kernels.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), default=ROOT / "build/compile-all/report",
    help="Where the report goes: <output>.json and <output>.md.",
)  # fmt: skip
def main(
    arch: str | None,
    points: str,
    share: int,
    jobs: int | None,
    count: bool,
    cache: Path,
    output: Path,
) -> None:
    """Runs the selection; see the module's docstring."""
    # Before the engine reads them: a folder of its own, in which nothing is ever evicted.
    os.environ.update(TORCHKILN_CACHE_DIR=str(cache.absolute()), TORCHKILN_CACHE_MAX="0")
    from torchkiln_cli import _native, warm

    _native.load_operators()
    architectures = warm.parse_architectures(arch) if arch else warm.known_architectures()
    if not architectures:
        raise click.ClickException("no NVRTC was found; install one with torchkiln[compiler]")
    if points == "rotation":
        work = rotate(architectures, share)
    else:
        work = spread(architectures) if points == "spread" else product(points, architectures)
        # By name: the same ones at every run, and of every operator.
        work = [row for row in work if zlib.crc32(row[0]["text"].encode()) % share == 0]
    if count:
        click.echo(f"{len(work)} kernels")
        return
    outcome = warm.compile_work(work, jobs, what="compile")
    rows = rows_of(work, outcome)
    warm.emit_failures(outcome)
    write_report(output, architectures, rows)
    click.echo(outcome.summary())
    sys.exit(0 if outcome.complete else 1)


if __name__ == "__main__":
    main()
