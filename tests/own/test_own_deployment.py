"""A user's kernels recorded, compiled ahead, bundled and forbidden.

Whole processes, a real NVRTC, a fake GPU.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.machine import ROOT, Machine

KERNELS = '''
import torch
import torchkiln
from torchkiln import testing

SOURCE = """
#include "common/types.h"
#include "acme/parts.h"
namespace acme {
template <class Scalar, int kBlockSize>
__global__ void scale(const Scalar* x, Scalar* out, long long n, float factor) {
  const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
  if (i < n) torchkiln::store(out[i], PART(torchkiln::load(x[i])) * factor);
}
}
"""
scale = torchkiln.Kernel(
    SOURCE,
    "acme::scale",
    template={"Scalar": [torch.float32, torch.float16]},
    tunables={"block_size": [128, 256]},
    args={"x": "in Scalar", "out": "out Scalar", "n": "size i64", "factor": "float"},
    grid=lambda p: torchkiln.ceil_div(p.n, p.block_size),
    default={"block_size": 256},
    headers={"acme/parts.h": "#define PART(x) x\\n"},
    name="acme_scale",
)


def plain(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


def on_cuda(x: torch.Tensor, factor: float) -> torch.Tensor:
    out = torch.empty_like(x)
    scale(x, out, x.numel(), factor)
    return out


operator = torchkiln.library.op(
    "acme::scale",
    on_cuda,
    reference=plain,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
    backward=lambda ctx, grad: (operator(grad, ctx.factor), None),
    cases=[testing.Case("typical", lambda new: {"x": new.normal(3, 5), "factor": 0.5})],
    differentiable=["x"],
)
print("imported")  # must not get into JSON
'''
PROGRAM = """
import json
import sys
import torch
import torchkiln
from support.lent import Lent
from acme_kernels import scale

for name in sys.argv[1:]:
    x = Lent(torch.ones(1000, dtype=getattr(torch, name)))
    try:
        scale(x, x, 1000, 2.0)
    except torchkiln.errors.MissingKernelError as error:
        print(json.dumps(error.details))
        sys.exit(str(error))
