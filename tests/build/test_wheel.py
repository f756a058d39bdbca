"""The wheel: small, and enough on a machine without a compiler."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 3_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree; it uses the build folder of the set-up, so that little is compiled."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    # The processes of a parallel run share the build folder and must take turns.
    lock_path = tmp_path_factory.getbasetemp().parent / "wheel.lock"
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (path,) = out.glob("torchkiln-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; torch and the rest are borrowed from this one."""
    env = tmp_path_factory.mktemp("fresh") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = str(env / "bin" / "python")
    options = ["--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", *options], check=True
    )
    # Folders that a .pth file names come after the environment's own, and their .pth files are not
    # read: the editable install of this environment stays out.
    borrowed = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site,) = (env / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return env


def run(environment: Path, cache: Path, *command: str) -> str:
    """Runs a program of the environment with nothing else on the PATH, outside the source tree."""
    variables = {
        "PATH": str(environment / "bin"),
        "HOME": str(cache),
        "TORCHKILN_CACHE_DIR": str(cache / "kernels"),
    }
    result = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        cwd=cache,
        env={**{k: v for k, v in os.environ.items() if k == "LANG"}, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= MAX_BYTES


def test_cpp_users_find_headers_and_the_cmake_package(environment: Path, tmp_path: Path) -> None:
    folder = Path(run(environment, tmp_path, "torchkiln", "--cmake-dir").strip())
    assert folder.is_relative_to(environment)
    assert (folder / "torchkilnConfig.cmake").is_file()
    headers = {path.name for path in (folder.parent / "include" / "torchkiln").iterdir()}
    assert headers == {"torchkiln.h", "torchkiln.hpp", "autograd.hpp"}
    # Nothing in it may name a folder of the machine that built it.
    for file in folder.iterdir():
        assert str(ROOT) not in file.read_text()


def test_operator_runs_without_a_compiler(environment: Path, tmp_path: Path) -> None:
    program = """
import shutil, sys, torch, torchkiln
assert not any(shutil.which(c) for c in ("c++", "g++", "gcc", "cc", "nvcc"))
assert torchkiln.__file__.startswith(sys.prefix), torchkiln.__file__
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
print(torchkiln.ops.box_iou(boxes, boxes)[0, 1].item() * 7)
"""
    assert float(run(environment, tmp_path, "python", "-c", program)) == pytest.approx(1.0)


def test_warm_compiles_without_a_compiler_or_gpu(environment: Path, tmp_path: Path) -> None:
    # An operator with few variants.
    command = ("torchkiln", "warm", "--ops", "min_area_polygons", "--arch", "sm_90", "--json")
    for status in ("compiled", "hit"):
        kernels = json.loads(run(environment, tmp_path, *command))["kernels"]
        assert kernels
        assert {kernel["status"] for kernel in kernels} == {status}
        assert all(kernel["arch"] == "sm_90" for kernel in kernels)
