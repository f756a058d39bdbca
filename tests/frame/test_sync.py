"""tuning.sync on four real gloo processes: whatever happens on one, all of them end, and agree."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import torchkiln
from support import sync_rank
from support.machine import CLEAN, Machine
from support.sync_rank import records_of

WORLD = 4
Results = list[dict[str, Any]]
EVERY_RANK = ["broadcast_object_list", "all_gather_object"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a cache folder for each rank; 0 and 2 have tuned different kernels, on a fake GPU."""
    folder = tmp_path_factory.mktemp("sync")
    for rank, best, dtypes in ((0, "128", ["float32"]), (2, "512", ["float32", "float16"])):
        cache = {"TORCHKILN_CACHE_DIR": str(folder / f"cache{rank}"), "FAKE_BEST_BLOCK": best}
        done = Machine(folder, cache).statistics(*dtypes, TORCHKILN_TUNE="tune")
        assert done["tunings"] == len(dtypes)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Results:
    """What every rank reports, by scenario."""
    program = str(Path(sync_rank.__file__))
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(WORLD), str(folder / "rendezvous")],
            env={**CLEAN, "TORCHKILN_CACHE_DIR": str(folder / f"cache{rank}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def of(ranks: Results, scenario: str) -> Results:
    return [rank[scenario] for rank in ranks]


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("different", records_of(0)),
        ("only rank 0 is warm", records_of(0)),
        ("only rank 0 is cold", []),
        ("after all of that", records_of(0)),
    ],
)
def test_every_rank_ends_up_with_the_records_of_rank_0(
    ranks: Results, scenario: str, expected: list[Any]
) -> None:
    results = of(ranks, scenario)
    assert [result["records"] for result in results] == [expected] * WORLD
    assert len({result["digest"] for result in results}) == 1


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [
        (
            "rank 0 cannot export",
            "tuning.sync: rank 0 of the group cannot give its records: records.export is on fire",
        ),
        (
            "ranks 0 and 2 cannot import",
            "tuning.sync: records cannot be taken over by rank 0: records.import is on fire; "
            "rank 2: records.import is on fire",
        ),
        ("ranks 1 and 3 differ", "got others on ranks 1, 3. "),
        ("rank 3 differs", "got others on rank 3. "),
    ],
)
def test_what_is_wrong_on_a_rank_is_raised_on_all(
    ranks: Results, scenario: str, sentence: str
) -> None:
    errors = [result["error"] for result in of(ranks, scenario)]
    assert len(set(errors)) == 1
    assert errors[0].startswith("RuntimeError: tuning.sync: ")
    assert sentence in errors[0]


def test_a_group_has_a_first_rank_of_its_own(ranks: Results) -> None:
    results = of(ranks, "group of 1 and 3")
    assert results[1]["digest"] == results[3]["digest"]
    assert results[1]["records"] == results[3]["records"] == records_of(1)
    for outsider in (0, 2):
        assert results[outsider]["records"] == records_of(outsider)
        sentence = "ValueError: tuning.sync: group must contain this rank; got rank "
        assert results[outsider]["error"].startswith(f"{sentence}{outsider} outside of it")
        assert results[outsider]["collectives"] == []


def test_every_rank_takes_part_in_the_same_collectives(ranks: Results) -> None:
    for scenario in set(ranks[0]) - {"group of 1 and 3"}:
        collectives = [result["collectives"] for result in of(ranks, scenario)]
        assert collectives == [EVERY_RANK] * WORLD, scenario


def test_the_real_engine(ranks: Results, folder: Path) -> None:
    results = of(ranks, "the real engine")
    assert [len(result["before"]) for result in results] == [1, 0, 2, 0]
    records = results[0]["before"]
    assert [row["record"]["best"]["block_size"] for row in records] == [128]
    assert {row["record"]["best"]["block_size"] for row in results[2]["before"]} == {512}
    assert [result["records"] for result in results] == [records] * WORLD
    assert len({result["digest"] for result in results}) == 1
    # The folders have them for later processes, and what was there stays.
    lines = [
        sum(len(file.read_text().splitlines()) - 1 for file in cache.rglob("*.jsonl"))
        for cache in (folder / f"cache{rank}" for rank in range(WORLD))
    ]
    assert lines == [1, 1, 2, 1]


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"must have a process group; got none\. Call "):
        torchkiln.tuning.sync()
