"""Times callables fairly: what runs on the device, what the host pays, memory, error, launches.

One row compares several sides (ours first, then peers) on the same inputs, in one process. Per
metric and round every side is sampled once, in random order; a row reports medians over the rounds.

cold     device time of one call whose inputs are not in L2: a CUDA graph of calls on rotating
         copies of the inputs. A side that is long or synchronises is timed by events instead, after
         a write that fills L2; its waits for the host are then part of the time, as for a user.
warm     the same with one copy of the inputs and no such write.
eager    wall time of a call among many, back to back.
latency  wall time of a call with a synchronisation after it.

Without a GPU, `warm` is wall time and the rest is left out.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import gc
import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from benchmarks.clock import ClockLog, Reading

Inputs = dict[str, Any]
Call = Callable[[], Any]

# Copies of the inputs that are rotated must together exceed the L2 by this factor.
L2_FACTOR = 3
MOST_COPIES = 48
# Above this a call is timed by events: launch gaps are small beside it.
LONG_US = 2000.0
# Above this a call is sampled once per round, and only for `cold`.
VERY_LONG_US = 20_000.0
CLOCK_DROP = 0.97
FEWEST_ROUNDS = 3
SLEEP_CYCLES = 40_000_000  # about 20 ms


class TimeLimit(BaseException):
    """Not an Exception: a compiler that catches those must not swallow it."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    rounds: int = 7
    sample_us: float = 4000.0  # of device time per side, metric and round
    compile: bool = True
    compile_seconds: float = 45.0
    side_seconds: float = 60.0


@dataclass(frozen=True)
class Side:
    """One implementation. `prepare` makes, from inputs, the call that is timed."""

    name: str
    prepare: Callable[[Inputs], Call]
    synchronises: bool = False
    compiled: bool = False  # by torch.compile: slow to start, and skipped on request
    result: Callable[[Any], Any] = lambda out: out  # what is compared with the oracle
    compared: bool = True  # False: its answer has another form


def on_default_stream(side: Side) -> Side:
    """A side whose kernels run on the default stream, whatever the current one is.

    Then all of its call does, in order with what the current stream does before and after it; no
    graph can capture that.
    """

    def ordered(call: Callable[[], Any]) -> Any:
        current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        default.wait_stream(current)
        with torch.cuda.stream(default):
            result = call()
        current.wait_stream(default)
        return result

    def prepare(inputs: Inputs) -> Call:
        return partial(ordered, ordered(lambda: side.prepare(inputs)))

    return replace(side, prepare=prepare, synchronises=True)


@dataclass(frozen=True)
class Work:
    """What a row measures: inputs, sides, the float64 answer, and the bytes that must move."""

    inputs: Inputs
    sides: Sequence[Side]
    oracle: Callable[[Inputs], Any] | None = None
    floor_bytes: int | None = None


