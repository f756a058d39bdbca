"""examples/own_kernel and the page that tells it, without a GPU."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from support.machine import CLEAN, ROOT, Machine

FOLDER = ROOT / "examples" / "own_kernel"
PAGE = ROOT / "docs" / "own_kernels.md"
SOURCES = ("bias_gelu.cuh", "bias_gelu.py", "test_bias_gelu.py", "train.py", "deploy.sh")

sys.path.insert(0, str(FOLDER))
from bias_gelu import is_aligned, plain_backward  # noqa: E402
from test_bias_gelu import TestBiasGelu  # noqa: E402

__all__ = ["TestBiasGelu"]


def run(cache: Path, *command: str, hide_gpus: bool = True) -> subprocess.CompletedProcess[str]:
    """A program of the example, in its folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**CLEAN, "TORCHKILN_CACHE_DIR": str(cache), "PATH": path, "ARCHS": "sm_90"}
    if hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=300
    )


# ---- the program ----


def test_training_equals_plain_torch(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    done = run(tmp_path, sys.executable, "train.py", "--steps", "30", "--json")
    assert done.returncode == 0, done.stderr
    own, plain = json.loads(done.stdout)["runs"]
    assert (own["activation"], own["device"], own["ok"]) == ("torchkiln", "cpu", True)
    assert 0 < own["difference"] < 1e-5
    assert plain["difference"] == 0
    assert own["losses"][-1] < own["losses"][0] / 2
    assert own["accuracy"] > 0.75


def test_a_wrong_activation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    import train

    right = train.bias_gelu
    monkeypatch.setattr(train, "bias_gelu", lambda x, *rest: right(x * 1.01, *rest))
    own, plain = train.compare(["cpu"], 10, tune=False)
    assert not own["ok"]
    assert plain["ok"]


def test_missing_scikit_learn_costs_a_sentence(tmp_path: Path) -> None:
    program = "import runpy, sys; sys.modules['sklearn'] = None; sys.argv = ['train.py']; "
    program += "sys.path.insert(0, '.'); runpy.run_path('train.py', run_name='__main__')"
    done = run(tmp_path, sys.executable, "-c", program)
    assert done.returncode == 1
    assert done.stderr == (
        "train: scikit-learn must be installed; found none. pip install scikit-learn\n"
    )


def test_bandwidth_asks_for_a_gpu(tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, "bandwidth.py")
    assert done.returncode == 1
    assert done.stderr.startswith("bandwidth: there must be a CUDA device; found none.")


needs_command = pytest.mark.skipif(
    shutil.which("torchkiln", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None,
    reason="the command torchkiln is not installed",
)


@needs_command
def test_deployed_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    done = run(tmp_path, "bash", "deploy.sh", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Complete: code, architectures, symbols and keys are right." in done.stdout
    assert "torchkiln  loss" in done.stdout


@pytest.mark.gpu
@needs_command
def test_tuned_and_deployed_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    done = run(tmp_path, "bash", "deploy.sh", str(tmp_path), hide_gpus=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cuda torchkiln  loss" in done.stdout
    assert "bias_gelu::backward<float, float, aligned=true" in (tmp_path / "used.json").read_text()


# ---- the kernels ----


def test_corners_of_the_space_compile_without_spills(tmp_path: Path) -> None:
    program = """
        import json
        import bias_gelu
        from torchkiln import _control

        request = {"operators": ["bias_gelu"], "dtypes": ["float32", "bfloat16"]}
        found = _control.control("expand", {**request, "points": "corners", "target": "sm_90"})
        for specialization in found["specializations"]:
            request = {"specialization": specialization, "target": "sm_90"}
            print(json.dumps(_control.control("compile", request)))
    """
    done = run(tmp_path, sys.executable, "-c", textwrap.dedent(program))
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) >= 32
    assert {row["spill_bytes"] for row in compiled} == {0}


def test_launches_cover_all_elements(tmp_path: Path) -> None:
    """On a driver that runs nothing: threads for each strip and pack, as wide as rows allow."""
    program = """
        import json, torch
        from bias_gelu import backward_kernel, forward_kernel
        from support.lent import Lent, launches

        def memory(*shape, dtype=torch.float16):
            return Lent(torch.zeros(*shape, dtype=dtype))

        for rows, columns in ((100, 64), (7, 13), (0, 8)):
            x, y = memory(rows, columns), memory(rows, columns)
            mask = memory(rows, columns, dtype=torch.uint8)
            aligned = columns % 8 == 0
            size = (rows, columns)
            forward_kernel(x, memory(columns), mask, y, *size, 1.25, aligned=aligned)
            sums = memory(7, columns, dtype=torch.float32)
            backward_kernel(
                *(y, x, memory(columns), mask, y, sums, *size, 16, 1.25), aligned=aligned
            )
        print(json.dumps(launches()))
    """
    paths = os.pathsep.join((str(FOLDER), str(ROOT / "tests")))
    done = Machine(tmp_path, {"PYTHONPATH": paths}).run(
        sys.executable, "-c", textwrap.dedent(program)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Strips x packs: 50 x 8 and 7 x 8 of 8 columns; 4 x 13 and 1 x 13 of 1; none without rows.
    assert [launch["grid"][0] for launch in found] == [2, 1, 1, 1]
    assert all(launch["block"] == [256, 1, 1] for launch in found)
    vectors = [re.findall(r"Lb([01])ELi(\d)E", launch["kernel"])[0] for launch in found]
    assert vectors == [("1", "8"), ("1", "8"), ("0", "1"), ("0", "1")]


@pytest.mark.parametrize("shape", [(40, 64), (3, 5)])
def test_gradient_formulas_equal_autograd(shape: tuple[int, int]) -> None:
    """The plain backward is written out, because it also runs below autograd."""
    x, grad = (torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(shape[1], dtype=torch.float64)
    mask = (torch.rand(*shape) < 0.8).to(torch.uint8)
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    y = torch.nn.functional.gelu(x + bias) * mask * 1.25
    expected = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(plain_backward(grad, x, bias, mask, 1.25), expected)


def test_what_is_aligned() -> None:
    x = torch.zeros(4, 16)
    assert is_aligned(x, x)
    assert not is_aligned(x[:, :12].contiguous())
    assert not is_aligned(x, x.flatten()[1:17])


# ---- the page ----


def blocks() -> list[str]:
    found = re.findall(
        r"^```(python|cpp|sh)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return [text for _, text in found]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.split("\n")[0].strip()[:40])
def test_the_page_shows_what_is_in_the_files(block: str) -> None:
    assert any(block in (FOLDER / name).read_text() for name in SOURCES), block


def test_the_page_shows_something_of_each_file() -> None:
    shown = {name for name in SOURCES for block in blocks() if block in (FOLDER / name).read_text()}
    assert shown == set(SOURCES)
