"""explain and dump: what they ask the engine, print and write; then both on the real one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from torchkiln_cli import dump, warm
from torchkiln_cli import explain as explain_command

STORED = {
    "text": "detection/nms.mask<float, block_size=64>",
    "specialization": {"text": "detection/nms.mask<float, block_size=64>"},
    "layer": "disk",
    "why": "stored",
    "rung": {"target": "sm_90", "reason": "exact machine code (sm_90) by NVRTC 13.5"},
    "ladder": "device of sm_90: the whole ladder.",
    "registers": 32,
    "spill_bytes": 0,
    "tunables_why": "the only default",
}
MISSING = {
    **{k: v for k, v in STORED.items() if k not in ("rung", "registers", "spill_bytes")},
    "text": "detection/nms.sweep<float>",
    "layer": "none",
    "why": "in no layer, and there is no NVRTC here",
}


@pytest.fixture
def asked(engine):
    """The requests to `explain`, which is answered with one stored kernel."""
    requests = []

    def explain(request):
        requests.append(request)
        return {"kernels": [STORED], "architecture": 90, "compiler": "13.5-ab"}

    engine.replies["explain"] = explain
    return requests


def test_explain_prints_rows_and_each_reason_once(engine, invoke):
    reply = {"kernels": [STORED, STORED, MISSING], "architecture": 90, "compiler": "x"}
    engine.replies["explain"] = reply
    result = invoke("explain", "nms", "--arch", "sm_90")
    assert result.exit_code == 1  # one of them can be had from nowhere
    assert "nms on sm_90: 3 kernels" in result.stdout
    assert "32" in result.stdout
    assert result.stdout.count("the whole ladder") == 1
    assert result.stdout.count("there is no NVRTC here") == 1
    assert json.loads(invoke("explain", "nms", "--arch", "sm_90", "--json").stdout) == reply


def test_explain_asks_for_what_was_named(asked, invoke):
    result = invoke("explain", "nms", "scalar=half", "n=9", "--device", "1", "--dtypes", "float16")
    assert result.exit_code == 0
    assert invoke("explain", "nms", "--arch", "sm_80").exit_code == 0
    values = {"scalar": "half", "n": "9"}
    first = {"operator": "nms", "values": values, "dtypes": ["float16"], "device": 1}
    assert asked == [first, {"operator": "nms", "values": {}, "dtypes": None, "target": "sm_80"}]


@pytest.mark.parametrize("value", ["scalar", "=3", "n="])
def test_explain_wants_pairs(asked, invoke, value):
    result = invoke("explain", "nms", value, "--arch", "sm_90")
    assert result.exit_code == 2
    assert f"VALUES must look like k=1000; got {value}" in result.stderr


def test_explain_without_a_gpu_names_the_way_out(engine, invoke):
    engine.replies["explain"] = engine.error("libcuda.so.1 could not be loaded.", kind=6)
    result = invoke("explain", "nms")
    assert result.exit_code == 2
    assert "name a GPU that is not here: --arch sm_90" in result.stderr


def test_dump_wants_known_parts(asked, invoke, tmp_path):
    result = invoke("dump", "nms", "--arch", "sm_90", "--out", str(tmp_path), "--what", "ptx,asm")
    assert result.exit_code == 2
    assert "--what must be among source, ptx, cubin, sass; got asm" in result.stderr


def test_dump_without_a_disassembler_says_so(asked, engine, invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(dump, "find_disassembler", lambda: None)
    requests = []

    def reply(request):
        requests.append(request)
        files = {"source": f"{tmp_path}/k/mask.cu"}
        return {
            "text": STORED["text"],
            "target": "sm_90",
            "folder": f"{tmp_path}/k",
            "files": files,
        }

    engine.replies["dump"] = reply
    result = invoke("dump", "nms", "--arch", "sm_90", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "No SASS: neither nvdisasm nor cuobjdump was found" in result.stderr
    assert "mask.cu" in result.stdout
    assert requests[0]["what"] == ["ptx", "source"]
    assert invoke("dump", "nms", "--out", str(tmp_path), "--what", "ptx").exit_code == 0


def test_a_disassembler_is_found_on_the_path_in_a_toolkit_or_in_a_package(tmp_path, monkeypatch):
    monkeypatch.setattr(dump, "_USUAL_TOOLKIT", str(tmp_path / "nowhere"))  # it may be there
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    site = tmp_path / "site-packages"
    monkeypatch.setattr(sys, "path", [str(site)])
    last = tmp_path / "path"
    for folder, name in (
        (site / "nvidia" / "cu13" / "bin", "cuobjdump"),
        (tmp_path / "cuda" / "bin", "nvdisasm"),
        (last, "nvdisasm"),
    ):
        monkeypatch.setenv("PATH", str(last))
        folder.mkdir(parents=True)
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
        assert dump.find_disassembler() == str(folder / name)


# --- on the real engine ---------------------------------------------------------------------------


def kernels(run, *arguments):
    result = run("explain", "box_iou", "--arch", "sm_90", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["kernels"]


def test_explain_knows_public_functions(run):
    """`verify --ops` knows them, too."""
    rows = [
        json.loads(run("explain", name, "--arch", "sm_90", "--json").stdout)["kernels"]
        for name in ("causal_conv1d", "causal_conv1d_fn")
    ]
    assert rows[0]
    assert rows[0] == rows[1]


def test_warm_knows_public_functions_as_explain_does():
    works = [
        warm.work_of(warm.Selection(operators=names), ["sm_90"])
        for names in (
            ["causal_conv1d"],
            ["causal_conv1d_fn"],
            ["causal_conv1d_fn", "causal_conv1d"],
        )
    ]
    assert works[0][0]
    assert works[0] == works[1] == works[2]
    with pytest.raises(warm.UsageError, match=r"--ops must be among .*; got causal_conv1d_gn"):
        warm.work_of(warm.Selection(operators=["causal_conv1d_gn", "nms"]), ["sm_90"])


def test_explain_names_no_default_that_runs_nowhere():
    """`dump` would ask for its code, and some tunables do not compile with some static values."""
    work, _ = warm.work_of(warm.Selection(), ["sm_90"])
    warmed = {row["text"] for row, _ in work}
    for operator in sorted({row["operator"] for row, _ in work}):
        reply = explain_command.kernels(operator, {}, None, {"target": "sm_90"})
        assert {row["text"] for row in reply["kernels"]} <= warmed, operator


def test_explain_sees_what_warm_has_stored(run):
    before = kernels(run, "--dtypes", "float32")
    assert {row["layer"] for row in before} == {"compile"}
    assert {row["rung"]["target"] for row in before} == {"sm_90"}
    assert run("warm", "--ops", "box_iou", "--dtypes", "float32", "--arch", "sm_90").returncode == 0
    after = kernels(run, "--dtypes", "float32")
    assert {row["layer"] for row in after} == {"disk"}
    assert all(row["registers"] > 0 for row in after)
    assert [row["text"] for row in after] == [row["text"] for row in before]
    narrower = kernels(run, "scalar=float", "n=100", "m=100")
    assert {row["text"] for row in narrower} < {row["text"] for row in after}

    wrong = run("explain", "box_iou", "scaler=float", "--arch", "sm_90")
    assert wrong.returncode == 2
    assert "values must be among" in wrong.stderr


def test_dump_writes_what_can_be_read_and_compiled_again(run, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    tool = tools / "nvdisasm"
    tool.write_text('#!/bin/sh\necho "disassembled with $1"\n')
    tool.chmod(0o755)
    arguments = ("roi_pool", "scalar=float", "--arch", "sm_90", "--what", "source,ptx,cubin,sass")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    result = run("dump", *arguments, "--out", str(tmp_path / "out"), "--json", PATH=path)
    assert result.returncode == 0, result.stderr
    reply = json.loads(result.stdout)
    assert reply["disassembler"] == str(tool)
    assert reply["dumps"]
    for row in reply["dumps"]:
        files = {name: Path(file) for name, file in row["files"].items()}
        assert set(files) == {"source", "ptx", "cubin", "sass", "facts"}
        assert ".target sm_90" in files["ptx"].read_text()
        assert files["cubin"].read_bytes().startswith(b"\x7fELF")
        assert files["sass"].read_text() == "disassembled with --print-code\n"
        assert json.loads(files["facts"].read_text())["text"] == row["text"]
        # Every header that the source asks for lies in the folder.
        (line,) = [x for x in files["source"].read_text().splitlines() if x.startswith("#include")]
        assert (Path(row["folder"]) / line.split('"')[1]).is_file()
