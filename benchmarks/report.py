"""Makes the page, and a picture where matplotlib is installed, from what `benchmarks.run` wrote.

    python -m benchmarks.report docs/reports/five.json

Writes docs/benchmarks/five.md and docs/benchmarks/five.svg.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.goals import goals, mean_of
from benchmarks.rows import OURS, Row, number, size_text

METHOD = """\
Every row compares sides in one process on the same inputs. They take turns in random order; the
number is the median over the rounds, with the 10th to 90th percentile. **Time** is device time with
inputs that are not in L2 (a CUDA graph over rotating copies); *warm* marks rows whose inputs are
too small to be made cold that way. Sides marked *events* were timed by events around each call
after L2 was filled, because they are long or wait for the device; for those, waits for the host are
in it. **Eager** is wall time per call, many in a row; **latency** is that of a call with a
synchronisation after it. **Speed-up** is against the fastest peer; below 1 the row is a **loss**. A
peer whose error says that it computes something else is marked *wrong* and is no peer in the
ratios. **Floor** is the share of the time that moving the bytes once would take at this GPU's
measured copy bandwidth. Targets that compare two rows of ours say *of two runs* where the rows were
not measured in the same one.
"""

BASELINES = """\
Times of a peer *elsewhere* come from another H200 with random inputs (mmcv a8073c74b, deformops
3.0.1, mamba-ssm e9594ce, SparseDrive ec0225d, built for sm_90, torch 2.11); rows in which that peer
ran beside ours have no need of them. Where that table has the time of another side of the row, the
peer's is scaled by that side's time here over its time there; a time marked *unscaled* is as it
stood.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_text(row: Row, side: str) -> str:
    """Median and spread, or why there is none."""
    numbers = row.sides.get(side)
    if numbers is None:
        return ""
    found = numbers.get("cold_us") or numbers.get("warm_us")
    if not found:
        reason = numbers.get("failure") or numbers.get("skipped") or "no time"
        return f"*{reason[:70].replace('|', '/')}*"
    notes = []
    if row.data["device"] == "cuda":
        notes += ["warm"] if "cold_us" not in numbers else []
        notes += ["events"] if numbers.get("how") == "events" else []
    notes += ["**wrong**"] if row.is_wrong(side) else []
    spread = f"{number(found['p10'])}-{number(found['p90'])}"
    return f"{number(found['median'])} ({spread})" + "".join(f", *{note}*" for note in notes)


def elsewhere_text(found: tuple[float, bool] | None) -> str:
    """A time from another machine."""
    if found is None:
        return ""
    return number(found[0]) + ("" if found[1] else ", *unscaled*")


def error_text(error: dict[str, Any] | None) -> str:
    """Largest error over the largest value, or how many indices differ."""
    if not error:
        return ""
    if "note" in error:
        return str(error["note"])
    if "differing" in error:
        order = "" if error["same_order"] else ", other order"
        return f"{error['differing']} of {error['kept']}{order}"
    scale = max(error["scale"], 1e-30)
    return f"{error['max'] / scale:.1e} / {error['mean'] / scale:.1e}"


def targets_table(rows: Sequence[Row], compiled: dict[str, Any] | None = None) -> str:
    """Every target of the issue, and whether it is met."""
    lines = (goal.line() for goal in goals(rows, compiled))
    return table(["row", "must reach", "reached", ""], lines)


def times_table(rows: Sequence[Row]) -> str:
    """Times of every side, and the ratios."""
    names = list(dict.fromkeys(name for row in rows for name in row.sides))
    absent = list(dict.fromkeys(name for row in rows for name in row.elsewhere()))
    lines = []
    for row in rows:
        if "failure" in row.data:
            lines.append([row.title, f"*{row.data['failure'].replace('|', '/')}*"])
            continue
        ratio, share, peer = row.speedup(), row.floor_share(), row.best_peer()
        verdict = "" if ratio is None or ratio >= 1 else " **loss**"
        line = [row.title, *(time_text(row, name) for name in names)]
        line += [f"{number(ratio, 'x')}{verdict}", peer[0] if peer else ""]
        line += ["" if share is None else f"{share:.0%}"]
        line += [elsewhere_text(row.elsewhere().get(name)) for name in absent]
        lines.append(line)
    head = ["row", *(f"{name}, µs" for name in names), "speed-up", "against", "floor"]
    head += [f"{name} elsewhere, µs" for name in absent]
    width = len(head)
    return table(head, ([*line, *[""] * (width - len(line))] for line in lines))


