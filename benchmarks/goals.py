"""What rows must reach: declared with a row, or a rule over the rows of a page, ours among them.

The numbers of a rule come from the file that `benchmarks.run` wrote and from nothing else, so that
a rule holds for files that are older than it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.rows import OURS, Row, number, size_text

Text = Callable[[float], str]
times: Text = partial(number, unit="x")


def percent(value: float) -> str:
    """A share."""
    return f"{value:.0%}"


@dataclass(frozen=True)
class Goal:
    """A line of the table of targets.

    Args:
        subject: the row, or what stands for several.
        rule: what is asked for, in words.
        reached: the measure; None where it was not taken.
        must: its limit; None where the issue has an aim only.
        aim: the better limit.
        show: writes the measure.
        at_most: whether less is better.
        note: behind the measure.
    """

    subject: str
    rule: str
    reached: float | None
    must: float | None
    aim: float
    show: Text = times
    at_most: bool = False
    note: str = ""

    def verdict(self) -> str:
        """Open, missed, met, or the aim met."""
        if self.reached is None:
            return "**open**"
        reached, sign = self.reached, -1 if self.at_most else 1

        def holds(limit: float) -> bool:
            return sign * reached >= sign * limit

        if holds(self.aim):
            return "aim met"
        if self.must is None:
            return "aim missed"
        return "met" if holds(self.must) else "**missed**"

    def line(self) -> list[str]:
        """Its cells."""
        found = "not measured" if self.reached is None else self.show(self.reached) + self.note
        return [self.subject, self.rule, found, self.verdict()]


# --- measures -----------------------------------------------------------------------------------


def ratio(above: float | None, below: float | None) -> float | None:
    """None where either is missing."""
    return above / below if above is not None and below else None


def against(row: Row, peer: str, _: Row | None) -> float | None:
    """A peer's time over ours, right or not."""
    return ratio(row.time(peer), row.time(OURS))


def against_best(row: Row, peer: str, _: Row | None) -> float | None:
    """That of a peer's best side, or its time elsewhere."""
    return ratio(row.peer_us(peer) or row.elsewhere().get(peer, (None,))[0], row.time(OURS))


def host_share(row: Row, peer: str, _: Row | None) -> float | None:
    """Our host time over a peer's."""
    return ratio(row.time(OURS, "eager_us"), row.time(peer, "eager_us"))


def eager(row: Row, peer: str, _: Row | None) -> float | None:
    """A peer's eager time over ours."""
    return ratio(row.peer_us(peer, "eager_us"), row.time(OURS, "eager_us"))


def memory_share(row: Row, peer: str, _: Row | None) -> float | None:
    """Our extra memory over a peer's."""
    theirs = (row.sides[name].get("extra_bytes") for name in row.sides_of(peer))
    return ratio(
        row.sides[OURS].get("extra_bytes"), min((x for x in theirs if x is not None), default=None)
    )


def slower(row: Row, _: str, other: Row | None) -> float | None:
    """Our time over that of another row of ours."""
    return ratio(row.time(OURS), other.time(OURS) if other else None)


def faster(row: Row, _: str, other: Row | None) -> float | None:
    """The time of another row of ours over that of this one."""
    return ratio(other.time(OURS) if other else None, row.time(OURS))


@dataclass(frozen=True)
class Kind:
    """A measure of a row: its words in a rule, and how it is taken and shown."""

    words: str
    take: Callable[[Row, str, Row | None], float | None]
    show: Text = times
    at_most: bool = False


