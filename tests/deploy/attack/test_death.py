"""kill -9 at each system call: afterwards there is a sound object or none, and litter goes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from support import attack

pytestmark = pytest.mark.skipif(
    bool(attack.why_no_strace()), reason=attack.why_no_strace() or "strace works"
)
KEYS = 2


def publish(work: Path, keys: int = KEYS) -> None:
    assert attack.run(attack.worker("publish", root=work / "root", keys=keys), work)["code"] == 0


def hits(work: Path) -> int:
    """Returns how many of the keys are there; none may be damaged."""
    found = attack.run(attack.worker("find", root=work / "root", keys=KEYS), work)
    assert found["code"] == 0, found
    return found["hits"]


def assert_heals(work: Path) -> None:
    """What the dead left goes with the first publish an hour later; nothing else is odd."""
    attack.make_old(work / "root", hours=2)
    publish(work, keys=KEYS + 1)
    assert attack.litter(work / "root") == []
    assert list(attack.strangers(work / "root")) == []
    assert hits(work) == KEYS


def test_death_while_publishing(record_property):
    seen = set()

    def check(work: Path) -> None:
        seen.add(hits(work))
        assert_heals(work)

    command = attack.worker("publish", root="{work}/root", keys=KEYS, bytes=100_000)
    points = attack.kill_at_each_call(command, lambda work: None, check)
    assert seen == set(range(KEYS + 1)), "no death came between two publishes"
    record_property("summary", f"publish: killed at {points} system calls")


def test_death_while_evicting(record_property):
    seen = set()

    def prepare(work: Path) -> None:
        publish(work)
        attack.make_old(work / "root", hours=2)

    def check(work: Path) -> None:
        seen.add(hits(work))
        assert_heals(work)

    command = attack.worker("evict", root="{work}/root", limit=1)
    points = attack.kill_at_each_call(command, prepare, check)
    assert {0, KEYS} <= seen
    record_property("summary", f"evict: killed at {points} system calls")


@pytest.mark.exhaustive
def test_death_of_the_whole_core(record_property):
    """With threads, locks and the fake compiler: look-up, lock, compile, publish."""

    def check(work: Path) -> None:
        command = attack.worker("check", root=work / "root", work=work, keys=KEYS)
        found = attack.run(command, work)
        assert found["code"] == 0, found
        assert found["wrong"] == 0
        # The dead hold no lock: whoever comes next compiles at once.
        again = attack.worker("get", root=work / "root", work=work, keys=KEYS)
        reply = attack.run(again, work)
        assert (reply["code"], reply["wrong"], reply["warnings"]) == (0, 0, [])
        assert reply["compiles"] == KEYS - found["hits"]

    command = attack.worker("get", root="{work}/root", work="{work}", keys=KEYS)
    points = attack.kill_at_each_call(command, lambda work: None, check)
    record_property("summary", f"get: killed at {points} system calls")
