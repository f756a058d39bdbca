"""Record, warm, bundle, forbid: whole processes, a real NVRTC, a fake GPU.

On a machine with a GPU the operators of torch run in place of the C++ program, too.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.machine import CLEAN, ROOT, Machine

KERNEL = "detection/box_iou.forward<{}, mode=0, vector=1, block_size=256>"
FLOAT, HALF, DOUBLE = (KERNEL.format(name) for name in ("float", "half", "double"))
# A runtime machine: nothing may be written, no home, no compiler, nothing may be compiled.
RUNTIME = {
    "TORCHKILN_JIT": "forbid",
    "TORCHKILN_CACHE_DIR": "/proc/nowhere",
    "TORCHKILN_NVRTC_PATH": "/nowhere",
    "HOME": "/nowhere",
}


def kernels(manifest: Path) -> list[str]:
    return json.loads(manifest.read_text())["kernels"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a machine has after recording and bundling: app.json, app.bundle and its cache."""
    machine = Machine(tmp_path_factory.mktemp("prepared"))
    machine.statistics("float32", "float16", TORCHKILN_RECORD=str(machine.folder / "app.json"))
    arguments = ("--out", "app.bundle", "--manifest", "app.json", "--arch", "sm_80,sm_90")
    machine.json("bundle", "create", *arguments)
    return machine.folder


@pytest.fixture
def recorded(machine: Machine, prepared: Path) -> Path:
    """What the program uses, recorded on a machine that may compile."""
    shutil.copytree(prepared, machine.folder, dirs_exist_ok=True)
    return machine.folder / "app.json"


# ---- record --------------------------------------------------------------------------------------


def test_a_cpp_program_is_recorded(recorded):
    assert kernels(recorded) == [FLOAT, HALF]
    assert recorded.read_text().endswith("\n  ]\n}\n")


def test_record_command_adds_and_passes_the_exit_code_on(machine, recorded):
    command = ["record", "--out", "app.json", "--json", "--"]
    program = Path(machine.program().args[0])
    done = machine.torchkiln(*command, str(program), "float64")
    assert done.returncode == 0
    assert json.loads(done.stdout)["kernels"] == [DOUBLE, FLOAT, HALF]
    done = machine.torchkiln("record", "--out", "n.json", "--", "bash", "-c", "exit 7")
    assert done.returncode == 7
    assert "launched no CUDA kernel" in done.stderr
    assert not (machine.folder / "n.json").exists()
    done = machine.torchkiln("record", "--", "bash", "-c", "kill -9 $$")
    assert done.returncode == 128 + 9
    assert machine.torchkiln("record", "--", "/nowhere/x").returncode == 1


def test_processes_share_a_manifest_and_one_dies(machine):
    manifest = machine.folder / "app.json"
    program = machine.program().args[0]
    script = f"""
        for i in 1 2 3; do {program} float32 & {program} float16 & {program} float64 & done
        wait
    """
    machine.run("bash", "-c", script, TORCHKILN_RECORD=str(manifest))
    assert kernels(manifest) == [DOUBLE, FLOAT, HALF]
    assert sorted(p.name for p in machine.folder.iterdir()) == ["app.json", "cache"]


def test_the_context_manager_needs_no_gpu_to_be_used(machine):
    program = """
import torchkiln
with torchkiln.record("app.json"):
    torchkiln.ops.box_iou(*[torchkiln.ops.box_iou.__globals__["torch"].rand(3, 4)] * 2)
torchkiln.seal()
torchkiln.seal("allow")
try:
    torchkiln.seal("never")
except ValueError as error:
    print(error)
"""
    done = machine.run(sys.executable, "-c", program)
    assert done.stdout == "seal: mode must be forbid, warn or allow; got 'never'\n", done.stderr
    assert not (machine.folder / "app.json").exists()


# ---- warm ----------------------------------------------------------------------------------------


