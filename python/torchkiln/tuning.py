"""When kernels are tuned, what came out, and the same choices on every rank.

A tunable changes only the speed of a kernel. What was measured best for a problem is recorded
beside the compiled kernels, and later processes use it. See docs/tuning.md.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torchkiln import _control

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Mode", "Tuned", "autotune", "mode", "report", "sync"]

Mode = Literal["off", "lookup", "tune"]
State = dict[str, Any]


# --- modes --------------------------------------------------------------------------------------


class _Blocks:
    """The `with` blocks that are open in the process; the one that was opened last decides.

    They may end in any order, because threads have blocks of their own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: State = {}
        self._open: list[State] = []

    def enter(self, change: State) -> State:
        """Applies a change to the state; the result is what `leave` wants."""
        with self._lock:
            before = _control.control("tune.set", change)
            if not self._open:
                self._before = before
            state = {**before, **change}
            self._open.append(state)
            return state

    def leave(self, state: State) -> None:
        """Ends a block, and applies what is in force without it."""
        with self._lock:
            # By identity: another thread's block may be equal to this one.
            self._open = [other for other in self._open if other is not state]
            _control.control("tune.set", self._open[-1] if self._open else self._before)


_blocks = _Blocks()


@contextmanager
def mode(
    name: Mode, *, budget_ms: float | None = None, total_ms: float | None = None
) -> Iterator[None]:
    """Decides, inside a `with` block, how tunables are chosen.

    Args:
        name: "off": defaults only. "lookup", which a process starts with unless TORCHKILN_TUNE says
            something else: what was recorded for the problem or one near it, else the default;
            never measures. "tune": what nothing was recorded for is measured at its launch.
        budget_ms: in mode "tune", milliseconds of GPU time for each kernel and problem; None: as
            outside the block, at first TORCHKILN_TUNE_BUDGET_MS or 300.
        total_ms: of GPU time for all tuning of the process; None: as outside, at first
            TORCHKILN_TUNE_TOTAL_MS or 60,000.

    The mode is one of the process: all threads see it. Blocks may be nested; the one that was
    opened last decides, and what was before comes back when the last one ends, after an exception
    as well. Kernels that are warm are looked up anew when the mode changes.

    Raises:
        ValueError: another mode, or a time that is negative or not finite.

    Example:
        >>> import torch, torchkiln
        >>> with torchkiln.tuning.mode("off"):
        ...     torchkiln.ops.box_iou(torch.ones(2, 4), torch.ones(3, 4)).shape
        torch.Size([2, 3])
    """
    if name not in ("off", "lookup", "tune"):
        raise ValueError(f"tuning.mode: name must be 'off', 'lookup' or 'tune'; got {name!r}")
    times = {"budget_ms": budget_ms, "total_ms": total_ms}
    given = {key: value for key, value in times.items() if value is not None}
    for key, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"tuning.mode: {key} must be a number of at least 0; got {value}")
    state = _blocks.enter({"mode": name, **given})
    try:
        yield
    finally:
        _blocks.leave(state)


@contextmanager
def autotune(budget_ms: float = 300, total_ms: float | None = None) -> Iterator[None]:
    """Tunes every CUDA kernel that is launched in the block, before its launch.

        with torchkiln.autotune():
            loss = model(batch).sum()
            loss.backward()

    At the first launch of a kernel on a problem of a new size, the points of its search space are
    compiled and measured against the default; a point that is faster by more than the noise, and
    gives the same result, is recorded and used from then on, in this process and in later ones.
    What is recorded already is not measured again. Launches outside of such blocks never measure.

    Args:
        budget_ms: milliseconds of GPU time for each kernel and problem. When they are spent, the
            best point so far is used, and the next block goes on with those that are missing.
        total_ms: of GPU time for all tuning of the process; None: as before, at first
            TORCHKILN_TUNE_TOTAL_MS or 60,000.

    Your data is not touched: buffers that a kernel writes are cloned, which takes memory. The
    launch synchronises with the device. Ctrl-C ends the measuring and keeps what is known.

    The mode belongs to the process: kernels that other threads launch meanwhile are tuned, too, and
    disturb each other's measurements. Tune with one thread, while nothing else uses the GPU. See
    `mode` for nesting. In a distributed job call `sync` afterwards: every rank must run the same
    choice where a result depends on its order of sums.

    Raises:
        CaptureError: from a launch that would have to be tuned while its stream is captured into a
            CUDA graph. Run the function once before capturing it.
        ValueError: a time that is negative or not finite.

    Example:
        >>> import torch, torchkiln
        >>> with torchkiln.autotune(budget_ms=100):
        ...     torchkiln.ops.box_iou(torch.ones(2, 4), torch.ones(3, 4)).shape
        torch.Size([2, 3])
    """
    with mode("tune", budget_ms=budget_ms, total_ms=total_ms):
        yield