print(json.dumps(torchkiln.statistics()))
"""
FLOAT = "user/acme_scale.acme::scale<float, block_size=256>"
HALF = "user/acme_scale.acme::scale<half, block_size=256>"
IMPORT = ("--import", "acme_kernels")
# A runtime machine: nothing may be written, no home, no compiler, nothing may be compiled.
RUNTIME = {
    "TORCHKILN_JIT": "forbid",
    "TORCHKILN_CACHE_DIR": "/proc/nowhere",
    "TORCHKILN_NVRTC_PATH": "/nowhere",
    "HOME": "/nowhere",
}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "acme_kernels.py").write_text(KERNELS)
    (tmp_path / "app.py").write_text(PROGRAM)
    return Machine(tmp_path, {"PYTHONPATH": str(ROOT / "tests")})


def app(machine: Machine, *dtypes: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return machine.run(sys.executable, "app.py", *dtypes, **environment)


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


def kernels(manifest: Path) -> list[str]:
    found: list[str] = json.loads(manifest.read_text())["kernels"]
    return found


def make_bundle(machine: Machine) -> Path:
    """Records the program and makes a bundle of what it uses."""
    manifest = machine.folder / "app.json"
    done = app(machine, "float32", TORCHKILN_RECORD=str(manifest))
    assert done.returncode == 0, done.stderr
    arguments = ("--manifest", "app.json", "--arch", "sm_80,sm_90", *IMPORT)
    machine.json("bundle", "create", "--out", "app.bundle", *arguments)
    return machine.folder / "app.bundle"


def test_recorded_bundled_and_run_where_nothing_compiles(machine: Machine) -> None:
    bundle = make_bundle(machine)
    assert kernels(machine.folder / "app.json") == [FLOAT]
    done = app(machine, "float32", **RUNTIME, TORCHKILN_BUNDLES=str(bundle))
    assert done.returncode == 0, done.stderr
    counters = last_line(done)
    assert counters["hits_bundle"] == counters["launches"] == 1
    assert counters["compiles"] == counters["nvrtc_opened"] == counters["missing"] == 0


def test_a_bundle_is_verified_with_the_sources(machine: Machine) -> None:
    make_bundle(machine)
    verify = ("bundle", "verify", "app.bundle", "--manifest", "app.json", "--arch", "sm_80,sm_90")
    assert machine.json(*verify, *IMPORT)["ok"]
    # Without them nobody can tell whether the code is that of the sources.
    (problem, _) = machine.json(*verify, code=1)["problems"]
    assert "--import MODULE" in problem["why"]
    edited = KERNELS.replace("* factor)", "* factor + 1)")
    (machine.folder / "acme_kernels.py").write_text(edited)
    (problem, _) = machine.json(*verify, *IMPORT, code=1)["problems"]
    assert "made from other sources" in problem["why"]


def test_the_command_of_the_error_mends_the_bundle(machine: Machine) -> None:
    runtime = {**RUNTIME, "TORCHKILN_BUNDLES": str(make_bundle(machine))}
    failed = app(machine, "float16", **runtime)
    assert failed.returncode == 1
    details = last_line(failed)
    assert details["nearest"] == f"{FLOAT}@sm_90"
    assert details["differences"] == ["Scalar is float instead of half"]
    assert f"{HALF}@sm_90 is in no bundle" in failed.stderr
    assert " --import acme_kernels --ops acme_scale --dtypes float16" in details["command"]
    mended = machine.shell(details["command"])
    assert mended.returncode == 0, mended.stderr
    assert last_line(app(machine, "float16", "float32", **runtime))["hits_bundle"] == 2


def test_a_program_is_imported_by_its_file(machine: Machine) -> None:
    program = f"{KERNELS}\nif __name__ == '__main__':\n    from support.lent import Lent\n"
    program += "    x = Lent(torch.ones(9))\n    scale(x, x, 9, 1.0)\n"
    (machine.folder / "whole.py").write_text(program)
    failed = machine.run(sys.executable, "whole.py", TORCHKILN_JIT="forbid")
    command = f"torchkiln warm --import {machine.folder / 'whole.py'} --ops acme_scale"
    assert command in failed.stderr
    warmed = machine.json("warm", "--import", "whole.py", "--ops", "acme_scale", "--arch", "sm_90")
    assert [row["specialization"] for row in warmed["kernels"]] == [FLOAT, HALF]
    done = machine.run(sys.executable, "whole.py", TORCHKILN_JIT="forbid")
    assert done.returncode == 0, done.stderr


def test_warm_of_a_manifest_names_what_it_does_not_know(machine: Machine) -> None:
    manifest = machine.folder / "app.json"
    manifest.write_text(json.dumps({"format": 1, "kernels": [FLOAT]}))
    (row,) = machine.json("warm", "--manifest", "app.json", "--arch", "sm_90", code=1)["kernels"]
    assert row["status"] == "unknown"
    assert "--import MODULE" in row["error"]
    (row,) = machine.json("warm", "--manifest", "app.json", "--arch", "sm_90", *IMPORT)["kernels"]
    assert row["status"] == "compiled"


def test_explain_and_dump_show_it(machine: Machine) -> None:
    place = ("acme_scale", "Scalar=half", "n=100", "--arch", "sm_90", *IMPORT)
    (row,) = machine.json("explain", *place)["kernels"]
    assert row["text"] == HALF
    assert row["layer"] == "compile"
    (dumped,) = machine.json("dump", *place, "--out", "out", "--what", "source,ptx")["dumps"]
    assert "PART(" in (Path(dumped["folder"]) / "user" / "acme_scale.cuh").read_text()
    assert (Path(dumped["folder"]) / "user" / "acme" / "parts.h").exists()
    assert ".entry" in Path(dumped["files"]["ptx"]).read_text()


def test_verify_compares_it_with_its_reference(machine: Machine) -> None:
    results = machine.json("verify", "--ops", "acme::scale", *IMPORT)["results"]
    assert {row["dtype"] for row in results} == {"float16", "bfloat16", "float32"}
    assert {row["direction"] for row in results} == {"forward", "gradient x"}
    wrong = KERNELS.replace("reference=plain,", "reference=plain, cpu=lambda x, factor: x + 1,")
    (machine.folder / "acme_kernels.py").write_text(wrong)
    results = machine.json("verify", "--ops", "acme::scale", *IMPORT, code=1)["results"]
    assert not any(row["ok"] for row in results if row["direction"] == "forward")


def install(machine: Machine, value: str) -> dict[str, str]:
    """The environment of a package that brings kernels by an entry point."""
    site = machine.folder / "site-packages"
    (site / "acme-1.0.dist-info").mkdir(parents=True)
    (site / "acme-1.0.dist-info" / "METADATA").write_text("Name: acme\nVersion: 1.0\n")
    points = f"[torchkiln.kernels]\nacme = {value}\n"
    (site / "acme-1.0.dist-info" / "entry_points.txt").write_text(points)
    (machine.folder / "acme_kernels.py").rename(site / "acme_kernels.py")
    return {"PYTHONPATH": f"{site}:{ROOT / 'tests'}"}


def test_packages_bring_kernels_by_entry_point(machine: Machine) -> None:
    installed = install(machine, "acme_kernels")
    arguments = ("--out", "b", "--ops", "acme_scale", "--arch", "sm_90")
    assert machine.json("bundle", "create", *arguments, **installed)["bundle"]["objects"] == 2
    assert machine.json("bundle", "verify", "b", **installed)["ok"]


def test_a_broken_package_costs_a_sentence(machine: Machine) -> None:
    installed = install(machine, "acme_nothing")
    arguments = ("warm", "--ops", "box_iou", "--dtypes", "float32", "--arch", "sm_90", "--json")
    done = machine.torchkiln(*arguments, **installed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["complete"]
    sentence = "entry point acme of torchkiln.kernels cannot be loaded (ModuleNotFoundError"
    assert done.stderr.count(sentence) == 1


@pytest.mark.parametrize("name", ["acme_nothing", "nowhere.py"])
def test_what_cannot_be_imported_is_wrong_usage(machine: Machine, name: str) -> None:
    done = machine.torchkiln("explain", "box_iou", "--arch", "sm_90", "--import", name)
    assert done.returncode == 2
    assert f"--import must name a module or a .py file that can be imported; got {name}" in (
        done.stderr.replace("\n", " ")
    )
