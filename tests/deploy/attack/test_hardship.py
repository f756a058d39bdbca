"""Broken disks, network file systems, limits and odd folders: kernels come all the same."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support import attack

KEYS = 5
FAULTS = [
    *(f"create:{error}" for error in ("EACCES", "EROFS", "ENOSPC", "EDQUOT", "EMFILE", "EIO")),
    *(f"write:{error}" for error in ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "EINTR")),
    *(f"fsync:{error}" for error in ("EIO", "ENOSPC", "ESTALE")),
    *(f"linkat:{error}" for error in ("EIO", "EXDEV", "ESTALE", "EPERM", "EMLINK", "EROFS")),
    *(f"mkdirat:{error}" for error in ("EROFS", "ENOSPC", "ESTALE", "EMLINK")),
    *(f"openat:{error}" for error in ("EIO", "ESTALE", "EMFILE", "EACCES")),
    *(f"read:{error}" for error in ("EIO", "ESTALE")),
    *(f"renameat:{error}" for error in ("EIO", "EXDEV", "ENOSPC")),
    *(f"unlinkat:{error}" for error in ("EIO", "EACCES", "ESTALE")),
]  # fmt: skip
# A write that is interrupted for ever would be tried for ever, as it should be.
FAULTS.remove("write:EINTR")


def get(work: Path, root: Path | None = None, files: str = "", **options):
    arguments = {"root": root or work / "root", "work": work, "keys": KEYS}
    return attack.run(attack.worker("get", **arguments), work, files, **options)


def assert_all_is_well(work: Path) -> None:
    """Without the hardship: nothing stored is wrong or damaged, and what is missing is made."""
    checked = attack.run(attack.worker("check", root=work / "root", work=work, keys=KEYS), work)
    assert (checked["code"], checked["wrong"], checked["damaged"]) == (0, 0, 0)
    reply = get(work)
    assert (reply["code"], reply["wrong"], reply["warnings"]) == (0, 0, [])
    assert reply["hits"] == checked["hits"]
    assert reply["compiles"] == KEYS - checked["hits"]


def assert_one_sentence(reply) -> None:
    assert (reply["code"], reply["wrong"], reply["damaged"]) == (0, 0, 0), reply
    assert len(reply["warnings"]) <= 2, reply["warnings"]  # reading and writing, once each
    assert len({warning.split("(")[0] for warning in reply["warnings"]}) == len(reply["warnings"])
    for warning in reply["warnings"]:
        assert "TORCHKILN_CACHE_DIR" in warning


@pytest.mark.parametrize("warm", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("fault", FAULTS)
def test_failing_calls_cost_nothing_but_the_cache(work, fault, warm):
    if warm:
        get(work)
    reply = get(work, files=f"root={work / 'root'};fail={fault}")
    assert_one_sentence(reply)
    assert reply["compiles"] + reply["hits"] == KEYS
    is_used = fault.startswith(("openat", "read") if warm else ("create", "write", "fsync"))
    assert bool(reply["warnings"]) or not is_used, "the fault was not met"
    assert_all_is_well(work)


def test_short_reads_and_writes_are_completed(work):
    for expected in ("compiles", "hits"):
        reply = get(work, files=f"root={work / 'root'};short=1")
        assert reply[expected] == KEYS, reply
        assert reply["warnings"] == []
    assert_all_is_well(work)


@pytest.mark.parametrize("seed", range(3))
def test_a_network_folder_that_lags_and_fails_stays_correct(work, seed, record_property):
    files = f"root={work / 'root'};delay_ms=80;stale={23 + seed}"
    commands = [
        attack.worker("get", root=work / "root", work=work, wait=1, keys=40, seed=n, compile_ms=2)
        for n in range(8)
    ]
    replies = attack.run_together(commands, work, files)["replies"]
    assert {(r["code"], r["wrong"], r["damaged"]) for r in replies} == {(0, 0, 0)}
    for reply in replies:
        # One sentence for each kind of error.
        assert len(set(reply["warnings"])) == len(reply["warnings"]) <= 4, reply["warnings"]
    check = attack.run(attack.worker("check", root=work / "root", work=work, keys=40), work)
    assert (check["code"], check["wrong"], check["damaged"]) == (0, 0, 0)
    assert list(attack.strangers(work / "root")) == []
    compiled = (work / "compiles").stat().st_size
    record_property("summary", f"40 kernels, 8 processes, 80 ms of lag: {compiled} compiles")


# --- odd folders ----------------------------------------------------------------------------------


def relative(work: Path) -> Path:
    return Path("relative/root")


def symbolic_link(work: Path) -> Path:
    (work / "elsewhere").mkdir(mode=0o700)
    (work / "link").symlink_to(work / "elsewhere")
    return work / "link"


def group_writable_ancestor(work: Path) -> Path:
    (work / "open").mkdir()
    (work / "open").chmod(0o775)
    return work / "open" / "root"


def file_in_the_way(work: Path) -> Path:
    (work / "file").write_text("")
    return work / "file"


def foreign_owner(work: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a folder away")
    (work / "theirs").mkdir(mode=0o700)
    os.chown(work / "theirs", 54321, 54321)
    return work / "theirs"


def view_of_the_kernel(work: Path) -> Path:
    return Path("/proc/torchkiln/cache")


@pytest.mark.parametrize(
    "make",
    [
        relative,
        symbolic_link,
        group_writable_ancestor,
        file_in_the_way,
        foreign_owner,
        view_of_the_kernel,
    ],
)
def test_folders_that_cannot_be_trusted_mean_memory_only(work, make):
    root = make(work)
    reply = get(work, root=root, cwd=work)
    assert (reply["code"], reply["wrong"], reply["compiles"]) == (0, 0, KEYS)
    assert len(reply["warnings"]) <= 1, reply["warnings"]
    if make is not view_of_the_kernel:
        assert "TORCHKILN_CACHE_DIR" in reply["warnings"][0]
    assert not list(work.rglob("*.kernel"))


def test_without_a_home_kernels_stay_in_memory(work):
    if os.geteuid() != 0:
        pytest.skip("needs root to become a user without a home")
    work.chmod(0o755)
    (work / "compiles").touch()
    (work / "compiles").chmod(0o666)
    os.chown(work, 54321, 54321)
    reply = get(
        work, root=Path("default"), variables={"HOME": "/nonexistent"},
        preexec_fn=lambda: os.setuid(54321),
    )  # fmt: skip
    assert (reply["code"], reply["wrong"], reply["compiles"]) == (0, 0, KEYS), reply
    assert len(reply["warnings"]) == 1
    assert "no home directory" in reply["warnings"][0]


# --- limits ---------------------------------------------------------------------------------------


def limit(kind: int, value: int):
    return lambda: resource.setrlimit(kind, (value, value))


def test_few_file_descriptors(work):
    for descriptors in (4, 5, 6, 8):
        reply = get(work, preexec_fn=limit(resource.RLIMIT_NOFILE, descriptors))
        assert (reply["code"], reply["wrong"]) == (0, 0), (descriptors, reply)
        assert len(reply["warnings"]) <= 2
    assert_all_is_well(work)


def test_a_limit_on_file_sizes_is_a_full_disk(work):
    reply = get(work, preexec_fn=limit(resource.RLIMIT_FSIZE, 3000))
    assert (reply["code"], reply["wrong"], reply["compiles"]) == (0, 0, KEYS)
    assert len(reply["warnings"]) == 1
    assert "File too large" in reply["warnings"][0]
    assert_all_is_well(work)


def test_little_memory_is_one_sentence_or_works(work):
    seen = set()
    for megabytes in (12, 16, 20, 24, 32, 48, 64, 128, 256):
        reply = get(work, preexec_fn=limit(resource.RLIMIT_AS, megabytes << 20))
        assert reply["code"] in {0, 1, 127}, (megabytes, reply)  # 127: the loader found no room
        if reply["code"] == 1:
            assert reply["error"], reply
        seen.add(reply["code"])
    assert 0 in seen
    assert_all_is_well(work)


def test_no_more_threads_is_one_sentence(work):
    if os.geteuid() != 0:
        pytest.skip("needs root to become a user with few processes")
    work.chmod(0o755)
    os.chown(work, 54321, 54321)
    (work / "runtime").mkdir(mode=0o700)

    def become_poor() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        os.setuid(54321)

    reply = get(work, root=Path("relative"), preexec_fn=become_poor)
    assert reply["code"] == 1, reply
    assert "a thread with a stack of 16 MB must start" in reply["error"]
    assert "ulimit -u" in reply["error"]


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends_while_compiling_leaves_nothing_behind(work, how):
    command = attack.worker("get", root=work / "root", work=work, keys=1, compile_ms=60_000)
    process = subprocess.Popen(
        command, env=attack.environment(work), stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (work / "compiles").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(attack.PATIENCE) == -how
    (work / "compiles").unlink()
    # Its lock died with it; its litter, if any, is not in the way.
    assert_all_is_well(work)


def test_a_stopped_compile_does_not_stop_other_keys(work):
    slow = attack.worker("get", root=work / "root", work=work, keys=1, compile_ms=60_000)
    process = subprocess.Popen(slow, env=attack.environment(work), stdout=subprocess.DEVNULL)
    try:
        while not (work / "compiles").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        other = attack.run(attack.worker("publish", root=work / "root", keys=20), work)
        assert other["published"] == 20
    finally:
        process.kill()
        process.wait()
