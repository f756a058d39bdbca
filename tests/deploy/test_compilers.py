"""Bundles of NVRTC 12.9 and 13.0 serve programs with another one, or none; both fit into one file.

Run with `pytest -m network tests/deploy`: it downloads 200 MB.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.machine import Machine

pytestmark = [pytest.mark.network, pytest.mark.slow]

PACKAGES = {"12.9": "nvidia-cuda-nvrtc-cu12==12.9.*", "13.0": "nvidia-cuda-nvrtc==13.0.*"}
KERNELS = [
    "detection/box_iou.forward<float, mode=0, vector=1, block_size=256>",
    "detection/nms.suppress<float, classes=false, panel=64, block_size=256>",
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the compilers."""
    found = {}
    for version, package in PACKAGES.items():
        target = tmp_path_factory.mktemp("nvrtc")
        options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(target)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, package], check=True)
        (library,) = target.glob("nvidia/*/lib/libnvrtc.so.*")
        found[version] = str(library.parent)
    return found


@pytest.fixture(scope="module")
def bundles(libraries: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same manifest, compiled by each; they share a cache folder, which must not matter."""
    machine = Machine(tmp_path_factory.mktemp("bundles"))
    (machine.folder / "app.json").write_text(json.dumps({"format": 1, "kernels": KERNELS}))
    paths = {}
    for version, library in libraries.items():
        paths[version] = machine.folder / f"{version}.bundle"
        arguments = ("--out", str(paths[version]), "--manifest", "app.json", "--arch", "sm_90")
        machine.json("bundle", "create", *arguments, TORCHKILN_NVRTC_PATH=library)
    return paths


def compilers(machine: Machine, bundle: Path) -> set[str]:
    listed = machine.json("bundle", "list", str(bundle))["objects"]
    return {row["compiler"].split("-")[1] for row in listed}


@pytest.mark.parametrize("version", PACKAGES)
@pytest.mark.parametrize("local", [*PACKAGES, "none"])
def test_a_bundle_serves_whatever_compiler_is_there(machine, bundles, libraries, version, local):
    assert compilers(machine, bundles[version]) == {version}
    reply = machine.statistics(
        "float32",
        TORCHKILN_BUNDLES=str(bundles[version]),
        TORCHKILN_JIT="forbid",
        TORCHKILN_NVRTC_PATH=libraries.get(local, "/nowhere"),
    )
    assert reply["hits_bundle"] == 1
    assert reply["nvrtc_opened"] == 0


def test_both_fit_into_one_file_and_each_finds_its_own(machine, bundles, libraries):
    merged = machine.folder / "both.bundle"
    inputs = [str(path) for path in bundles.values()]
    assert machine.json("bundle", "merge", "--out", str(merged), *inputs)["bundle"]["objects"] == 4
    assert compilers(machine, merged) == set(PACKAGES)
    assert machine.json("bundle", "verify", str(merged))["ok"]
    for library in libraries.values():
        reply = machine.statistics(
            "float32",
            TORCHKILN_BUNDLES=str(merged),
            TORCHKILN_JIT="forbid",
            TORCHKILN_NVRTC_PATH=library,
            TORCHKILN_COMPILER_POLICY="exact",
        )
        assert reply["hits_bundle"] == 1
    failed = machine.program(
        "float32",
        TORCHKILN_BUNDLES=str(bundles["13.0"]),
        TORCHKILN_JIT="forbid",
        TORCHKILN_NVRTC_PATH=libraries["12.9"],
        TORCHKILN_COMPILER_POLICY="exact",
    )
    assert failed.returncode == 1