def launches_text(side: dict[str, Any]) -> str:
    """Kernels and copies of a call, and how often the host waits."""
    counts = side.get("launches")
    if not counts:
        return ""
    waits = max(counts["host_waits"], int(counts["waits_for_device"]))
    return f"{counts['kernels']}+{counts['copies']}, {waits}"


def median_text(name: str) -> Callable[[dict[str, Any]], str]:
    """Writes the median of a metric."""
    return lambda side: number(side[name]["median"]) if name in side else ""


COSTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "eager, µs": median_text("eager_us"),
    "latency, µs": median_text("latency_us"),
    "kernels+copies, waits": launches_text,
    "extra memory": lambda side: size_text(side.get("extra_bytes")),
    "error: max / mean, or indices": lambda side: error_text(side.get("error")),
    "first call, ms": lambda side: number(side.get("first_call_ms")),
}


def costs_table(rows: Sequence[Row]) -> str:
    """Host time, launches, memory, error: ours and the fastest peer's."""
    lines = []
    for row in rows:
        if "failure" in row.data:
            continue
        peer = row.best_peer()
        names = [OURS, peer[0]] if peer else [OURS]
        line = [row.title, peer[0] if peer else ""]
        for text in COSTS.values():
            texts = [text(row.sides.get(name, {})) for name in names]
            line.append(" ‖ ".join(part or "-" for part in texts) if any(texts) else "")
        lines.append(line)
    return table(["row", "ours ‖ that of", *COSTS], lines)


def geometric_means(rows: Sequence[Row]) -> str:
    """One line per operator and device: mean of the speed-ups, wins and losses."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for name in (row.data["operator"], "all"):
            groups.setdefault((name, row.data["device"]), [])
            if (ratio := row.speedup()) is not None:
                groups[name, row.data["device"]].append(ratio)
    groups = dict(sorted(groups.items(), key=lambda group: group[0][0] == "all"))
    lines = []
    for (operator, device), ratios in groups.items():
        losses = sum(ratio < 1 for ratio in ratios)
        counts = [str(len(ratios)), str(len(ratios) - losses), str(losses)]
        lines.append(
            [operator, "GPU" if device == "cuda" else "CPU", number(mean_of(ratios), "x"), *counts]
        )
    head = ["operator", "on", "geometric mean of the speed-ups", "rows", "wins", "losses"]
    return table(head, lines)


def cold_compile_text(found: dict[str, Any] | None) -> str:
    """The compile times, where they were taken."""
    if not found:
        return ""
    text = "\n## Cold compile\n\nNVRTC, an empty cache, one kernel at a time in each process"
    # Files of earlier versions do not say how many.
    text += f", {found['processes']} processes at once" if "processes" in found else ""
    text += f"; commit {found['commit']}.\n\n" if "commit" in found else ".\n\n"
    if "failure" in found:
        return f"{text}{found['failure']}\n"
    slowest = [[worst["specialization"], f"{worst['ms']:.0f} ms"] for worst in found["worst"]]
    middle = f"median of {found['kernels']} kernels"
    lines = [[f"`{name}`", ms] for name, ms in slowest]
    return (
        text + table(["kernel", "time"], [[middle, f"{found['median_ms']:.0f} ms"], *lines]) + "\n"
    )


def facts_table(runs: Sequence[dict[str, Any]]) -> str:
    """Versions and machine of each run."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    head = ["", *(f"run {i + 1}" for i in range(len(runs)))]

    def text(name: str, run: dict[str, Any]) -> str:
        value = run.get(name, "")
        if name == "copy_bandwidth" and value:
            return f"{value / 1e12:.2f} TB/s"
        return size_text(value) if name == "l2_bytes" and value else str(value)

    return table(head, ([name, *(text(name, run) for run in runs)] for name in names))