def test_warm_takes_a_manifest_and_resumes(machine, recorded):
    arguments = ("warm", "--manifest", "app.json", "--arch", "sm_86,sm_90", "--jobs", "2")
    reply = machine.json(*arguments)
    assert reply["complete"]
    status = {(k["specialization"], k["arch"]): k["status"] for k in reply["kernels"]}
    assert status == {
        (FLOAT, "sm_86"): "compiled",
        (HALF, "sm_86"): "compiled",
        (FLOAT, "sm_90"): "hit",  # the program compiled it
        (HALF, "sm_90"): "hit",
    }
    assert {k["status"] for k in machine.json(*arguments)["kernels"]} == {"hit"}


def test_warm_tells_what_it_does_not_know(machine, recorded):
    manifest = {"format": 1, "kernels": [FLOAT, "detection/box_iou.sideways<float>"]}
    recorded.write_text(json.dumps(manifest))
    reply = machine.json("warm", "--manifest", "app.json", "--arch", "sm_90", code=1)
    assert not reply["complete"]
    assert [k["status"] for k in reply["kernels"]] == ["hit", "unknown"]
    assert "no operator launches" in reply["kernels"][1]["error"]
    recorded.write_text("{")
    done = machine.torchkiln("warm", "--manifest", "app.json", "--arch", "sm_90")
    assert done.returncode == 2
    assert "manifest must be a JSON file" in done.stderr
    assert "Traceback" not in done.stderr


# ---- bundle --------------------------------------------------------------------------------------


@pytest.fixture
def bundle(machine: Machine, recorded: Path) -> Path:
    return machine.folder / "app.bundle"


def test_a_runtime_with_a_bundle_needs_nothing_else(bundle, other_machine):
    moved = bundle.rename(other_machine.folder / "moved.bundle")
    reply = other_machine.statistics("float32", "float16", **RUNTIME, TORCHKILN_BUNDLES=str(moved))
    assert reply["launches"] == 2
    assert [reply[f"hits_{layer}"] for layer in ("memory", "bundle", "disk")] == [0, 2, 0]
    assert reply["compiles"] == reply["nvrtc_opened"] == reply["generic_variants"] == 0


def test_two_builds_are_the_same_bytes(bundle, other_machine, recorded):
    arguments = ("--manifest", str(recorded), "--arch", "sm_90,sm_80", "--jobs", "1")
    other_machine.json("bundle", "create", "--out", "again.bundle", *arguments)
    assert (other_machine.folder / "again.bundle").read_bytes() == bundle.read_bytes()


def test_verify_list_and_merge(machine, bundle, recorded):
    reply = machine.json("bundle", "verify", "app.bundle", "--manifest", "app.json")
    assert reply["ok"]
    assert reply["objects"] == 4
    assert reply["architectures"] == ["sm_80", "sm_90"]
    reply = machine.json(
        "bundle", "verify", "app.bundle", "--manifest", "app.json", "--arch", "sm_90,sm_120", code=1
    )
    assert [(row["specialization"], row["arch"]) for row in reply["missing"]] == [
        (FLOAT, "sm_120"),
        (HALF, "sm_120"),
    ]
    recorded.write_text(json.dumps({"format": 1, "kernels": [FLOAT, DOUBLE]}))
    done = machine.torchkiln("bundle", "verify", "app.bundle", "--manifest", "app.json")
    assert done.returncode == 1
    assert f"missing: {DOUBLE} for sm_80, sm_90" in done.stderr

    arguments = ("--ops", "box_iou", "--dtypes", "float64", "--arch", "sm_90")
    machine.json("bundle", "create", "--out", "more.bundle", *arguments)
    merged = machine.json(
        "bundle", "merge", "--out", "both.bundle", "app.bundle", "more.bundle", "app.bundle"
    )["bundle"]
    listed = machine.json("bundle", "list", "both.bundle")["objects"]
    assert merged["objects"] == len(listed)
    texts = {(row["specialization"], row["arch"]) for row in listed}
    assert {(FLOAT, "sm_80"), (HALF, "sm_90"), (DOUBLE, "sm_90")} <= texts
    assert all(row["registers"] > 0 and row["bytes"] > 1000 for row in listed)
    assert machine.torchkiln("bundle", "list", "both.bundle").returncode == 0
    assert machine.json("bundle", "verify", "both.bundle", code=1)["missing"]  # float64 for sm_80


