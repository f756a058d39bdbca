"""The cache folder: what it is, what it holds, and whether what the store does works there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from torchkiln_cli import _native, _output
from torchkiln_cli.doctor._finding import Finding, judge

_LOW_SPACE = 256 * 2**20
_LOW_INODES = 1000
_ELSEWHERE = "Set TORCHKILN_CACHE_DIR to a folder on a local disk"
# Shared between machines, or gone with the container: right, but worth knowing.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "gpfs", "ceph", "afs")
_FLEETING = ("tmpfs", "ramfs", "overlay")


def _cache() -> Iterator[Finding]:
    reply = _native.control("cache.stat")
    entries = f"{reply['entries']} kernels, {_output.size_text(reply['bytes'])}"
    if reply.get("writable", True):
        yield Finding("cache", "ok", entries)
    else:
        fix = "Set TORCHKILN_CACHE_DIR to a folder of your own; until then kernels live in memory"
        yield Finding("cache", "fail", f"{reply['state']}; {entries}", fix)
    checks = _native.control("selftest.store")["checks"]
    root = next((Path(c["fact"]) for c in checks if c["name"] == "root" and c["ok"]), None)
    if root is not None and root.is_dir():
        yield from _folder(root)
    for check in checks:
        yield judge(f"cache, {check['name']}", check["ok"], check["fact"], _ELSEWHERE)


def _folder(root: Path) -> Iterator[Finding]:
    status = root.stat()
    mode = stat.S_IMODE(status.st_mode)
    owner = "yours" if status.st_uid == os.getuid() else f"owned by user {status.st_uid}"
    private = status.st_uid == os.getuid() and not mode & 0o022
    fix = f"chown it to yourself and run: chmod 700 {root}"
    yield judge("cache folder", private, f"{root}, {owner}, mode {mode:04o}", fix)
    yield _file_system(root)
    yield from _space(root)
    damaged = sum(1 for _ in root.glob("v*/quarantine/*"))
    if damaged:
        fact = f"{damaged} objects were damaged and set aside; they were compiled again"
        fix = "If the number grows, check the disk; torchkiln cache clear removes them"
        yield Finding("cache quarantine", "warn", fact, fix)


def _file_system(root: Path) -> Finding:
    kind = _kind_of(root)
    if kind in _NETWORK or kind.startswith("fuse"):
        fact = f"{kind}: correct, but look-ups cost a round trip"
        return Finding("cache file system", "warn", fact, _ELSEWHERE)
    if kind in _FLEETING:
        fact = f"{kind}: what is compiled may be gone after a restart"
        return Finding("cache file system", "ok", fact)
    return Finding("cache file system", "ok", kind)


def _kind_of(path: Path) -> str:
    """Type of the file system that holds a path: the longest mount point above it."""
    best, kind = "", "unknown file system"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind


def _space(root: Path) -> Iterator[Finding]:
    facts = os.statvfs(root)
    free = facts.f_bavail * facts.f_frsize
    fact = f"{_output.size_text(free)} free"
    fix = "Free some space, or set TORCHKILN_CACHE_DIR to another disk"
    yield judge("cache space", free >= _LOW_SPACE, fact, fix, bad="warn")
    # Some file systems make inodes as they go and report none.
    if facts.f_files and facts.f_favail < _LOW_INODES:
        fact = f"{facts.f_favail} inodes free"
        yield Finding("cache inodes", "warn", fact, "Remove files, or use another disk")


CHECKS = (_cache,)
