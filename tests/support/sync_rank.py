"""One rank of tests/frame/test_sync.py: goes through the scenarios and prints what came out.

    python sync_rank.py RANK WORLD RENDEZVOUS_FILE

The engine is replaced by one whose records, failures and digests are planted, except in the last
scenario: there it is the real one, with what lies in the cache folder of this process.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from torchkiln import _control, tuning


class FakeEngine:
    """Records that are only kept in mind, and the failures that a scenario wants of this rank."""

    def __init__(self, records: list[Any], fail: str = "", wrong_digest: bool = False) -> None:
        self.records, self.fail, self.wrong_digest = records, fail, wrong_digest

    def control(self, command: str, request: dict[str, Any]) -> dict[str, Any]:
        if command == self.fail:
            raise RuntimeError(f"{command} is on fire")
        if command == "records.import":
            self.records = request["records"]
        text = json.dumps(self.records) + ("!" if self.wrong_digest else "")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {"records": self.records, "digest": digest, "added": len(self.records)}


class RealEngine:
    """The one of this process."""

    control = staticmethod(_control.control)

    @property
    def records(self) -> list[Any]:
        return self.control("records.export", {})["records"]  # type: ignore[no-any-return]


class Rank:
    """Runs scenarios on this rank, and notes which collectives each one takes part in."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.collectives: list[str] = []
        self.results: dict[str, Any] = {}
        for name in ("broadcast_object_list", "all_gather_object"):
            setattr(dist, name, self._noting(name, getattr(dist, name)))

    def run(
        self,
        name: str,
        engine: FakeEngine | RealEngine,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        tuning._control = engine  # type: ignore[assignment]
        self.collectives.clear()
        result: dict[str, Any] = {}
        try:
            result["digest"] = tuning.sync(group)
        except (RuntimeError, ValueError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
        result |= {"records": engine.records, "collectives": list(self.collectives)}
        self.results[name] = result

    def _noting(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.collectives.append(name)
            return collective(*args, **kwargs)

        return noted


def records_of(rank: int) -> list[Any]:
    """What only this rank has measured; of different lengths."""
    return [{"rank": rank, "trial": i, "µs": 1.5 * i} for i in range(50 * rank + 1)]


def main(number: int, world: int, rendezvous: str) -> None:
    # A dead-lock must end before the test's patience does.
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=number, world_size=world, timeout=timeout
    )
    rank = Rank(number)
    rank.run("different", FakeEngine(records_of(number)))
    rank.run("only rank 0 is warm", FakeEngine(records_of(0) if number == 0 else []))
    rank.run("only rank 0 is cold", FakeEngine([] if number == 0 else records_of(number)))
    fail = "records.export" if number == 0 else ""
    rank.run("rank 0 cannot export", FakeEngine(records_of(number), fail))
    fail = "records.import" if number in (0, 2) else ""
    rank.run("ranks 0 and 2 cannot import", FakeEngine(records_of(number), fail))
    rank.run("ranks 1 and 3 differ", FakeEngine([], wrong_digest=number in (1, 3)))
    rank.run("rank 3 differs", FakeEngine([], wrong_digest=number == 3))
    odd = dist.new_group([1, 3])
    rank.run("group of 1 and 3", FakeEngine(records_of(number)), odd)
    rank.run("after all of that", FakeEngine(records_of(number)))
    before = RealEngine().records
    rank.run("the real engine", RealEngine())
    rank.results["the real engine"]["before"] = before
    sys.stdout.write(json.dumps(rank.results) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