def test_damage_is_a_miss_with_one_warning(machine, bundle):
    data = bytearray(bundle.read_bytes())
    for place in range(1000, len(data), 5000):
        data[place] ^= 0xFF
    bundle.write_bytes(data)
    done = machine.program(
        "float32", "float16", TORCHKILN_BUNDLES=str(bundle), TORCHKILN_CACHE_DIR="/proc/nowhere"
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["compiles"] == 2
    assert done.stderr.count(str(bundle)) == 1
    assert machine.json("bundle", "verify", "app.bundle", code=1)["problems"]
    done = machine.torchkiln("bundle", "merge", "--out", "x", "app.bundle")
    assert done.returncode == 1
    assert "must be undamaged" in done.stderr
    done = machine.torchkiln("bundle", "list", "app.json")
    assert done.returncode == 1
    assert "it is no bundle" in done.stderr


def test_nothing_is_written_unless_all_is_there(machine, recorded):
    recorded.write_text(json.dumps({"format": 1, "kernels": [FLOAT, "detection/x.y<float>"]}))
    arguments = ("--out", "app.bundle", "--manifest", "app.json", "--arch", "sm_90")
    (machine.folder / "app.bundle").unlink()
    reply = machine.json("bundle", "create", *arguments, code=1)
    assert reply["bundle"] is None
    assert not (machine.folder / "app.bundle").exists()


def test_a_package_brings_its_bundle_by_entry_point(machine, bundle):
    site = machine.folder / "site-packages"
    (site / "acme").mkdir(parents=True)
    bundle.rename(site / "acme" / "acme.bundle")
    (site / "acme-1.0.dist-info").mkdir()
    points = "[torchkiln.bundles]\nacme = acme\n"
    (site / "acme-1.0.dist-info" / "entry_points.txt").write_text(points)
    program = (
        "import json; from torchkiln_cli import _native; "
        "print(json.dumps(_native.control('bundles')))"
    )
    done = machine.run(sys.executable, "-c", program, PYTHONPATH=str(site))
    (found,) = json.loads(done.stdout)["bundles"]
    assert found["path"] == str(site / "acme" / "acme.bundle")
    assert found["objects"] == 4


# ---- forbid --------------------------------------------------------------------------------------


def test_the_command_of_the_error_mends_the_bundle(machine, bundle):
    runtime = {**RUNTIME, "TORCHKILN_BUNDLES": str(bundle)}
    failed = machine.program("float64", **runtime)
    assert failed.returncode == 1
    details = json.loads(failed.stdout)
    assert details["nearest"] == f"{FLOAT}@sm_90"
    assert details["differences"] == ["scalar is float instead of double"]
    assert f"{DOUBLE}@sm_90 is in no bundle" in failed.stderr
    assert details["command"] in failed.stderr
    # The user's shell has the program's own settings.
    mended = machine.shell(
        details["command"], TORCHKILN_JIT="forbid", TORCHKILN_BUNDLES=str(bundle)
    )
    assert mended.returncode == 0, mended.stderr
    assert machine.statistics("float64", "float32", **runtime)["hits_bundle"] == 2


def test_the_command_of_the_error_warms_the_cache_where_there_is_no_bundle(machine):
    failed = machine.program("float16", TORCHKILN_JIT="forbid")
    assert failed.returncode == 1
    details = json.loads(failed.stdout)
    assert details["command"] == "torchkiln warm --ops box_iou --dtypes float16 --arch sm_90"
    assert details["nearest"] is None
    assert machine.shell(details["command"], TORCHKILN_JIT="forbid").returncode == 0
    assert machine.statistics("float16", TORCHKILN_JIT="forbid")["compiles"] == 0


def test_another_point_of_the_same_program_stands_in(machine):
    # Only the default for few columns is there; the program asks for the other one.
    manifest = machine.folder / "app.json"
    narrow = FLOAT.replace("256", "64")
    manifest.write_text(json.dumps({"format": 1, "kernels": [narrow]}))
    machine.json("bundle", "create", "--out", "b", "--manifest", "app.json", "--arch", "sm_90")
    runtime = {**RUNTIME, "TORCHKILN_BUNDLES": str(machine.folder / "b")}
    reply = machine.statistics("float32", "float32", **runtime)
    assert reply["generic_variants"] == 1
    assert reply["launches"] == 2


def test_warn_compiles_and_says_so(machine):
    done = machine.program("float32", TORCHKILN_JIT="warn")
    assert done.returncode == 0
    assert f"{FLOAT}@sm_90 is compiled although" in done.stderr


def test_a_relative_architecture_serves_where_nothing_can_be_compiled(machine, bundle):
    runtime = {**RUNTIME, "TORCHKILN_BUNDLES": str(bundle)}
    assert machine.statistics("float32", **runtime, FAKE_GPU="86")["hits_bundle"] == 1
    failed = machine.program("float32", **runtime, FAKE_GPU="120")
    assert "the architecture is sm_" in failed.stderr
    assert "instead of sm_120" in failed.stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"TORCHKILN_JIT": "never"}, "TORCHKILN_JIT must be one of allow, warn, forbid; got never"),
        ({"TORCHKILN_BUNDLES": "app.bundle"}, "must hold absolute paths; got app.bundle"),
        ({"TORCHKILN_BUNDLES": "/nowhere/app.bundle"}, "/nowhere/app.bundle cannot be used"),
        ({"TORCHKILN_RECORD": "/proc/app.json"}, "recording into /proc/app.json does not work"),
    ],
)
def test_wrong_settings_cost_one_sentence(machine, variables, sentence):
    done = machine.program("float32", "float32", "float16", **variables)
    assert done.returncode == 0
    assert done.stderr.count(sentence) == 1, done.stderr


