"""Makes the page, and a picture where matplotlib is installed, from what `benchmarks.run` wrote.

    python -m benchmarks.report docs/reports/five.json

Writes docs/benchmarks/five.md and docs/benchmarks/five.svg.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

OURS, TORCHVISION = "torchkiln", "torchvision"
# Mean error over the largest value of the answer, above which a side counts as wrong.
WRONG = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Kept boxes may differ from the float64 answer where an overlap lies on the threshold.
WRONG_INDICES = 0.01

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
measured copy bandwidth.
"""

BASELINES = """\
Times of a peer *elsewhere* come from another H200 with random inputs (mmcv a8073c74b, deformops
3.0.1, mamba-ssm e9594ce, SparseDrive ec0225d, built for sm_90, torch 2.11); rows in which that peer
ran beside ours have no need of them. Where that table has the time of another side of the row, the
peer's is scaled by that side's time here over its time there; a time marked *unscaled* is as it
stood.
"""


@dataclass(frozen=True)
class Row:
    """One row of the JSON file, with what follows from its numbers."""

    key: str
    data: dict[str, Any]
    run: dict[str, Any]

    @property
    def sides(self) -> dict[str, Any]:
        """Numbers by side."""
        return self.data.get("sides", {})  # type: ignore[no-any-return]

    @property
    def title(self) -> str:
        """The row without its operator."""
        names = ("direction", "size", "data", "dtype", "layout")
        parts = [self.data[name] for name in names if self.data[name]]
        if self.data["device"] == "cpu":
            parts.append(f"CPU, {self.data['threads'] or 'all'} threads")
        return ", ".join(parts)

    def time(self, side: str, metric: str = "") -> float | None:
        """Median microseconds: cold where there is one, else warm."""
        numbers = self.sides.get(side, {})
        found = numbers.get(metric) if metric else numbers.get("cold_us") or numbers.get("warm_us")
        return found["median"] if found else None

    def is_wrong(self, side: str) -> bool:
        """True if the side's answer is another one."""
        error = self.sides.get(side, {}).get("error")
        if not error:
            return False
        if "note" in error:
            return True
        if "differing" in error:
            return error["differing"] > WRONG_INDICES * max(error["kept"], 1)  # type: ignore[no-any-return]
        relative = error["mean"] / max(error["scale"], 1e-30)
        return not relative <= WRONG.get(self.data["dtype"], 1e-4)

    def best_peer(self) -> tuple[str, float] | None:
        """The fastest other side that is right."""
        times = [
            (time, name)
            for name in self.sides
            if name != OURS and not self.is_wrong(name) and (time := self.time(name)) is not None
        ]
        return (min(times)[1], min(times)[0]) if times else None

    def speedup(self) -> float | None:
        """Against the fastest peer; None if either is missing or ours is wrong."""
        peer, own = self.best_peer(), self.time(OURS)
        return peer[1] / own if peer and own and not self.is_wrong(OURS) else None

    def floor_us(self) -> float | None:
        """The time of moving the bytes once."""
        bandwidth, size = self.run.get("copy_bandwidth"), self.data.get("floor_bytes")
        on_gpu = self.data["device"] == "cuda"
        return size / bandwidth * 1e6 if bandwidth and size and on_gpu else None

    def floor_share(self) -> float | None:
        """How much of ours the floor is; of cold times only, warm ones may lie below it."""
        floor, own = self.floor_us(), self.time(OURS, "cold_us")
        return floor / own if floor and own else None

    def peer_us(self, peer: str) -> float | None:
        """The best right time of a peer's sides; those of one with several begin with its name."""
        names = [name for name in self.sides if name == peer or name.startswith(f"{peer}, ")]
        times = [self.time(name) for name in names if not self.is_wrong(name)]
        return min((time for time in times if time), default=None)

    def elsewhere(self) -> dict[str, tuple[float, bool]]:
        """Times of peers that did not run here, by name, and whether they were scaled."""
        found = {}
        for baseline in self.data.get("baselines", []):
            if self.peer_us(baseline["peer"]):
                continue
            here = self.time(baseline["beside"])
            is_scaled = bool(baseline["beside_us"] and here)
            scale = here / baseline["beside_us"] if is_scaled and here else 1.0
            found[baseline["peer"]] = (baseline["us"] * scale, is_scaled)
        return found

    def reached(self, target: dict[str, Any]) -> float | None:
        """What the row has of a target's measure."""
        own = self.time(OURS)
        if own is None or self.is_wrong(OURS):
            return None
        if target["kind"] == "speedup":
            peer = self.time(target["peer"])
            return peer / own if peer else None
        if target["kind"] == "host":
            ours, peer = self.time(OURS, "eager_us"), self.time(target["peer"], "eager_us")
            return ours / peer if ours and peer else None
        if target["kind"] == "baseline":
            name = target["peer"]
            peer = self.peer_us(name) or self.elsewhere().get(name, (None, False))[0]
            return peer / own if peer else None
        if target["kind"] == "floor":
            return self.floor_share()
        return self.sides[OURS].get("extra_bytes")  # type: ignore[no-any-return]


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}{unit}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}{unit}"