# --- results ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tuned:
    """How the tuning of one kernel for one problem went.

    Args:
        kernel: the choice, such as "detection/nms.merge<float, classes=true, lanes=8, ...>".
        statics: what decides which program it is, such as {"scalar": "float"}.
        sizes: of the problem.
        default: tunables of the default.
        best: tunables that were chosen.
        default_us: microseconds of the default; 0 when nothing was measured.
        best_us: of the choice, from pairs of measurements with the default.
        gain: 0.2 when the choice takes 20 % less time than the default; 0 where the default stays.
        noise: of the gain, one standard error.
        points: how many the search space has for this problem.
        measured: how many of them were measured now.
        reused: how many were measured earlier.
        failed: points that cannot be chosen, each with its reason.
        gpu_ms: time that the GPU worked for it.
        wall_ms: time of the launch, compiling included.
        stopped: "budget" or "interrupted" when points are missing, a sentence when nothing could be
            measured, else empty.
        verified: whether the results of the choice were compared with those of the default.
    """

    kernel: str
    statics: Mapping[str, str]
    sizes: Mapping[str, int]
    default: Mapping[str, int]
    best: Mapping[str, int]
    default_us: float
    best_us: float
    gain: float
    noise: float
    points: int
    measured: int
    reused: int
    failed: tuple[Mapping[str, Any], ...]
    gpu_ms: float
    wall_ms: float
    stopped: str
    verified: bool


_FIELDS = tuple(field.name for field in dataclasses.fields(Tuned))


def report(since: int = 0) -> list[Tuned]:
    """What this process has tuned, in the order of tuning; nothing for what was known already.

    Args:
        since: leaves out as many of the first ones; the length of an earlier report.

    Example:
        >>> import torchkiln
        >>> [row.kernel for row in torchkiln.tuning.report() if row.gain > 0.1]
        []
    """
    rows = _control.control("tune.report", {"since": since})["tuned"]
    return [
        Tuned(**{name: row[name] for name in _FIELDS} | {"failed": tuple(row["failed"])})
        for row in rows
    ]


# --- ranks --------------------------------------------------------------------------------------


def sync(group: ProcessGroup | None = None) -> str:
    """Gives the records of a group's first rank to all of its ranks, and proves that they agree.

    From then on every rank uses exactly these records, whatever lies in its cache folder; they are
    added to the folder, too. Operators never communicate by themselves: call this at one point of
    the program on every rank of the group, usually after the first rank has tuned.

        if rank == 0:
            with torchkiln.autotune():
                step(batch)
        torchkiln.tuning.sync()

    Args:
        group: of `torch.distributed`, any backend; None for all ranks. With NCCL each rank must
            have chosen its device (`torch.cuda.set_device`).

    Returns:
        The digest of the records: the same on every rank.

    Raises:
        RuntimeError: on every rank of the group when a rank fails or ends up with other records;
            names these ranks. Also when `torch.distributed` has no process group.
        ValueError: when this rank is not in the group.

    Note:
        Each call is one broadcast and one all-gather, on every rank, whatever its cache holds and
        whatever fails in between: no rank waits for one that has gone another way.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "tuning.sync: torch.distributed must have a process group; got none. Call "
            "torch.distributed.init_process_group on every rank first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"tuning.sync: group must contain this rank; got rank {dist.get_rank()} outside of it. "
            "Call it on the ranks of the group only"
        )
    # JSON text and not objects: nothing but a string is unpickled.
    sent: list[str | None] = [json.dumps(_attempt("records.export", {})) if rank == 0 else None]
    dist.broadcast_object_list(sent, group=group, group_src=0)
    first = json.loads(sent[0] or "")
    if "error" in first:
        own = {"digest": ""}
    else:
        own = _attempt("records.import", {"records": first["records"]})
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, json.dumps(own), group=group)
    _compare(first, [json.loads(text) for text in everyone])
    return str(first["digest"])


def _attempt(command: str, request: dict[str, Any]) -> dict[str, Any]:
    """The reply, or the error in its place: a rank that fails goes on to the next collective."""
    try:
        reply: dict[str, Any] = _control.control(command, request)
    except Exception as error:
        return {"error": f"{error}"}
    return reply


def _compare(first: dict[str, Any], everyone: list[dict[str, Any]]) -> None:
    """Raises the same error on every rank, unless all have the records of the first one."""
    if "error" in first:
        raise RuntimeError(
            f"tuning.sync: rank 0 of the group cannot give its records: {first['error']}"
        )
    failed = {rank: own["error"] for rank, own in enumerate(everyone) if "error" in own}
    if failed:
        ranks = "; ".join(f"rank {rank}: {error}" for rank, error in failed.items())
        raise RuntimeError(f"tuning.sync: records cannot be taken over by {ranks}")
    different = [rank for rank, own in enumerate(everyone) if own["digest"] != first["digest"]]
    if different:
        ranks = ", ".join(map(str, different))
        raise RuntimeError(
            f"tuning.sync: every rank must have the records of rank 0 (digest {first['digest']}); "
            f"got others on {'ranks' if len(different) > 1 else 'rank'} {ranks}. Are all of them "
            "of the same version of torchkiln?"
        )
