"""Every NVRTC from 12.6 on compiles every kernel, and what it makes serves a process with another.

Run with `pytest -m network tests/compile`: it downloads about a gigabyte.
`TORCHKILN_NVRTC_REPORT=<file>` writes the table.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow]

VERSIONS = ["12.6", "12.8", "12.9", "13.0", "13.1", "13.2", "13.5"]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]

# Brings each kernel entry's float32 default into the cache and prints how that went. With a second
# argument the compiler is not asked what it knows.
WARM = """
import json, sys
from torchkiln_cli import _native, warm
asked = sys.argv[1].split(",")
known = warm.known_architectures() if len(sys.argv) == 2 else asked
architectures = [arch for arch in asked if arch in known]
_native.load_operators()
entries = {}
for s in _native.control("expand", dtypes=["float32"])["specializations"]:
    entries.setdefault((s["path"], s["entry"]), s)
outcome = warm.compile_work([(s, arch) for s in entries.values() for arch in architectures])
rows = [vars(row) for row in outcome.rows]
version = _native.control("nvrtc", load=True)["version"] if len(sys.argv) == 2 else ""
print(json.dumps({"rows": rows, "version": version, "statistics": _native.control("statistics")}))
"""


def install(version, folder):
    """Downloads one NVRTC and returns the folder of its library."""
    package = "nvidia-cuda-nvrtc-cu12" if version.startswith("12.") else "nvidia-cuda-nvrtc"
    target = folder / version
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(target)]
    requirement = f"{package}=={version}.*"
    subprocess.run([sys.executable, "-m", "pip", "install", *options, requirement], check=True)
    (library,) = target.glob("nvidia/*/lib/libnvrtc.so.*")
    return library.parent


def warm(library, cache, *arguments, policy="any"):
    """One process with this NVRTC and this cache folder."""
    environment = {
        **os.environ,
        "TORCHKILN_NVRTC_PATH": str(library),
        "TORCHKILN_CACHE_DIR": str(cache),
        "TORCHKILN_COMPILER_POLICY": policy,
    }
    done = subprocess.run(
        [sys.executable, "-c", WARM, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvrtc")
    return {version: install(version, folder) for version in VERSIONS}


@pytest.fixture(scope="module")
def replies(libraries, tmp_path_factory):
    """What each version made, in a cache folder of its own."""
    folder = tmp_path_factory.mktemp("caches")
    asked = ",".join(ARCHITECTURES)
    replies = {v: warm(path, folder / v, asked) for v, path in libraries.items()}
    for version, reply in replies.items():
        reply["cache"] = folder / version
    if report := os.environ.get("TORCHKILN_NVRTC_REPORT"):
        Path(report).write_text(markdown(replies))
    return replies


def markdown(replies):
    lines = [
        "# NVRTC versions",
        "",
        "Written by `tests/compile/test_nvrtc_versions.py`. Each version compiles every kernel's",
        "float32 default in a process and a cache of its own. The objects of each version were",
        "found by a process with the next one, which did not open its compiler; with",
        "`TORCHKILN_COMPILER_POLICY=exact`, tried on 12.6 and 13.5, they were not. 12.6 does not",
        "know sm_100.",
        "",
        "| NVRTC | architectures | kernels | compiled | failed | median ms |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for version, reply in replies.items():
        rows = reply["rows"]
        architectures = ", ".join(dict.fromkeys(row["arch"] for row in rows))
        compiled = [row["compile_milliseconds"] for row in rows if row["status"] == "compiled"]
        failed = sum(row["status"] == "failed" for row in rows)
        lines.append(
            f"| {version} | {architectures} | {len(rows)} | {len(compiled)} | {failed} | "
            f"{statistics.median(compiled):.0f} |"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("version", VERSIONS)
def test_version_compiles_every_operator(version, replies):
    reply = replies[version]
    assert reply["version"] == version
    assert [row["error"] for row in reply["rows"] if row["status"] == "failed"] == []
    assert {row["status"] for row in reply["rows"]} == {"compiled"}
    assert {"sm_80", "sm_90"} <= {row["arch"] for row in reply["rows"]}
    assert all(row["registers"] > 0 and row["bytes"] > 1000 for row in reply["rows"])


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_serve_a_process_with_another_version(version, replies, libraries):
    other = VERSIONS[(VERSIONS.index(version) + 1) % len(VERSIONS)]
    architectures = ",".join(dict.fromkeys(row["arch"] for row in replies[version]["rows"]))
    reply = warm(libraries[other], replies[version]["cache"], architectures, "found")
    assert {row["status"] for row in reply["rows"]} == {"hit"}
    assert len(reply["rows"]) == len(replies[version]["rows"])
    assert reply["statistics"]["nvrtc_opened"] == 0


@pytest.mark.parametrize("version", ["12.6", "13.5"])
def test_policy_exact_asks_for_the_same_version(version, replies, libraries):
    cache = replies[version]["cache"]
    same = warm(libraries[version], cache, "sm_90", "found", policy="exact")
    assert {row["status"] for row in same["rows"]} == {"hit"}
    other = warm(libraries["13.0"], cache, "sm_90", "found", policy="exact")
    assert {row["status"] for row in other["rows"]} == {"compiled"}