# ---- the example ---------------------------------------------------------------------------------


def can_unshare() -> bool:
    option = "-m" if os.geteuid() == 0 else "-Urm"
    return subprocess.run(["unshare", option, "true"], capture_output=True).returncode == 0


def test_the_example_runs_both_stages(machine):
    if not can_unshare():
        pytest.skip("unshare is not permitted here")
    script = ROOT / "examples" / "deployment" / "without_containers.sh"
    environment = {"PYTHON": sys.executable, "ARCHS": "sm_80,sm_90"}
    if not torch.cuda.is_available():
        environment["LD_LIBRARY_PATH"] = ""
    done = machine.run(str(script), str(machine.folder / "work"), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["compiles"] == last["nvrtc_opened"] == last["generic_variants"] == 0
    if torch.cuda.is_available():
        assert last["device"] == "cuda"
        assert last["hits_bundle"] > 0


def test_the_second_stage_has_no_compiler_and_writes_nothing(machine):
    if not can_unshare():
        pytest.skip("unshare is not permitted here")
    script = ROOT / "examples" / "deployment" / "without_containers.sh"
    program = machine.program().args[0]
    inner = (
        f"{sys.executable} -m torchkiln_cli.main warm --ops box_iou --arch sm_90 --dtypes float32;"
        f"{program} float32 || true; touch {machine.folder}/x && echo $((40 + 2));"
        "echo home ${HOME-unset}"
    )
    environment = {"PYTHON": sys.executable, "ARCHS": "sm_90"}
    done = machine.run(
        str(script), str(machine.folder / "work"), "bash", "-c", inner, **environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n42\n" not in done.stdout
    assert not (machine.folder / "x").exists()
    assert "home unset" in done.stdout
    assert "NVRTC" in done.stderr  # warming fails for want of it
    assert "compiling is forbidden" in done.stderr  # box_iou is not in the example's manifest


@pytest.mark.gpu
def test_operators_run_on_the_gpu_from_a_bundle_alone(machine, tmp_path):
    major, minor = torch.cuda.get_device_capability()
    arguments = ("--ops", "nms,batched_nms,roi_align", "--dtypes", "float32")
    machine.json(
        "bundle", "create", "--out", "gpu.bundle", *arguments, "--arch", f"sm_{major}{minor}"
    )
    environment = {**CLEAN, **RUNTIME, "TORCHKILN_BUNDLES": str(machine.folder / "gpu.bundle")}
    del environment["HOME"]
    program = str(ROOT / "examples" / "deployment" / "app.py")
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert reply["device"] == "cuda"
    assert reply["compiles"] == reply["nvrtc_opened"] == reply["missing"] == 0
