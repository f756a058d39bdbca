"""doctor on broken installations: the right finding, its fix, and the other checks still run."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from torchkiln_cli import _native, doctor

HEALTHY = {
    "compiles": [
        {"name": "sm_90", "error": None, "specialization": "box_iou", "milliseconds": 60.0}
    ],
    "gpus": [{"name": "cuda:0 (GPU X)", "error": None}],
    "torchvision": {"name": "torchvision", "error": None, "version": "0.28.0", "healthy": True},
}


@pytest.fixture
def probe(monkeypatch):
    """The facts that the process of its own would bring."""
    facts = dict(HEALTHY)
    monkeypatch.setattr(doctor, "_probe", lambda: facts)
    return facts


@pytest.fixture
def findings(engine, probe):
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
    assert found["NVRTC"].fact.startswith("13.5 (/lib/libnvrtc.so.13")
    assert found["GPU 0"].fact == "GPU X, sm_90"
    assert found["compile for sm_90"].fact == "box_iou: 60 ms"
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


def test_driver_is_missing(findings, engine):
    engine.replies["driver"] = engine.error("libcuda.so.1 could not be loaded", kind=6)
    found = findings()
    assert found["driver"].status == "warn"
    assert "install the NVIDIA driver" in found["driver"].fix
    assert found["NVRTC"].status == "ok"


def test_driver_is_older_than_nvrtc(findings, engine):
    engine.replies["driver"]["version"] = 12080
    found = findings()
    assert found["driver"].status == "warn"
    assert "older than NVRTC 13.5" in found["driver"].fact


def test_gpu_is_unknown_to_nvrtc(findings, engine):
    engine.replies["driver"]["devices"] = [{"name": "GPU Y", "major": 12, "minor": 1}]
    assert "sm_121, which NVRTC 13.5 lacks" in findings()["GPU 0"].fact


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


def test_compile_and_launch_fail(findings, probe):
    probe["compiles"] = [{"name": "sm_90", "error": "NVRTC refused"}]
    probe["gpus"] = [{"name": "cuda:0 (GPU X)", "error": "results differ"}]
    found = findings()
    assert found["compile for sm_90"].status == "fail"
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
    doctor._probe.cache_clear()
    done = subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: done)
    (finding,) = doctor._compile()
    doctor._probe.cache_clear()
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


def test_json(engine, invoke, probe):
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
    assert any(name.startswith("compile for sm_") for name in found)


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
