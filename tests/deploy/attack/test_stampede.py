"""Many processes of the torch-free core on one cache."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from support import attack


def compiles(work) -> int:
    return (work / "compiles").stat().st_size


def test_sixty_four_processes_compile_one_key_once(work, record_property):
    command = attack.worker("get", root=work / "root", work=work, wait=1, compile_ms=200)
    result = attack.run_together([command] * 64, work)
    assert {(r["code"], r["wrong"]) for r in result["replies"]} == {(0, 0)}
    assert compiles(work) == 1
    record_property(
        "summary",
        f"one key, 64 processes: 200 ms of compile, {result['milliseconds']:.0f} ms in all",
    )


def test_sixteen_processes_compile_two_hundred_keys_once_each(work, record_property):
    commands = [
        attack.worker(
            "get", root=work / "root", work=work, wait=1, keys=200, seed=seed, compile_ms=1
        )
        for seed in range(16)
    ]
    result = attack.run_together(commands, work)
    assert {(r["code"], r["wrong"]) for r in result["replies"]} == {(0, 0)}
    assert compiles(work) == 200
    assert attack.litter(work / "root") == []
    assert list(attack.strangers(work / "root")) == []
    record_property("summary", f"200 keys, 16 processes: {result['milliseconds']:.0f} ms")


def test_without_locks_everybody_still_gets_the_right_kernel(work):
    (work / "runtime").mkdir(mode=0o700)
    # A file in the place of the folder that holds the locks.
    (work / "runtime" / "torchkiln").write_text("")
    commands = [
        attack.worker("get", root=work / "root", work=work, wait=1, keys=20, seed=seed)
        for seed in range(8)
    ]
    result = attack.run_together(commands, work)
    assert {(r["code"], r["wrong"]) for r in result["replies"]} == {(0, 0)}
    assert (
        attack.run(attack.worker("check", root=work / "root", work=work, keys=20), work)["hits"]
        == 20
    )