@dataclass
class Lane:
    """A side while it is measured: a timer per metric, and the samples."""

    side: Side
    calls: list[Call]
    timers: dict[str, Callable[[], float]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimit inside the block when it takes too long. Main thread only."""

    def expire(*_: object) -> None:
        raise TimeLimit(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps the collector from running inside a sample."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a result or a set of inputs."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_of(item)]
    return []


def bytes_of(value: Any) -> int:
    """The bytes of every tensor in it."""
    return sum(t.numel() * t.element_size() for t in tensors_of(value))


def copy_of(inputs: Inputs) -> Inputs:
    """The same values in other memory, layout and need of a gradient kept."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers, exactly, as float64."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 10th to 90th percentile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {
        "median": round(statistics.median(ordered), 3),
        "p10": round(at(0.1), 3),
        "p90": round(at(0.9), 3),
        "rounds": len(ordered),
    }


def error_of(result: Any, expected: Any) -> dict[str, Any]:
    """How far a result is from the float64 one; indices are compared as sets and by order."""
    found, wanted = tensors_of(result), tensors_of(expected)
    if len(found) != len(wanted):
        return {"note": f"{len(found)} results where {len(wanted)} are expected"}
    if wanted and not wanted[0].is_floating_point():
        return index_error(found[0].detach().cpu().long(), wanted[0].cpu().long())
    worst, mean, scale, count = 0.0, 0.0, 0.0, 0
    for ours, exact in zip(found, wanted, strict=True):
        if ours.shape != exact.shape:
            return {"note": f"shape {tuple(ours.shape)} where {tuple(exact.shape)} is expected"}
        if exact.numel() == 0:
            continue
        difference = (ours.detach().to(exact.device).double() - exact.detach()).abs()
        worst = max(worst, difference.nan_to_num(nan=math.inf).max().item())
        mean += difference.sum().item()
        scale = max(scale, exact.detach().abs().max().item())
        count += exact.numel()
    return {"max": worst, "mean": mean / max(count, 1), "scale": scale}


def index_error(found: Tensor, wanted: Tensor) -> dict[str, Any]:
    """How many indices only one of the two has, and whether the order is the same."""
    only_one = set(found.tolist()) ^ set(wanted.tolist())
    return {
        "differing": len(only_one),
        "kept": wanted.numel(),
        "same_order": bool(torch.equal(found, wanted)),
    }


def short(error: BaseException) -> str:
    """The first line of what went wrong, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def wall_us(call: Call, count: int, synchronize: Callable[[], None]) -> float:
    """Wall time of one of `count` calls, back to back, the last one's work included."""
    synchronize()
    with no_garbage_collection():
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize()
        return (time.perf_counter() - start) / count * 1e6


def summarize(
    lane: Lane, windows: dict[str, list[tuple[float, float]]], log: ClockLog
) -> dict[str, Any]:
    """Medians over the rounds in which the clock held, and what the clock did."""
    readings: dict[str, list[list[Reading]]] = {
        metric: [log.window(*window) for window in spans] for metric, spans in windows.items()
    }
    everything = [r for rounds in readings.values() for window in rounds for r in window]
    floor = CLOCK_DROP * max((r.mhz for r in everything), default=0.0)
    summary: dict[str, Any] = dict(lane.facts)
    for metric, values in lane.samples.items():
        held = [all(r.mhz >= floor for r in window) for window in readings[metric]]
        kept = [value for value, good in zip(values, held, strict=True) if good]
        used = kept if len(kept) >= min(FEWEST_ROUNDS, len(values)) else values
        summary[f"{metric}_us"] = spread(used) | {"dropped": len(values) - len(used)}
    return summary


def clock_summary(log: ClockLog, begin: float, end: float) -> dict[str, Any]:
    """Range of clock, temperature and power while a row was measured."""
    readings = log.window(begin, end)
    summary: dict[str, Any] = {"source": log.source, "readings": len(readings)}
    for name in ("mhz", "celsius", "watts"):
        values = [getattr(r, name) for r in readings]
        if values:
            summary[name] = [min(values), max(values)]
    return summary


class CpuBench:
    """Times calls on the CPU, by the wall clock."""

    def __init__(self, settings: Settings, log: ClockLog) -> None:
        self.settings, self.log = settings, log

    def measure(self, work: Work) -> dict[str, Any]:
        """One row: every side's numbers or its failure."""
        expected = oracle_of(work)
        return run_lanes(self, work, expected)

    def side_context(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to enter on a CPU."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Nothing runs behind a CPU call."""

    def open(self, side: Side, work: Work, expected: Any) -> Lane:
        """Prepares a side: first call, error, timers."""
        call = side.prepare(work.inputs)
        lane = Lane(side, [call])
        lane.facts.update(first_call(call, self.synchronize), how="wall clock")
        if expected is not None and side.compared:
            lane.facts["error"] = error_of(side.result(call()), expected)
        estimate = wall_us(call, 1, self.synchronize)
        count = max(1, min(50, round(5 * self.settings.sample_us / max(estimate, 1))))
        lane.timers["warm"] = lambda: wall_us(call, count, self.synchronize)
        return lane


class CudaBench:
    """Times calls on the current CUDA device, all of them on one stream of its own."""

    def __init__(self, settings: Settings, log: ClockLog) -> None:
        self.settings, self.log = settings, log
        # Backward runs where forward ran: with one stream for everything, both can be captured.
        self.stream = torch.cuda.Stream()
        self.l2_bytes = int(getattr(torch.cuda.get_device_properties(), "L2_cache_size", 60 << 20))
        self.flusher = torch.empty(4 * self.l2_bytes, dtype=torch.int8, device="cuda")

    def measure(self, work: Work) -> dict[str, Any]:
        """One row: every side's numbers or its failure."""
        torch.cuda.synchronize()
        with self.side_context():
            expected = oracle_of(work)
            row = run_lanes(self, work, expected)
        torch.cuda.synchronize()
        return row

    def side_context(self) -> contextlib.AbstractContextManager[Any]:
        """Everything happens on the bench's stream."""
        return torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize()

    def copy_bandwidth(self) -> float:
        """Bytes per second of a copy of 1 GiB, read and written bytes counted."""
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        times = []
        for _ in range(20):
            times.append(self._event_us(lambda: target.copy_(source)))
        return 2 * source.numel() / (statistics.median(times[5:]) * 1e-6)

    def open(self, side: Side, work: Work, expected: Any) -> Lane:
        """Prepares a side: first call, error, memory, timers."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        call = side.prepare(work.inputs)
        lane = Lane(side, [call])
        lane.facts["held_bytes"] = torch.cuda.memory_allocated() - before
        lane.facts.update(first_call(call, self.synchronize))
        out = call()
        if expected is not None and side.compared:
            lane.facts["error"] = error_of(side.result(out), expected)
        out_bytes = bytes_of(out)
        del out
        lane.facts["extra_bytes"] = max(0, self._peak_bytes(call) - out_bytes)
        self._add_timers(lane, work, out_bytes)
        return lane

    def count(self, side: Side, inputs: Inputs) -> dict[str, Any]:
        """Kernels, copies and synchronisations of one call; one more call warms up."""
        torch.cuda.synchronize()
        with self.side_context():
            call = side.prepare(inputs)
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            waits = self._waits(call)
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                call()
                torch.cuda.synchronize()
        return counts_of(profile.events()) | {"waits_for_device": waits}

    def _waits(self, call: Call) -> bool:
        """True if the host cannot return from the call while the device is busy with other work."""
        torch.cuda._sleep(SLEEP_CYCLES)
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return host > 0.6 * (time.perf_counter() - start)

    def _peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _add_timers(self, lane: Lane, work: Work, out_bytes: int) -> None:
        call, settings = lane.calls[0], self.settings
        estimate = statistics.median(self._event_us(call) for _ in range(3))
        if estimate > VERY_LONG_US:
            lane.facts["how"] = "events"
            lane.timers["cold"] = lambda: self._events_us(call, 1, flush=True)
            return
        count = max(3, min(20, round(settings.sample_us / estimate)))
        captured = not lane.side.synchronises and estimate < LONG_US
        if captured:
            try:
                self._add_graphs(lane, work, out_bytes, estimate)
                lane.facts["how"] = "graph"
            except Exception as error:
                torch.cuda.synchronize()
                captured = False
                lane.facts["capture_error"] = short(error)
        if not captured:
            lane.facts["how"] = "events"
            lane.timers["cold"] = lambda: self._events_us(call, count, flush=True)
            lane.timers["warm"] = lambda: self._events_us(call, count, flush=False)
        calls = max(3, min(200, round(2 * settings.sample_us / max(estimate, 10))))
        lane.timers["eager"] = lambda: wall_us(call, calls, self.synchronize)
        lane.timers["latency"] = lambda: self._latency_us(call, min(calls, 20))

    def _add_graphs(self, lane: Lane, work: Work, out_bytes: int, estimate: float) -> None:
        """Graphs on a single input and, where enough copies make it cold, on rotating ones."""
        call = lane.calls[0]
        footprint = max(1, bytes_of(work.inputs) + out_bytes)
        copies = math.ceil(L2_FACTOR * self.l2_bytes / footprint) + 1
        if copies <= MOST_COPIES:
            # The first copy is the inputs themselves.
            lane.calls += [lane.side.prepare(copy_of(work.inputs)) for _ in range(copies - 1)]
            for other in lane.calls[1:]:
                other()
            lane.timers["cold"] = self._graph_timer(lane.calls, estimate, keep=True)
            lane.facts["copies"] = copies
        repeats = max(1, min(20, round(100 / estimate)))
        lane.timers["warm"] = self._graph_timer([call] * repeats, estimate, keep=False)

    def _graph_timer(self, calls: list[Call], estimate: float, keep: bool) -> Callable[[], float]:
        """Captures the calls; `keep` gives each its own output memory."""
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph, stream=self.stream):
            for call in calls:
                out = call()
                if keep:
                    kept.append(out)
                del out
        del kept
        replays = max(1, min(50, round(self.settings.sample_us / (estimate * len(calls)))))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            graph.replay()
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e3 / (replays * len(calls))

        return sample

    def _event_us(self, call: Call, flush: bool = True) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            self.flusher.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def _events_us(self, call: Call, count: int, flush: bool) -> float:
        with no_garbage_collection():
            return statistics.median(self._event_us(call, flush) for _ in range(count))

    def _latency_us(self, call: Call, count: int) -> float:
        return statistics.median(wall_us(call, 1, self.synchronize) for _ in range(count))


def oracle_of(work: Work) -> Any:
    """The float64 answer, detached; None where there is no oracle."""
    if work.oracle is None:
        return None
    expected = work.oracle(in_float64(work.inputs))
    return [t.detach() for t in tensors_of(expected)]


def first_call(call: Call, synchronize: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of the first call: what had to be compiled or loaded is in it."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return {"first_call_ms": round((time.perf_counter() - start) * 1e3, 2)}


def run_lanes(bench: CpuBench | CudaBench, work: Work, expected: Any) -> dict[str, Any]:
    """Opens every side that works and samples them side by side."""
    begin = time.monotonic()
    lanes: list[Lane] = []
    sides: dict[str, Any] = {}
    for side in work.sides:
        if side.compiled and not bench.settings.compile:
            sides[side.name] = {"skipped": "torch.compile was not asked for"}
            continue
        seconds = bench.settings.compile_seconds if side.compiled else bench.settings.side_seconds
        try:
            with time_limit(seconds):
                lanes.append(bench.open(side, work, expected))
        except (Exception, TimeLimit) as error:
            sides[side.name] = {"failure": short(error)}
            if side.compiled:
                torch._dynamo.reset()
    windows = sample_all(bench, lanes)
    for lane in lanes:
        sides[lane.side.name] = summarize(lane, windows[lane.side.name], bench.log)
    ordered = {side.name: sides[side.name] for side in work.sides}
    return {
        "sides": ordered,
        "floor_bytes": work.floor_bytes,
        "clock": clock_summary(bench.log, begin, time.monotonic()),
        "seconds": round(time.monotonic() - begin, 2),
    }


def sample_all(
    bench: CpuBench | CudaBench, lanes: list[Lane]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Fills the lanes' samples, round by round; returns when each sample was taken."""
    windows: dict[str, dict[str, list[tuple[float, float]]]] = {
        lane.side.name: {metric: [] for metric in lane.timers} for lane in lanes
    }
    for _ in range(bench.settings.rounds):
        for metric in ("cold", "warm", "eager", "latency"):
            for lane in random.sample(lanes, len(lanes)):
                if metric not in lane.timers:
                    continue
                begin = time.monotonic()
                bench.log.look()
                value = lane.timers[metric]()
                bench.log.look()
                lane.samples.setdefault(metric, []).append(value)
                windows[lane.side.name][metric].append((begin, time.monotonic()))
    return windows


def counts_of(events: Sequence[Any]) -> dict[str, float]:
    """Kernels, copies and fills on the device, and the host's waits, out of a profile."""
    counts = {"kernels": 0, "copies": 0, "host_waits": 0}
    kernel_us = 0.0
    for event in events:
        name = event.name
        if event.device_type == DeviceType.CUDA:
            # Annotations of compiled code are shown on the device, too.
            if getattr(event, "is_user_annotation", False) or name.startswith(("##", "Torch-")):
                continue
            is_copy = name.startswith(("Memcpy", "Memset"))
            counts["copies" if is_copy else "kernels"] += 1
            kernel_us += event.time_range.elapsed_us()
        # cudaDeviceSynchronize is the profile's own, at its end.
        elif name in ("cudaStreamSynchronize", "cudaEventSynchronize"):
            counts["host_waits"] += 1
    return counts | {"kernel_us": round(kernel_us, 1)}
