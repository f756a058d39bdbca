"""kill -9 at each system call: what is there afterwards is whole, and litter goes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# --- files outside the store: the old one, the new one or none, each whole ------------------------


def run_worker(command: str, work: Path, **arguments: object) -> dict[str, Any]:
    everywhere = {"work": work, "root": work / "root"}
    reply = attack.run(attack.worker(command, **everywhere, **arguments), work)
    assert reply["code"] == 0, reply
    return reply


def kernels_in(bundle: Path, work: Path) -> int | None:
    """Returns how many of the four kernels a bundle serves; it is whole or not there."""
    return run_worker("served", work, file=bundle, keys=4)["hits"] if bundle.exists() else None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Fills a folder with two bundles of two kernels each; b's are stored in the cache too."""
    model = tmp_path_factory.mktemp("prepared")
    model.chmod(0o700)
    (model / "bundles").mkdir()
    run_worker("bundle", model, out=model / "bundles" / "a", first=1, keys=2)
    shutil.rmtree(model / "root")
    run_worker("bundle", model, out=model / "bundles" / "b", first=3, keys=2)
    return lambda work: shutil.copytree(model, work, dirs_exist_ok=True) and None


@pytest.mark.parametrize("out", ["new", "a"])
def test_death_while_merging_bundles(prepared, out, record_property):
    seen = set()

    def check(work: Path) -> None:
        bundles = work / "bundles"
        seen.add(kernels_in(bundles / out, work))
        run_worker("merge", work, out=bundles / out, a=bundles / "a", b=bundles / "b")
        assert kernels_in(bundles / out, work) == 4
        assert {path.name for path in bundles.iterdir()} == {"a", "b", out}

    paths = {
        name: f"{{work}}/bundles/{file}" for name, file in {"out": out, "a": "a", "b": "b"}.items()
    }
    command = attack.worker("merge", root="{work}/root", work="{work}", **paths)
    points = attack.kill_at_each_call(command, prepared, check)
    assert seen == {None if out == "new" else 2, 4}
    record_property("summary", f"bundle merge into {out}: killed at {points} system calls")


@pytest.mark.exhaustive
def test_death_while_creating_a_bundle(prepared, record_property):
    """With the look-ups in the cache, and with an old bundle of other kernels in the place."""
    seen = set()

    def check(work: Path) -> None:
        bundle = work / "bundles" / "a"
        seen.add(run_worker("served", work, file=bundle, keys=2)["hits"])
        assert kernels_in(bundle, work) == 2
        run_worker("bundle", work, out=bundle, first=3, keys=2)
        assert bundle.read_bytes() == (work / "bundles" / "b").read_bytes()
        assert {path.name for path in bundle.parent.iterdir()} == {"a", "b"}

    arguments = {"root": "{work}/root", "work": "{work}", "out": "{work}/bundles/a"}
    command = attack.worker("bundle", **arguments, first=3, keys=2)
    points = attack.kill_at_each_call(command, prepared, check)
    assert seen == {0, 2}
    record_property("summary", f"bundle create: killed at {points} system calls")


@pytest.mark.parametrize("old", [0, 1])
def test_death_while_recording(old, record_property):
    """What was noted before the death is there; the next recorder needs no other help."""
    seen = set()

    def names(work: Path) -> list[str]:
        manifest = work / "bundles" / "app.json"
        return json.loads(manifest.read_text())["kernels"] if manifest.exists() else []

    def prepare(work: Path) -> None:
        (work / "bundles").mkdir()
        if old:
            run_worker("record", work, file=work / "bundles" / "app.json", keys=old)

    def check(work: Path) -> None:
        found = names(work)
        seen.add(len(found))
        assert found == [
            f"demo/scale.forward<float, block_size={i + 1}>" for i in range(len(found))
        ]
        reply = run_worker("record", work, file=work / "bundles" / "app.json", keys=3)
        assert reply["warnings"] == []
        assert len(names(work)) == 3
        assert [path.name for path in (work / "bundles").iterdir()] == ["app.json"]

    command = attack.worker("record", file="{work}/bundles/app.json", keys=3)
    points = attack.kill_at_each_call(command, prepare, check)
    assert seen == set(range(old, 4))
    record_property("summary", f"record onto {old} kernels: killed at {points} system calls")
