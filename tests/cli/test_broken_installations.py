"""doctor, as users run it, on installations that were broken on purpose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.machine import Machine
from torchkiln_cli import _native

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parent
PYTHON = FOLDER.parents[1] / "python"
VERSION = _native.version()


@dataclasses.dataclass
class Examination:
    """What doctor said: its findings by name, and how it ended."""

    done: subprocess.CompletedProcess[str]
    findings: dict[str, dict[str, str]]

    def expect(self, name: str, status: str, fact: str, fix: str = "") -> None:
        """One finding, and the exit code that belongs to all of them."""
        finding = self.findings.get(name)
        assert finding is not None, sorted(self.findings)
        assert finding["status"] == status, finding
        assert fact in finding["fact"], finding
        assert fix in finding["fix"], finding
        assert bool(finding["fix"]) == (status != "ok"), finding
        failed = any(f["status"] == "fail" for f in self.findings.values())
        assert self.done.returncode == int(failed)
        assert "Traceback" not in self.done.stderr


def examine(
    cache: Path, *, python: Path | None = None, cwd: Path | None = None, setup: str = "", **env: str
) -> Examination:
    """Runs the doctor, where `setup` is given in a mount namespace that it prepares as root."""
    command = [str(python or sys.executable), "-m", "torchkiln_cli.main", "doctor", "--json"]
    if setup:
        command = in_namespace(setup, command)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TORCHKILN_")}
    variables |= {"TORCHKILN_CACHE_DIR": str(cache), **env}
    if python is not None:  # a copy of the package is meant, not the one that PYTHONPATH names
        variables.pop("PYTHONPATH", None)
    done = subprocess.run(
        command,
        cwd=cwd or cache.parent,
        env={name: value for name, value in variables.items() if value},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout, done.stderr
    return Examination(done, {f["name"]: f for f in json.loads(done.stdout)["findings"]})


def in_namespace(setup: str, command: list[str]) -> list[str]:
    for options in ("-m", "-Urm"):
        unshare = ["unshare", options]
        if (
            shutil.which("unshare")
            and not subprocess.run([*unshare, "true"], check=False).returncode
        ):
            return [*unshare, "sh", "-ec", f"{setup}\nexec {shlex.join(command)}"]
    pytest.skip("unshare is not permitted here")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


# --- the compiler ---------------------------------------------------------------------------------


def nvrtc() -> Path:
    return Path(_native.control("nvrtc", load=True)["path"])


def borrow(source: Path, target: Path) -> None:
    """The same file under another name, without copying 100 MB where that can be had."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def builtins() -> Path:
    (path,) = nvrtc().parent.glob("libnvrtc-builtins.so.*")
    return path


def test_no_nvrtc(cache: Path) -> None:
    result = examine(cache, TORCHKILN_NVRTC_PATH=str(cache / "none"))
    result.expect("NVRTC", "fail", str(cache / "none"), "pip install 'torchkiln[compiler]'")
    result.expect("torch", "ok", "2.")
    result.expect("cache, heal", "ok", "replaced")