KINDS = {
    "speedup": Kind("{must:g}x {peer}, aim {aim:g}x", against),
    "baseline": Kind("{must:g}x {peer}, aim {aim:g}x", against_best),
    "runs": Kind("runs, aim {aim:g}x {peer}", against_best),
    "eager": Kind("eager: {must:g}x {peer}, aim {aim:g}x", eager),
    "host": Kind("host time ≤ {must:g}x {peer}, aim {aim:g}x", host_share, at_most=True),
    "host_us": Kind(
        "eager: aim ≤ {aim:g} µs",
        lambda row, *_: row.time(OURS, "eager_us"),
        partial(number, unit=" µs"),
        at_most=True,
    ),
    "floor": Kind(
        "{must:.0%} of the floor, aim {aim:.0%}", lambda row, *_: row.floor_share(), percent
    ),
    "memory": Kind(
        "extra memory ≤ {must_size}, aim {aim_size}",
        lambda row, *_: row.sides[OURS].get("extra_bytes"),
        size_text,
        at_most=True,
    ),
    "memory_share": Kind(
        "extra memory ≤ {must:g}x {peer}'s, aim {aim:g}x", memory_share, at_most=True
    ),
    "slower": Kind("≤ {must:g}x the time of our {peer}, aim {aim:g}x", slower, at_most=True),
    "faster": Kind("{must:g}x our {peer}, aim {aim:g}x", faster),
}


def goal_of(row: Row, target: Mapping[str, Any], other: Row | None = None) -> Goal:
    """A target of one row; `other` is the row of ours that it may be compared with."""
    kind, peer, must, aim = KINDS[target["kind"]], target["peer"], target["must"], target["aim"]
    is_right = row.time(OURS) is not None and not row.is_wrong(OURS)
    sizes = {"must_size": size_text(must), "aim_size": size_text(aim)}
    notes = []
    if peer in row.sides and row.is_wrong(peer) and target["kind"] == "speedup":
        notes.append(", *the peer's answer is wrong*")
    if other is not None and other.data["run"] != row.data["run"]:
        notes.append(", *of two runs*")
    return Goal(
        f"{row.data['operator']}: {row.title}",
        kind.words.format(peer=peer, must=must, aim=aim, **sizes),
        kind.take(row, peer, other) if is_right else None,
        must,
        aim,
        kind.show,
        kind.at_most,
        "".join(notes),
    )


# --- rules over rows ----------------------------------------------------------------------------

DETERMINISTIC = "deterministic"
MSDA, SCAN = "multi_scale_deformable_attention", "selective_scan"
AGGREGATION, PYRAMID = "deformable_aggregation", "multi_scale_roi_align"
LONGEST = "1x1536x262144x16"


@dataclass(frozen=True)
class Rule:
    """A target of many rows.

    Args:
        operator: whose rows.
        kind: of `KINDS`.
        must: the limit; None where there is an aim only.
        aim: the better limit.
        peer: the side compared with, or the name of the other row of ours.
        applies: which of the operator's rows.
        other: the fields in which the other row of ours differs.
        asks: what is shown as open where the operator has rows, but none to which this applies.
    """

    operator: str
    kind: str
    must: float | None
    aim: float
    peer: str = ""
    applies: Callable[[Row], bool] = lambda row: True
    other: Callable[[Row], dict[str, str]] | None = None
    asks: str = ""

    def goals(self, rows: Sequence[Row]) -> Iterator[Goal]:
        """One for each row that declares none of this kind and peer itself."""
        target = {"kind": self.kind, "must": self.must, "aim": self.aim, "peer": self.peer}
        by_fields = {fields(row.data): row for row in rows}
        of_operator = [row for row in rows if row.data["operator"] == self.operator]
        found = [row for row in of_operator if self.applies(row)]
        for row in found:
            if any((t["kind"], t["peer"]) == (self.kind, self.peer) for t in row.data["targets"]):
                continue
            changed = {**row.data, **(self.other(row) if self.other else {})}
            yield goal_of(row, target, by_fields.get(fields(changed)) if self.other else None)
        if of_operator and not found and self.asks:
            words = KINDS[self.kind].words.format(**target)
            yield Goal(f"{self.operator}: {self.asks}", words, None, self.must, self.aim)


