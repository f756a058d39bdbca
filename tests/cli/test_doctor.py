"""doctor on broken installations: the right finding, its fix, and the other checks still run."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from torchkiln_cli import _native, doctor
from torchkiln_cli.doctor import _cache, _gpu, _trials

HEALTHY: dict[str, Any] = {
    "compiles": [
        {"name": "sm_90", "error": None, "specialization": "box_iou", "milliseconds": 60.0}
    ],
    "nvrtc": {"error": None, "path": "/lib/libnvrtc.so.13", "version": "13.5"},
    "surroundings": [{"name": "forked child", "error": None, "fact": "finds stored kernels"}],
    "gpus": [{"name": "cuda:0 (GPU X)", "error": None}],
    "torchvision": {"name": "torchvision", "error": None, "version": "0.28.0", "healthy": True},
}


@pytest.fixture
def probe(monkeypatch):
    """The facts that the process of its own would bring."""
    facts = copy.deepcopy(HEALTHY)
    monkeypatch.setattr(_trials, "probe", lambda: facts)
    return facts


@pytest.fixture
def findings(engine, probe, tmp_path):
    library = tmp_path / "libnvrtc.so.13"
    for path in (library, tmp_path / "libnvrtc-builtins.so.13.5"):
        path.touch()
    engine.replies["nvrtc"]["path"] = probe["nvrtc"]["path"] = str(library)

    def examine():
        result = {}
        for finding in doctor.examine():
            assert finding.name not in result
            result[finding.name] = finding
        return result

    return examine


def test_a_sound_installation(findings):
    found = findings()
    assert {name for name, finding in found.items() if finding.status == "fail"} == set()
    assert found["NVRTC"].fact.startswith("13.5 (/")
    assert found["GPU 0"].fact == "GPU X, sm_90, runs exact machine code (sm_90) by NVRTC 13.5"
    assert found["compile"].fact == "box_iou for sm_90: 60 ms at most (sm_90)"
    assert found["forked child"].fact == "finds stored kernels"
    assert found["run on cuda:0 (GPU X)"].status == "ok"


def test_nvrtc_is_missing(findings, engine):
    error = engine.error("no NVRTC was found", kind=5)

    def nvrtc(request):
        if request["load"]:
            raise error
        return {"candidates": []}

    engine.replies["nvrtc"] = nvrtc
    found = findings()
    assert found["NVRTC"].status == "fail"
    assert "torchkiln[compiler]" in found["NVRTC"].fix
    assert found["driver"].status == "ok"
    assert found["cache"].status == "ok"


@pytest.mark.parametrize(("module", "status"), [(None, "warn"), ("580.65.06", "fail")])
def test_driver_is_missing(findings, engine, monkeypatch, module, status):
    monkeypatch.setattr(_gpu, "_kernel_module", lambda: module)
    engine.replies["driver"] = engine.error("libcuda.so.1 could not be loaded", kind=6)
    found = findings()
    assert found["driver"].status == status
    assert "install the NVIDIA driver" in found["driver"].fix
    assert found["NVRTC"].status == "ok"


def test_driver_is_older_than_nvrtc(findings, engine):
    engine.replies["driver"]["version"] = 12080
    found = findings()
    assert found["driver"].status == "warn"
    assert "older than NVRTC 13.5" in found["driver"].fact


def test_gpu_is_unknown_to_nvrtc(findings, engine):
    engine.replies["driver"]["devices"] = [{"name": "GPU Y", "major": 12, "minor": 1}]
    rung = {"target": "sm_120", "reason": "machine code of the same major (sm_120)"}
    engine.replies["ladder"] = {"rungs": [rung], "explanation": "the whole ladder"}
    found = findings()["GPU 0"]
    assert found.status == "warn"
    assert found.fact == "GPU Y, sm_121, runs machine code of the same major (sm_120)"
    engine.replies["ladder"]["rungs"] = []
    found = findings()["GPU 0"]
    assert found.status == "fail"
    assert "the whole ladder" in found.fact


def test_gpu_may_not_be_used(findings, engine):
    engine.replies["driver"]["devices"][0]["compute_mode"] = "prohibited"
    found = findings()["GPU 0, compute mode"]
    assert found.status == "fail"
    assert found.fix == "sudo nvidia-smi -c DEFAULT"
    engine.replies["driver"]["devices"][0]["compute_mode"] = "exclusive process"
    assert findings()["GPU 0, compute mode"].status == "warn"


def test_gpu_settings_come_from_nvidia_smi(findings, engine, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase $1 in *persistence*) echo Disabled;; *) echo Enabled;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    (tmp_path / "control").touch()
    found = findings()["GPU settings"]
    assert found.status == "warn"
    for fact in ("CUDA_MODULE_LOADING EAGER", "MPS on", "MIG enabled", "persistence off"):
        assert fact in found.fact


def test_builtins_are_missing_or_of_another_version(findings, tmp_path):
    right = tmp_path / "libnvrtc-builtins.so.13.5"
    right.rename(tmp_path / "libnvrtc-builtins.so.13.0")
    found = findings()["NVRTC's builtins"]
    assert found.status == "fail"
    assert "libnvrtc-builtins.so.13.0 beside" in found.fact
    assert "which is 13.5" in found.fact
    (tmp_path / "libnvrtc-builtins.so.13.0").unlink()
    assert findings()["NVRTC's builtins"].fact.startswith("none beside")


def test_another_nvrtc_wins_beside_torch(findings, probe):
    probe["nvrtc"] = {"error": None, "path": "/torch/libnvrtc.so.12", "version": "12.8"}
    found = findings()["NVRTC beside torch"]
    assert found.status == "warn"
    assert found.fact == "/torch/libnvrtc.so.12 (12.8) wins once torch is loaded"


def test_cache_is_not_writable(findings, engine):
    engine.replies["cache.stat"] |= {"writable": False, "state": "read-only file system"}
    engine.replies["selftest.store"] = {
        "checks": [{"name": "root", "ok": False, "fact": "read-only file system"}]
    }
    found = findings()
    assert found["cache"].status == "fail"
    assert "TORCHKILN_CACHE_DIR" in found["cache"].fix
    assert found["cache, root"].status == "fail"
    assert found["NVRTC"].status == "ok"


def test_cache_folder_is_open_to_others(findings, engine, tmp_path):
    tmp_path.chmod(0o777)
    engine.replies["selftest.store"] = {
        "checks": [{"name": "root", "ok": True, "fact": str(tmp_path)}]
    }
    found = findings()["cache folder"]
    assert found.status == "fail"
    assert "mode 0777" in found.fact
    tmp_path.chmod(stat.S_IRWXU)
    assert findings()["cache folder"].status == "ok"


def test_what_was_damaged_is_counted(findings, engine, tmp_path):
    (tmp_path / "v1" / "quarantine").mkdir(parents=True)
    (tmp_path / "v1" / "quarantine" / "object").touch()
    engine.replies["selftest.store"] = {
        "checks": [{"name": "root", "ok": True, "fact": str(tmp_path)}]
    }
    assert findings()["cache quarantine"].fact.startswith("1 objects were damaged")


@pytest.mark.parametrize(
    ("kind", "status"), [("nfs4", "warn"), ("fuse.sshfs", "warn"), ("xfs", "ok")]
)
def test_file_system_of_the_cache(monkeypatch, kind, status):
    monkeypatch.setattr(_cache, "_kind_of", lambda path: kind)
    assert _cache._file_system(Path("/x")).status == status


def test_bundles_are_proved(findings, engine):
    engine.replies["settings"]["values"]["jit"] = "forbid"
    assert findings()["bundles"].status == "warn"
    proof = {
        "path": "/b",
        "objects": 2,
        "bytes": 4096,
        "architectures": ["sm_80", "sm_90"],
        "compilers": ["nvrtc-12.9"],
        "missing": [],
        "problems": [],
    }
    engine.replies["bundles"] = {"bundles": [{"path": "/b"}], "refused": []}
    engine.replies["bundle.verify"] = proof
    found = findings()
    assert found["bundle"].fact == "/b: 2 kernels for sm_80, sm_90, 4.0 KiB, by nvrtc-12.9"
    assert "bundles" not in found
    proof["missing"] = [{"specialization": "nms.mask<float>", "arch": "sm_80"}]
    assert "such as nms.mask<float>@sm_80" in findings()["bundle"].fact
    proof["problems"] = [{"object": "object 1", "why": "its digest is wrong"}]
    assert findings()["bundle"].status == "fail"
    engine.replies["bundles"] = {"bundles": [], "refused": [{"path": "/b", "why": "too short"}]}
    assert findings()["bundle"].fact == "/b: too short"


def test_a_file_that_python_would_import_instead(findings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "working directory" not in findings()
    (tmp_path / "torch.py").touch()
    found = findings()["working directory"]
    assert found.status == "fail"
    assert str(tmp_path / "torch.py") in found.fact


def test_two_copies_of_torchkiln(findings, tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name / "torchkiln").mkdir(parents=True)
        (tmp_path / name / "torchkiln" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path / name)
    assert findings()["copies of torchkiln"].status == "fail"


def test_cache_command_fails(findings, engine):
    engine.replies["cache.stat"] = engine.error("no cache here")
    found = findings()
    assert found["cache"].status == "fail"
    assert found["cache"].fact == "no cache here"


def test_torch_is_missing(findings, monkeypatch, probe):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    probe.clear()
    probe["error"] = "No module named 'torch'"
    found = findings()
    assert found["torch"].fix == "pip install 'torch>=2.10'"
    assert found["operators"].status == "fail"


def test_torch_is_too_old(findings, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cu130")
    assert findings()["torch"].status == "fail"


def test_a_slow_compile_is_worth_a_line(findings, probe):
    probe["compiles"][0] |= {"milliseconds": 9000.0}
    assert findings()["compile"].status == "warn"


def test_compile_and_launch_fail(findings, probe):
    probe["compiles"] = [{"name": "sm_90", "error": "NVRTC refused"}]
    probe["surroundings"] = [{"name": "small stack", "error": "it crashed"}]
    probe["gpus"] = [{"name": "cuda:0 (GPU X)", "error": "results differ"}]
    found = findings()
    assert found["compile for sm_90"].status == "fail"
    assert found["small stack"].fact == "it crashed"
    assert found["run on cuda:0 (GPU X)"].status == "fail"


def test_torchvision_cannot_load_its_library(findings, probe):
    probe["torchvision"] = {**HEALTHY["torchvision"], "healthy": False}
    found = findings()["torchvision"]
    assert found.status == "warn"
    assert "install()" in found.fix


def test_a_misspelt_variable_gets_the_nearest_name(findings, engine):
    engine.replies["settings"]["unknown"] = ["TORCHKILN_CACHEDIR"]
    found = findings()["environment"]
    assert found.fact == "TORCHKILN_CACHEDIR is not a setting of torchkiln"
    assert found.fix == "Did you mean TORCHKILN_CACHE_DIR?"


def test_engine_is_missing(monkeypatch, invoke, probe):
    def control(command, **request):
        raise _native.EngineMissingError("torchkiln's compiled module is not installed")

    monkeypatch.setattr(_native, "control", control)
    monkeypatch.setattr(_native, "version", lambda: control("version"))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "fail  library: torchkiln's compiled module is not installed" in result.stdout
    assert "torch: 2." in result.stdout


def test_a_probe_that_crashes_becomes_a_finding(engine, monkeypatch):
    _trials.probe.cache_clear()
    done = subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(_trials.subprocess, "run", lambda *args, **kwargs: done)
    (finding,) = _trials._compile()
    _trials.probe.cache_clear()
    assert finding.status == "fail"
    assert "code -11" in finding.fact


def test_report_names_neither_host_nor_home(engine, invoke, probe):
    home = Path.home()
    engine.replies["selftest.store"] = {
        "checks": [{"name": "lock", "ok": True, "fact": f"{home}/x on {socket.gethostname()}"}]
    }
    result = invoke("doctor", "--report")
    assert "~/x on <host>" in result.stdout
    assert str(home) not in result.stdout.replace("~", "")
    assert result.stdout.startswith("```\n")


def test_json(findings, invoke):
    result = invoke("doctor", "--json")
    found = json.loads(result.stdout)["findings"]
    assert set(found[0]) == {"name", "status", "fact", "fix"}
    assert result.exit_code == 0


def test_real_installation(run, tmp_path):
    result = run("doctor", "--json", TORCHKILN_CACH_DIR="x")
    found = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.returncode == 0, found
    assert found["environment"]["fix"] == "Did you mean TORCHKILN_CACHE_DIR?"
    assert found["cache, heal"]["status"] == "ok"
    assert found["cache folder"]["fact"].startswith(os.path.realpath(tmp_path))
    assert "sm_90" in found["compile"]["fact"]
    for name in ("small stack", "working directory with traps", "forked child"):
        assert found[name]["status"] == "ok", found[name]


def test_real_installation_without_nvrtc(run, tmp_path):
    missing = tmp_path / "none"
    result = run("doctor", "--json", TORCHKILN_NVRTC_PATH=str(missing))
    found = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.returncode == 1
    assert found["NVRTC"]["status"] == "fail"
    assert str(missing) in found["NVRTC"]["fact"]
    assert found["cache, publish"]["status"] == "ok"
    assert found["torch"]["status"] == "ok"


def test_real_installation_with_an_unusable_cache(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    result = run("doctor", "--json", TORCHKILN_CACHE_DIR=str(file))
    found = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.returncode == 1
    assert found["cache"]["status"] == "fail"
    assert found["torchkiln"]["status"] == "ok"


H200 = {"name": "NVIDIA H200", "architecture": 90, "multiprocessors": 132}
RECORDS = {"file": "h200/detection.nms", "device": H200, "records": 3, "unreadable": 0, "stale": []}


def test_tuning_records_are_counted_by_kind_of_gpu(findings, engine):
    a10 = {"name": "NVIDIA A10", "architecture": 86, "multiprocessors": 72}
    other = {**RECORDS, "file": "h200/detection.roi_pool", "records": 4}
    away = {**RECORDS, "file": "a10/detection.nms", "device": a10, "records": 5}
    engine.replies["records.examine"] |= {"files": [RECORDS, other, away], "devices": [H200]}
    found = findings()
    assert found["tuning records"].fact == "12 in 3 files"
    here = found["tuning records of GPU kind 1"]
    assert (here.status, here.fact) == ("ok", "NVIDIA H200, sm_90: 7 of 2 templates")
    fact = "NVIDIA A10, sm_86: 5 of 1 templates, of no GPU of this machine"
    assert found["tuning records of GPU kind 2"].fact == fact


def test_tuning_records_may_be_stale(findings, engine):
    stale = [{"field": "compiler", "recorded": "13.0", "now": "13.5", "records": 2}]
    engine.replies["records.examine"] |= {"files": [{**RECORDS, "stale": stale}]}
    found = findings()["tuning records of GPU kind 1"]
    assert found.status == "warn"
    assert found.fact.endswith("; 2 measured with compiler 13.0, now 13.5")
    assert "torchkiln tune measures them again" in found.fix


def test_tuning_records_may_be_unreadable(findings, engine):
    nobodys = {**RECORDS, "file": "x/y", "device": None, "records": 0}
    half = {**RECORDS, "unreadable": 2}
    engine.replies["records.examine"] |= {"files": [nobodys, half]}
    found = findings()
    expected = "x/y: it names no device, and is not used"
    assert found["tuning records, x/y"].fact == expected
    expected = "h200/detection.nms: 2 lines cannot be read, and are not used"
    assert found["tuning records, h200/detection.nms"].fact == expected
    assert "tuning records of GPU kind 1" in found


def test_tuning_records_cannot_be_written(findings, engine):
    changes = {"writable": False, "state": "read-only file system"}
    engine.replies["records.examine"] |= changes
    found = findings()["tuning records"]
    assert found.status == "warn"
    assert found.fact == "0 in 0 files; no more can be kept: read-only file system"


def test_every_program_measures(findings, engine):
    engine.replies["settings"]["values"]["tune"] = "tune"
    assert "Unset it" in findings()["tuning mode"].fix
