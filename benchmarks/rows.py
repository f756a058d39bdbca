"""The rows of what `benchmarks.run` wrote, and what follows from the numbers of one.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

OURS = "torchkiln"
# Mean error over the largest value of the answer, above which a side counts as wrong.
WRONG = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Kept boxes may differ from the float64 answer where an overlap lies on the threshold.
WRONG_INDICES = 0.01


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
            threads = self.data["threads"] or f"all {self.run.get('cores', '')}".rstrip()
            parts.append(f"CPU, {threads} thread{'' if threads == 1 else 's'}")
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
        relative = self.relative_error(side)
        of_values = WRONG.get(self.data["dtype"], 1e-4)
        limit = WRONG_INDICES if "differing" in error else of_values
        # NaN is wrong, too.
        return relative is None or not relative <= limit

    def best_peer(self) -> tuple[str, float] | None:
        """The fastest side of others that is right; another form of ours is no peer."""
        others = [n for n in self.sides if n != OURS and not n.startswith(f"{OURS}, ")]
        times = [
            (time, name)
            for name in others
            if not self.is_wrong(name) and (time := self.time(name)) is not None
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

    def sides_of(self, peer: str) -> list[str]:
        """The sides of a peer that are right; those of one with several begin with its name."""
        names = [name for name in self.sides if name == peer or name.startswith(f"{peer}, ")]
        return [name for name in names if not self.is_wrong(name)]

    def peer_us(self, peer: str, metric: str = "") -> float | None:
        """The best right time of a peer's sides."""
        times = [self.time(name, metric) for name in self.sides_of(peer)]
        return min((time for time in times if time), default=None)

    def relative_error(self, side: str) -> float | None:
        """Mean error over the largest value, or the share of indices that differ."""
        error = self.sides.get(side, {}).get("error", {})
        if "differing" in error:
            return error["differing"] / max(error["kept"], 1)  # type: ignore[no-any-return]
        return error["mean"] / max(error["scale"], 1e-30) if "mean" in error else None

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