def fields(data: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    names = ("operator", "size", "data", "dtype", "direction", "layout", "device", "threads")
    return tuple(data[name] for name in names)


def rule_name(row: Row) -> str:
    """The discretization of a row of the scan."""
    return row.data["data"].split(", ")[0]  # type: ignore[no-any-return]


def is_deterministic(row: Row) -> bool:
    """Whether it is the form of a fixed order."""
    return DETERMINISTIC in f"{row.data['size']}, {row.data['data']}".split(", ")


def without_order(row: Row) -> dict[str, str]:
    """The fields of the fast form."""
    return {
        name: ", ".join(part for part in row.data[name].split(", ") if part != DETERMINISTIC)
        for name in ("size", "data")
    }


def has_side(peer: str, row: Row) -> bool:
    """Whether a peer ran beside ours."""
    return bool(row.peer_us(peer))


def is_on_gpu(row: Row) -> bool:
    """Whether it is a row of the GPU."""
    return row.data["device"] == "cuda"  # type: ignore[no-any-return]


def is_memory_bound(row: Row) -> bool:
    """Rows whose floor is that of the memory; those that declare it have their own aim."""
    has_goal = any(target["kind"] == "floor" for target in row.data["targets"])
    return is_on_gpu(row) and not has_goal


RULES = (
    Rule(
        SCAN, "slower", 1.5, 1.2, "mamba",
        lambda row: rule_name(row) not in ("mamba", "poly") and not is_deterministic(row),
        lambda row: {"data": "mamba"},
    ),
    Rule(
        SCAN, "slower", 1.6, 1.3, "mamba",
        lambda row: rule_name(row) == "poly" and not is_deterministic(row),
        lambda row: {"data": "mamba"},
    ),
    Rule(SCAN, "memory_share", 1, 0.5, "mamba-ssm", partial(has_side, "mamba-ssm")),
    Rule(SCAN, "runs", 0, 3, "mamba-ssm", lambda row: row.data["size"] == LONGEST),
    Rule(
        SCAN, "speedup", 50, 150, "PyTorch",
        lambda row: row.data["device"] == "cpu" and not row.data["threads"]
        and rule_name(row) == "mamba",
        asks="1x1536x2048x16, mamba, float32, CPU, all 16 threads",
    ),
    Rule(
        AGGREGATION, "faster", 1.4, 1.8, "float32",
        lambda row: row.data["dtype"] == "float16",
        lambda row: {"dtype": "float32"},
    ),
    *(
        Rule(operator, "slower", 2, 1.3, "fast form", is_deterministic, without_order)
        for operator in (AGGREGATION, MSDA, f"{MSDA}_fused", SCAN)
    ),
    Rule(MSDA, "baseline", 1, 1.4, "deformops", partial(has_side, "deformops")),
    Rule(MSDA, "eager", 1, 1.4, "deformops", partial(has_side, "deformops")),
    Rule(
        MSDA, "host_us", None, 30, "",
        lambda row: row.data["size"].startswith("decoder") and row.data["direction"] == "forward",
    ),
    Rule(PYRAMID, "eager", 4, 8, "torchvision", is_on_gpu),
    Rule("box_iou", "floor", 0.5, 0.7, "", is_memory_bound),
    Rule(
        "corner_pool", "baseline", 3, 5, "mmcv",
        lambda row: is_on_gpu(row) and row.data["direction"] == "forward",
    ),
)  # fmt: skip


# --- rules over a whole family ------------------------------------------------------------------

# A page with rows of all of these is one of the detection family.
FAMILY = ("box_iou_rotated", "corner_pool", PYRAMID, "nms3d", "nms_rotated", "soft_nms")
MOST_NAMES = 5


def mean_of(ratios: Sequence[float]) -> float | None:
    """The geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def family_means(rows: Sequence[Row]) -> Iterator[Goal]:
    """Geometric means of the speed-ups on the GPU, forward and with a gradient."""
    found = [
        (row.data["direction"], speedup)
        for row in rows
        if is_on_gpu(row) and (speedup := row.speedup()) is not None
    ]
    groups = {
        "forward": [speedup for direction, speedup in found if direction == "forward"],
        "with a gradient": [speedup for direction, speedup in found if direction != "forward"],
        "all": [speedup for _, speedup in found],
    }
    for name, ratios in groups.items():
        rule = f"geometric mean of {len(ratios)} speed-ups: 3x, aim 6x"
        yield Goal(f"the family: {name}", rule, mean_of(ratios), 3, 6)


def counted(subject: str, bad: Sequence[tuple[Row, float]]) -> Goal:
    """No row may be bad; those that are most so get named, with how much."""
    names = [
        f"{row.data['operator']} {row.title} ({times(by)})"
        for row, by in sorted(bad, key=lambda found: -found[1])[:MOST_NAMES]
    ]
    names += ["..."] if len(bad) > len(names) else []
    note = f": {'; '.join(names)}" if names else ""
    return Goal(subject, "none", len(bad), 0, 0, rows_text, at_most=True, note=note)


def rows_text(count: float) -> str:
    """How many rows."""
    return f"{count:.0f} row{'' if count == 1 else 's'}"


def least_on_cpu(rows: Sequence[Row], threads: int) -> Goal:
    """The row of the CPU with the smallest speed-up, with one thread or with all (0)."""
    words, must, aim = ("one thread", 1, 2) if threads == 1 else ("16 threads", 6, 10)
    found = [
        (speedup, f", {row.data['operator']} {row.title}")
        for row in rows
        if row.data["device"] == "cpu" and row.data["threads"] == threads
        if (speedup := row.speedup()) is not None
    ]
    least, name = min(found, default=(None, ""))
    rule = f"every row: {must}x the peer's CPU version, aim {aim}x"
    return Goal(f"the family: CPU, {words}", rule, least, must, aim, note=name)


def family_goals(rows: Sequence[Row], compiled: Mapping[str, Any] | None) -> Iterator[Goal]:
    """What the issue asks of the family as a whole."""
    yield from family_means(rows)
    gpu = list(filter(is_on_gpu, rows))
    slow = [(row, 1 / speedup) for row in gpu if (speedup := row.speedup()) and speedup < 1]
    yield counted("the family: rows that take longer than the fastest peer", slow)
    yield least_on_cpu(rows, 1)
    yield least_on_cpu(rows, 0)
    found = compiled if compiled and "failure" not in compiled else None
    measured = {
        "median": (found["median_ms"] if found else None, 100, 70),
        "worst": (found["worst"][0]["ms"] if found else None, 250, 150),
    }
    for name, (reached, must, aim) in measured.items():
        show = partial(number, unit=" ms")
        rule = f"≤ {must} ms, aim {aim} ms"
        yield Goal(f"the family: cold compile, {name} kernel", rule, reached, must, aim, show, True)
    worse = [(row, by) for row in gpu if (by := error_ratio(row)) and by > 1]
    yield counted("the family: rows whose mean error is above the fastest peer's", worse)


def error_ratio(row: Row) -> float | None:
    """Our mean error over that of the fastest right peer; infinite where only ours has one."""
    peer, own = row.best_peer(), row.relative_error(OURS)
    theirs = row.relative_error(peer[0]) if peer else None
    if own is None or theirs is None:
        return None
    return own / theirs if theirs else math.inf if own else None


def goals(rows: Sequence[Row], compiled: Mapping[str, Any] | None = None) -> Iterator[Goal]:
    """Every goal of a page; `compiled` is what it has of cold compiles."""
    if set(FAMILY) <= {row.data["operator"] for row in rows}:
        yield from family_goals(rows, compiled)
    for row in rows:
        for target in row.data["targets"]:
            yield goal_of(row, target)
    for rule in RULES:
        yield from rule.goals(rows)