def test_an_nvrtc_that_is_not_a_library(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "libnvrtc.so.13"
    file.write_bytes(b"\x7fELF, and then nothing")
    result = examine(cache, TORCHKILN_NVRTC_PATH=str(file))
    result.expect("NVRTC", "fail", "could not be loaded", "TORCHKILN_NVRTC_PATH")


def test_two_nvrtcs(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for file in (nvrtc(), builtins()):
        borrow(file, other / file.name)
    result = examine(cache, LD_LIBRARY_PATH=str(other))
    result.expect("other copies of NVRTC", "ok", str(other / nvrtc().name))
    result.expect("NVRTC", "ok", str(nvrtc()))
    result.expect("compile", "ok", "box_iou")


@pytest.mark.parametrize("name", ["libnvrtc-builtins.so.11.0", None])
def test_builtins_of_another_version_or_none(cache: Path, tmp_path: Path, name: str | None) -> None:
    folder = tmp_path / "nvrtc"
    borrow(nvrtc(), folder / nvrtc().name)
    if name is not None:
        borrow(builtins(), folder / name)
    result = examine(cache, TORCHKILN_NVRTC_PATH=str(folder))
    result.expect("NVRTC's builtins", "fail", name or "none beside", "Reinstall nvidia-cuda-nvrtc")


# --- the driver -----------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    """Compiles a fake libcuda.so.1; returns the variables that put it in front of a real one."""
    compiler = next((c for c in ("cc", "gcc", "c++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")

    def make(*options: str, folder: str = "driver") -> dict[str, str]:
        where = tmp_path / folder
        where.mkdir()
        source, library = str(FOLDER / "fake_driver.c"), str(where / "libcuda.so.1")
        command = [compiler, "-x", "c", "-shared", "-fPIC", *options, source, "-o", library]
        subprocess.run(command, check=True)
        return {"LD_LIBRARY_PATH": str(where)}

    return make


def test_no_driver(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").touch()
    result = examine(cache, LD_LIBRARY_PATH=str(tmp_path))
    finding = result.findings["driver"]
    if finding["status"] == "ok":
        pytest.skip("the loader finds the NVIDIA driver of this machine past LD_LIBRARY_PATH")
    assert finding["status"] in ("warn", "fail")  # fail where a kernel module tells of a GPU
    assert "libcuda.so.1 could not be loaded" in finding["fact"]
    assert "install the NVIDIA driver" in finding["fix"]
    result.expect("compile", "ok", "sm_90")


def test_stubs_instead_of_a_driver(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "libcuda.so.1").touch()
    result = examine(cache, LD_LIBRARY_PATH=str(tmp_path / "stubs"))
    assert "out of LD_LIBRARY_PATH" in result.findings["driver"]["fix"]


def test_a_driver_of_before_cuda_12(cache: Path, driver: Any) -> None:
    result = examine(cache, **driver("-DANCIENT"))
    assert "must support CUDA 12.0 or newer" in result.findings["driver"]["fact"]


def test_a_driver_older_than_the_compiler(cache: Path, driver: Any) -> None:
    result = examine(cache, **driver(), FAKE_CUDA_VERSION="12040")
    result.expect("driver", "warn", "knows CUDA 12.4", "Update the driver")
    result.expect("GPU 0", "ok", "Fake GPU, sm_90, runs exact machine code (sm_90)")


def test_a_gpu_that_the_compiler_does_not_know(cache: Path, driver: Any) -> None:
    result = examine(cache, **driver(), FAKE_CUDA_ARCH="129", FAKE_CUDA_VERSION="14000")
    result.expect("GPU 0", "warn", "machine code of the same major", "newer nvidia-cuda-nvrtc")


def test_a_gpu_that_is_too_old_and_may_not_be_used(cache: Path, driver: Any) -> None:
    result = examine(cache, **driver(), FAKE_CUDA_ARCH="61", FAKE_CUDA_COMPUTE_MODE="2")
    result.expect("GPU 0", "fail", "the kernel needs sm_75 or later")
    result.expect("GPU 0, compute mode", "fail", "prohibited", "nvidia-smi -c DEFAULT")


# --- the cache ------------------------------------------------------------------------------------


def test_a_folder_of_somebody_else(cache: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    cache.mkdir(mode=0o700)
    os.chown(cache, 12345, 12345)
    result = examine(cache)
    result.expect("cache", "fail", "belongs to another user", "TORCHKILN_CACHE_DIR")


def test_a_folder_that_others_can_change(cache: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    result = examine(cache)
    result.expect("cache", "fail", "writable by other users", "TORCHKILN_CACHE_DIR")


def test_a_symbolic_link(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    cache.symlink_to(tmp_path / "real")
    examine(cache).expect("cache", "fail", "is a symbolic link")


def test_a_relative_folder(cache: Path) -> None:
    result = examine(cache, TORCHKILN_CACHE_DIR="kernels")
    result.expect("cache", "fail", "relative to the working directory")
    assert not (cache.parent / "kernels").exists()


@pytest.mark.parametrize(
    ("options", "filler", "fact"),
    [
        ("ro", "", "Read-only file system"),
        (
            "size=64k",
            'head -c 1000000 /dev/zero > "$C/filler" 2>/dev/null || true',
            "No space left",
        ),
        ("nr_inodes=3", 'touch "$C/a" "$C/b" "$C/c" 2>/dev/null || true', "No space left"),
    ],
    ids=["read_only", "disk_full", "inodes_full"],
)
def test_a_disk_that_takes_nothing(cache: Path, options: str, filler: str, fact: str) -> None:
    cache.mkdir(mode=0o700)
    mount = f'C={shlex.quote(str(cache))}\nmount -t tmpfs -o mode=0700,{options} none "$C"\n'
    result = examine(cache, setup=mount + filler)
    result.expect("cache, file operations", "fail", fact, "TORCHKILN_CACHE_DIR")
    result.expect("compile", "ok", "box_iou")


def test_no_home(cache: Path) -> None:
    # Both: some systems make up the entry of root when the file has none.
    setup = "for f in /etc/passwd /etc/nsswitch.conf; do mount --bind /dev/null $f; done"
    nowhere = {"TORCHKILN_CACHE_DIR": "", "HOME": "", "XDG_CACHE_HOME": ""}
    result = examine(cache, setup=setup, **nowhere)
    result.expect("cache, root", "fail", "this user has no home directory", "TORCHKILN_CACHE_DIR")
    result.expect("compile", "ok", "box_iou")


def test_a_damaged_bundle(cache: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "app.bundle"
    command = [sys.executable, "-m", "torchkiln_cli.main", "bundle", "create", "--out", str(bundle)]
    command += ["--ops", "box_iou", "--dtypes", "float32", "--arch", "sm_90"]
    environment = {**os.environ, "TORCHKILN_CACHE_DIR": str(cache)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    result = examine(cache, TORCHKILN_BUNDLES=str(bundle))
    result.expect("bundle", "ok", "kernels for sm_90")
    content = bytearray(bundle.read_bytes())
    content[-100] ^= 1
    bundle.write_bytes(content)
    result = examine(cache, TORCHKILN_BUNDLES=str(bundle))
    result.expect("bundle", "fail", str(bundle), "torchkiln bundle create")


# --- the package ----------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> tuple[Path, Path]:
    """Python of a fresh environment with a copy of the package that may be broken; its folder."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    for name in ("torchkiln", "torchkiln_cli"):
        shutil.copytree(PYTHON / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = _native.package_folder()
    for library in (*built.glob("libtorchkiln*.so"), *built.glob("_control*.so")):
        shutil.copy(library, site / "torchkiln")
    # Folders of a .pth file come last, and their own .pth files are not read.
    borrowed = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return environment / "bin" / "python", site


def pretend(site: Path, package: str, version: str) -> None:
    folder = site / f"{package}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    )


def test_the_operator_library_is_missing(cache: Path, copy: tuple[Path, Path]) -> None:
    python, site = copy
    (site / "torchkiln" / f"libtorchkiln_ops-{VERSION}.so").unlink()
    result = examine(cache, python=python)
    result.expect("operator library", "fail", "is missing in", "Reinstall torchkiln")
    result.expect("operators", "fail", "libtorchkiln_ops")
    result.expect("cache, publish", "ok", "linked")


def test_libraries_of_two_versions(cache: Path, copy: tuple[Path, Path]) -> None:
    python, site = copy
    library = site / "torchkiln" / f"libtorchkiln_ops-{VERSION}.so"
    library.rename(library.with_name("libtorchkiln_ops-0.0.9.so"))
    pretend(site, "torchkiln", "9.9.9")
    result = examine(cache, python=python)
    result.expect("operator library", "fail", "there is libtorchkiln_ops-0.0.9.so", "Reinstall")
    fact = f"the package is 9.9.9 and its engine library {VERSION}"
    result.expect("torchkiln's parts", "fail", fact, "Reinstall")


def test_the_engine_is_missing(cache: Path, copy: tuple[Path, Path]) -> None:
    python, site = copy
    (site / "torchkiln" / f"libtorchkiln-{VERSION}.so").unlink()
    result = examine(cache, python=python)
    result.expect("library", "fail", "cannot be loaded")
    result.expect("torch", "ok", "2.")


def test_torch_is_too_old_and_broken(cache: Path, copy: tuple[Path, Path]) -> None:
    python, site = copy
    pretend(site, "torch", "2.9.1")
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so is missing')\n")
    result = examine(cache, python=python)
    result.expect("torch", "fail", "torchkiln needs 2.10 or later", "pip install --upgrade")
    result.expect("operators", "fail", "libtorch_cpu.so is missing")
    result.expect("NVRTC", "ok", "libnvrtc")


# --- tuning records -------------------------------------------------------------------------------


def test_tuning_records_of_another_compiler_and_gpu(cache: Path, tmp_path: Path) -> None:
    Machine(tmp_path).statistics("float32", "float16", TORCHKILN_TUNE="tune")
    (file,) = cache.rglob("*.jsonl")
    head, first, second = file.read_text().splitlines()
    record = json.loads(first)
    record["environment"] |= {"compiler": "11.0", "driver": 9000}
    file.write_text("\n".join([head, json.dumps(record), second[:-1], ""]))
    result = examine(cache)
    result.expect("tuning records", "ok", "1 in 1 files")
    result.expect(
        "tuning records of GPU kind 1", "warn", "Fake GPU, sm_90: 1 of 1 templates, of no "
    )
    result.expect("tuning records of GPU kind 1", "warn", "; 1 measured with compiler 11.0, now 1")
    result.expect(f"tuning records, {file}", "warn", "1 lines cannot be read", "Remove the file")


def test_every_program_is_told_to_measure(cache: Path) -> None:
    result = examine(cache, TORCHKILN_TUNE="tune")
    result.expect("tuning mode", "warn", "TORCHKILN_TUNE=tune", "torchkiln tune")


# --- the surroundings -----------------------------------------------------------------------------


def test_a_python_file_in_the_way(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = 'mine'\n")
    result = examine(cache, cwd=tmp_path)
    result.expect("working directory", "fail", str(tmp_path / "torch.py"), "Rename it")
    result.expect("operators", "fail", "")


def test_headers_in_the_way_do_no_harm(cache: Path, tmp_path: Path) -> None:
    for name in ("detection/box_iou.cuh", "detection/box_iou.h", "common/types.h", "stdint.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("#error taken from the working directory\n")
    result = examine(cache, cwd=tmp_path, CPATH=str(tmp_path))
    result.expect("compile", "ok", "sm_90")
    result.expect("working directory with traps", "ok", "not included")


def test_misspelt_and_wrong_variables(cache: Path) -> None:
    result = examine(cache, TORCHKILN_NVRTCPATH="x")
    result.expect("environment", "warn", "TORCHKILN_NVRTCPATH is not", "TORCHKILN_NVRTC_PATH?")
    result = examine(cache, TORCHKILN_COMPILE_JOBS="many")
    result.expect("environment", "warn", "must be a whole number; got many", "Correct or unset it")


def test_the_report_can_be_pasted(cache: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-m", "torchkiln_cli.main", "doctor", "--report"],
        env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": "", "TORCHKILN_CACHE_DIR": ""},
        cwd=cache.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("```\n")
    assert done.stdout.endswith("```\n")
    assert "~/.cache/torchkiln" in done.stdout
    assert str(home) not in done.stdout
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", done.stdout)