def size_text(value: float | None) -> str:
    """Bytes for people."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


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


def target_texts(target: dict[str, Any], reached: float | None) -> tuple[str, str, str]:
    """Rule, what was reached, and the verdict."""
    kind, must, aim = target["kind"], target["must"], target["aim"]
    small_is_good = kind in ("host", "memory")
    if kind == "memory":
        rule, found = f"extra memory ≤ {size_text(must)}", size_text(reached)
    elif kind == "floor":
        rule = f"{must:.0%} of the floor, aim {aim:.0%}"
        found = "" if reached is None else f"{reached:.0%}"
    elif kind == "host":
        rule = f"host time ≤ {must:g}x {target['peer']}, aim {aim:g}x"
        found = number(reached, "x")
    else:
        rule, found = f"{must:g}x {target['peer']}, aim {aim:g}x", number(reached, "x")
    if reached is None:
        return rule, "not measured", "**open**"

    def holds(limit: float) -> bool:
        return reached <= limit if small_is_good else reached >= limit

    return rule, found, "aim met" if holds(aim) else "met" if holds(must) else "**missed**"


def targets_table(rows: Sequence[Row]) -> str:
    """Every target of the issue, and whether it is met."""
    lines = [
        [f"{row.data['operator']}: {row.title}", *target_texts(target, row.reached(target))]
        for row in rows
        for target in row.data["targets"]
    ]
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


def costs_table(rows: Sequence[Row]) -> str:
    """Host time, launches, memory, error: ours / torchvision's."""

    def pair(row: Row, text: Any) -> str:
        both = [text(row.sides.get(name, {})) for name in (OURS, TORCHVISION)]
        return " ‖ ".join(part or "-" for part in both) if any(both) else ""

    def median(name: str) -> Any:
        return lambda side: number(side[name]["median"]) if name in side else ""

    def launches(side: dict[str, Any]) -> str:
        counts = side.get("launches")
        if not counts:
            return ""
        waits = max(counts["host_waits"], int(counts["waits_for_device"]))
        return f"{counts['kernels']}+{counts['copies']}, {waits}"

    lines = [
        [
            row.title,
            pair(row, median("eager_us")),
            pair(row, median("latency_us")),
            pair(row, launches),
            pair(row, lambda side: size_text(side.get("extra_bytes"))),
            pair(row, lambda side: error_text(side.get("error"))),
            pair(row, lambda side: number(side.get("first_call_ms"))),
        ]
        for row in rows
        if "failure" not in row.data
    ]
    head = ["row: ours ‖ torchvision's", "eager, µs", "latency, µs", "kernels+copies, waits"]
    head += ["extra memory", "error: max / mean, or indices", "first call, ms"]
    return table(head, lines)


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
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        losses = sum(ratio < 1 for ratio in ratios)
        counts = [str(len(ratios)), str(len(ratios) - losses), str(losses)]
        lines.append([operator, "GPU" if device == "cuda" else "CPU", number(mean, "x"), *counts])
    head = ["operator", "on", "geometric mean of the speed-ups", "rows", "wins", "losses"]
    return table(head, lines)


def cold_compile_text(found: dict[str, Any] | None) -> str:
    """The compile times, where they were taken."""
    if not found:
        return ""
    text = "\n## Cold compile\n\nNVRTC on an empty cache, one kernel at a time.\n\n"
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
    text += "\n## Targets\n\n" + targets_table(rows) + "\n"
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