def clock_text(rows: Sequence[Row]) -> str:
    """The range of clock and temperature over all rows."""
    parts = []
    for name, unit in (("mhz", "MHz"), ("celsius", "°C"), ("watts", "W")):
        values = [v for row in rows for v in row.data.get("clock", {}).get(name, [])]
        if values:
            parts.append(f"{min(values):.0f} to {max(values):.0f} {unit}")
    dropped = sum(
        numbers["dropped"]
        for row in rows
        for side in row.sides.values()
        for numbers in side.values()
        if isinstance(numbers, dict) and "dropped" in numbers
    )
    seen = f"SM clock, temperature, power: {', '.join(parts)}. " if parts else "No clock was read. "
    return f"{seen}Samples dropped because the clock fell more than 3 %: {dropped}.\n"


def page(data: dict[str, Any], source: str, picture: str | None) -> str:
    """The whole page."""
    used = sorted({row["run"] for row in data["rows"].values()})
    runs = [data["runs"][i] for i in used]
    rows = [Row(key, row, data["runs"][row["run"]]) for key, row in data["rows"].items()]
    text = "# Benchmarks\n\n"
    text += f"Generated by `python -m benchmarks.report {source}`; edit nothing here.\n\n"
    text += facts_table(runs) + "\n\n" + METHOD + "\n"
    text += (BASELINES + "\n" if any(row.elsewhere() for row in rows) else "") + clock_text(rows)
    text += "\n## Targets\n\n" + targets_table(rows, data.get("cold_compile")) + "\n"
    text += "\n## Operators\n\n" + geometric_means(rows) + "\n"
    if picture:
        text += f"\n![Speed-up of every row against its fastest peer]({picture})\n"
    for operator in dict.fromkeys(row.data["operator"] for row in rows):
        group = [row for row in rows if row.data["operator"] == operator]
        text += f"\n## {operator}\n\n{times_table(group)}\n\n{costs_table(group)}\n"
    return text + cold_compile_text(data.get("cold_compile"))


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Bars of the speed-ups; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("Agg")
    # The same rows give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "torchkiln"
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    bars = [(row, ratio) for row in rows if (ratio := row.speedup()) is not None][::-1]
    if not bars:
        return False
    figure, axes = pyplot.subplots(figsize=(11, 1 + 0.2 * len(bars)))
    operators = list(dict.fromkeys(row.data["operator"] for row, _ in bars))
    colors = [
        "#c0392b" if ratio < 1 else f"C{operators.index(row.data['operator']) % 3}"
        for row, ratio in bars
    ]
    # On a logarithmic axis, from 1: what loses points to the left.
    places = range(len(bars))
    axes.barh(places, [ratio - 1 for _, ratio in bars], left=1, color=colors, height=0.7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    for place, (_, ratio) in enumerate(bars):
        align, shift = ("left", 1.03) if ratio >= 1 else ("right", 0.97)
        axes.text(ratio * shift, place, number(ratio, "x"), va="center", ha=align, fontsize=6)
    labels = [f"{row.data['operator']}: {row.title}" for row, _ in bars]
    axes.set_yticks(places, labels, fontsize=6)
    axes.set_ylim(-1, len(bars))
    axes.set_xlabel("speed-up against the fastest peer")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--folder", default="docs/benchmarks", type=click.Path(path_type=Path))
def main(source: Path, folder: Path) -> None:
    """Writes the page and the picture of a JSON file."""
    data = json.loads(source.read_text())
    rows = [Row(key, row, data["runs"][row["run"]]) for key, row in data["rows"].items()]
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{source.stem}.svg"
    drawn = draw(rows, picture)
    if not drawn:
        click.echo("no picture: install matplotlib and run this again", err=True)
    target = folder / f"{source.stem}.md"
    shown = source.name if source.is_absolute() else source.as_posix()
    target.write_text(page(data, shown, picture.name if drawn else None))
    click.echo(str(target))


if __name__ == "__main__":
    main()
