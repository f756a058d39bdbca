"""Makes the page of `benchmarks/tuning.py` out of its JSON file.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

MUST_REPEAT = 19
MUST_RATIO, AIM_RATIO = 1.5, 1.3
MUST_GPU_MS = 300
SHOWN = 40


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) + "\n"


def pairs(values: dict[str, Any]) -> str:
    """Such as "lanes=8, block_size=256"."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def yes(good: bool) -> str:
    """A verdict."""
    return "yes" if good else "**no**"


def repeat_text(section: dict[str, Any]) -> str:
    """How often the same choice, or one as good, was made."""
    text = "\n## The same key tuned again\n\n"
    text += "Each time in a new process on an empty cache folder. Relative times are of the whole "
    text += "call, measured side by side afterwards; the best one includes the choice of a search "
    text += "with a long budget. Good: the choice made most often, or at most 2 % slower; "
    text += f"{MUST_REPEAT} of 20 must be.\n\n"
    rows = []
    for call, found in section.items():
        needed = found["repeats"] * MUST_REPEAT / 20
        choices = "; ".join(
            f"{row['times']}x{' and the long one' if row['long'] else ''}: {row['relative']:.3f}"
            for row in found["choices"]
        )
        good = f"{found['good']} of {found['repeats']}"
        verdict = yes(found["good"] >= needed)
        rows.append([call, f"{found['best_us']:.1f}", choices, good, verdict])
    return text + table(["call", "best µs", "choices: times made, relative time", "good", ""], rows)


def space_text(row: dict[str, Any]) -> str:
    """What the search of one key cost."""
    text = "\n## One key\n\n"
    verdict = yes(row["gpu_ms"] <= MUST_GPU_MS)
    return text + table(
        ["kernel", "points", "GPU ms", "wall ms", "compiles, cores", f"≤ {MUST_GPU_MS} ms"],
        [
            [
                f"`{row['kernel']}`",
                str(row["points"]),
                f"{row['gpu_ms']:.0f}",
                f"{row['wall_ms']:.0f}",
                f"{row['compiles']}, {row['cores']}",
                verdict,
            ]
        ],
    )


def defaults_text(section: dict[str, Any]) -> str:
    """Defaults against choices: kernels by the tuner's times, calls by ours; the worst first."""
    kernels, calls = section["kernels"], section["calls"]
    ratios = [1 / (1 - row["gain"]) for row in kernels]
    beyond = [ratio for ratio in ratios if ratio > MUST_RATIO]
    text = "\n## Tuned against default\n\n"
    text += f"{section['workloads']} workloads, {len(kernels)} kernels and sizes, "
    text += f"{sum(row['gpu_ms'] for row in kernels) / 1e3:.0f} s of GPU time and "
    text += f"{sum(row['wall_ms'] for row in kernels) / 1e3:.0f} s of wall time to tune. "
    text += f"The default is beyond {MUST_RATIO}x in {len(beyond)} of them, beyond {AIM_RATIO}x in "
    text += f"{sum(ratio > AIM_RATIO for ratio in ratios)}, changed in "
    text += f"{sum(row['best'] != row['default'] for row in kernels)}.\n\n"
    rows = [
        [
            row["call"],
            f"`{row['kernel'].partition('<')[0]}`",
            f"{row['default_us']:.1f}",
            f"{row['best_us']:.1f}",
            f"{ratio:.2f}",
            pairs(row["default"]),
            pairs(row["best"]),
        ]
        for row, ratio in zip(kernels[:SHOWN], ratios, strict=False)
    ]
    head = ["call", "kernel", "default µs", "best µs", "ratio", "default", "choice"]
    text += f"The {len(rows)} worst defaults, by the tuner's times:\n\n" + table(head, rows)
    failed = [(row, failure) for row in kernels for failure in row["failed"]]
    if failed:
        text += "\nPoints that could not be chosen:\n\n" + table(
            ["kernel", "point", "reason"],
            [[f"`{r['kernel']}`", pairs(f["point"]), f["reason"]] for r, f in failed[:SHOWN]],
        )
    text += "\nWhole calls, replayed side by side with and without the records:\n\n"
    text += table(
        ["call", "default µs", "tuned µs", "ratio"],
        [
            [
                row["call"],
                f"{row['default']['median']:.1f}",
                f"{row['tuned']['median']:.1f}",
                f"{row['ratio']:.2f}",
            ]
            for row in calls
        ],
    )
    if section["not_captured"]:
        text += f"\nNot captured into a graph: {', '.join(section['not_captured'])}.\n"
    if section["left"]:
        text += f"\n{section['left']} calls were left out for want of time.\n"
    return text


def host_text(section: list[dict[str, Any]]) -> str:
    """What a record costs a warm launch."""
    text = "\n## Host time of a warm call\n\n"
    return text + table(
        ["call", "with a record µs", "mode off µs", "difference µs"],
        [
            [r["call"], f"{r['lookup']:.2f}", f"{r['off']:.2f}", f"{r['lookup'] - r['off']:+.2f}"]
            for r in section
        ],
    )


def ranks_text(section: dict[str, Any]) -> str:
    """Two GPUs over NCCL."""
    text = "\n## Ranks\n\n"
    if "skipped" in section:
        return text + f"Not measured: {section['skipped']}.\n"
    text += f"Two processes over NCCL; the same digest after `tuning.sync`: {yes(section['same'])}."
    return f"{text}\n\n" + table(
        ["rank", "tuned before", "records before, after", "digest after", "ms"],
        [
            [
                str(rank),
                row["tuned"],
                f"{row['records'][0]}, {row['records'][1]}",
                row["digests"][1][:12],
                f"{1e3 * row['seconds']:.0f}",
            ]
            for rank, row in enumerate(section["ranks"])
        ],
    )


def markdown(report: dict[str, Any]) -> str:
    """The page of the sections that were measured."""
    context = report["facts"]
    text = f"# Tuning on {context['gpu']}\n\n"
    text += "Written by `python -m benchmarks.tuning`; the numbers are in the JSON file beside it. "
    text += "What tuning does: [tuning.md](../tuning.md).\n\n"
    text += table(["", ""], [[name, str(value)] for name, value in context.items()])
    sections: dict[str, Callable[[Any], str]] = {
        "repeat": repeat_text,
        "space": space_text,
        "defaults": defaults_text,
        "host": host_text,
        "ranks": ranks_text,
    }
    for name, section_text in sections.items():
        if name in report:
            text += section_text(report[name])
    return text
