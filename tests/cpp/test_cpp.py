"""C++ programs against the installed package: they build, train, and agree with Python."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchkiln
from support.machine import build_folder
from torchkiln import ops
from torchkiln_cli import _native

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parent
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of CMakeLists.txt in this folder, against what is installed here."""
    # The processes of a parallel run share one build, and the first of them makes it.
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    build = shared / "cpp"
    torch_folder = torch.__path__[0]
    beside = Path(sys.executable).parent / "cmake"
    cmake = str(beside) if beside.exists() else "cmake"
    options = [
        f"-Dtorchkiln_DIR={_native.cmake_dir()}",
        f"-DTORCH_DIR={torch_folder}",
        # torch's headers are most of the time; optimising or debug information would double it.
        "-DCMAKE_BUILD_TYPE=None",
        "-DCMAKE_CXX_FLAGS=-O0",
    ]
    configure = [cmake, "-S", str(FOLDER), "-B", str(build), *options]
    with (shared / "cpp.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([cmake, "--build", str(build), "--parallel", "2"], check=True)
    return build


def run(program: Path, cache: Path, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """The JSON lines of a program that no Python has prepared."""
    nvrtc = _native.control("nvrtc", load=False)["candidates"][0]["path"]
    done = subprocess.run(
        [str(program), *arguments],
        env={
            "PATH": os.defpath,
            "HOME": str(cache),
            "TORCHKILN_CACHE_DIR": str(cache / "kernels"),
            "TORCHKILN_NVRTC_PATH": nvrtc,
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wave(shape: tuple[int, ...], speed: float) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * speed).reshape(shape)


# --- the example ----------------------------------------------------------------------------------


def loss_of_the_example(filter: Tensor, classifier: Tensor) -> Tensor:
    images = wave((2, 3, 32, 32), 0.37)
    rois = torch.tensor(
        [[0, 2, 2, 20, 20], [0, 8, 4, 30, 28], [1, 0, 0, 31, 31], [1, 10, 12, 26, 24]],
        dtype=torch.float32,
    )
    maps = torch.relu(torch.conv2d(images, filter, padding=1))
    aligned = ops.roi_align(maps, rois, 4, 1.0, 2, True)
    pooled = ops.roi_pool(maps, rois, 4)
    features = torch.cat([aligned.mean((2, 3)), pooled.mean((2, 3))], 1)
    labels = torch.tensor([0, 1, 2, 3])
    return ops.sigmoid_focal_loss(features @ classifier.T, labels, reduction="mean")


def test_the_example_trains_as_python_does(programs: Path, tmp_path: Path) -> None:
    lines = run(programs / "example" / "train", tmp_path, "--steps", "12")
    steps = [line for line in lines if "step" in line]
    losses = [step["loss"] for step in steps]
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2

    filter = (wave((8, 3, 3, 3), 0.11) * 0.3).requires_grad_()
    classifier = (wave((3, 16), 0.23) * 0.3).requires_grad_()
    for step in range(3):
        loss = loss_of_the_example(filter, classifier)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
        gradients = torch.autograd.grad(loss, (filter, classifier))
        for name, gradient in zip(("filter", "classifier"), gradients, strict=True):
            if step == 0:
                printed = torch.tensor(steps[0][f"{name}_gradient"]).view_as(gradient)
                torch.testing.assert_close(printed, gradient, **CLOSE)
        with torch.no_grad():
            filter -= 0.5 * gradients[0]
            classifier -= 0.5 * gradients[1]


def test_the_example_compiles_ahead_and_counts(programs: Path, tmp_path: Path) -> None:
    train = programs / "example" / "train"
    arguments = ("--steps", "1", "--arch", "sm_90")
    first, second = (run(train, tmp_path, *arguments) for _ in range(2))
    warm, counters = first[1]["warm"], first[-1]["statistics"]
    assert first[0] == {"version": torchkiln.__version__}
    assert warm["compiled"] == counters["compiles"] > 0
    assert warm["failed"] == 0
    assert set(counters) == set(torchkiln.statistics())
    assert second[1]["warm"] == {**warm, "compiled": 0, "present": warm["compiled"]}
    assert second[-1]["statistics"]["nvrtc_opened"] == 0
    assert first[2] == {"kept": 2}


def test_the_example_compiles_what_a_manifest_names(programs: Path, tmp_path: Path) -> None:
    _native.load_operators()
    reply = _native.control("explain", operator="roi_pool", values={}, target="sm_80")
    texts = sorted({row["text"] for row in reply["kernels"]})[:2]
    manifest = tmp_path / "used.json"
    manifest.write_text(json.dumps({"format": 1, "kernels": texts}))
    arguments = ("--steps", "1", "--arch", "sm_80", "--manifest", str(manifest))
    warm = run(programs / "example" / "train", tmp_path, *arguments)[1]["warm"]
    assert warm == {"compiled": 2, "present": 0, "failed": 0, "errors": []}


# --- every gradient of autograd.hpp ---------------------------------------------------------------


def rois() -> Tensor:
    return torch.tensor([[0, 1, 1, 7, 6], [1, 0, 2, 5, 7]], dtype=torch.float32)


def boxes(shift: float) -> Tensor:
    return torch.tensor([[0.0, 0, 4, 4], [2, 1, 7, 5]]) + shift


def maps() -> Tensor:
    return wave((2, 3, 8, 8), 0.3)


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "box_iou": (ops.generalized_box_iou, (boxes(0), boxes(0.5))),
    "roi_align": (lambda x: ops.roi_align(x, rois(), (3, 2), 0.8, 2, True), (maps(),)),
    "roi_align_max": (
        lambda x: ops.roi_align(x, rois(), (3, 2), 0.8, 2, True, pool_mode="max"),
        (maps(),),
    ),
    "roi_align_channels_last": (
        lambda x: ops.roi_align(x, rois(), (3, 2)),
        (maps().contiguous(memory_format=torch.channels_last),),
    ),
    "roi_pool": (lambda x: ops.roi_pool(x, rois(), (3, 2), 0.8, rounding=False), (maps(),)),
    "focal_labels": (
        lambda x: ops.sigmoid_focal_loss(
            x, torch.tensor([0, 1, 2, 3]), 0.3, 1.5, "sum", weight=wave((3,), 0.4).abs()
        ),
        (wave((4, 3), 0.9),),
    ),
    "focal_soft": (
        lambda x: ops.sigmoid_focal_loss(x, wave((4, 3), 0.2).abs()),
        (wave((4, 3), 0.9),),
    ),
}


@pytest.fixture(scope="module")
def printed(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    lines = run(programs / "gradients", tmp_path_factory.mktemp("home"))
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_python(printed: dict[str, dict[str, Any]], case: str) -> None:
    function, values = CASES[case]
    leaves = [value.detach().requires_grad_() for value in values]
    output = function(*leaves)
    weights = 1 + wave(tuple(output.shape), 0.7)
    expected = torch.autograd.grad((output * weights).sum(), leaves)
    assert len(printed[case]["gradients"]) == len(expected)
    for row, gradient in zip(printed[case]["gradients"], expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(torch.tensor(row).view(gradient.shape), gradient, **CLOSE)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("second_derivative", "box_iou: second derivatives are not implemented."),
        ("gradient_of_targets", "sigmoid_focal_loss: targets and weight get no gradient."),
    ],
)
def test_what_has_no_gradient_says_so(
    printed: dict[str, dict[str, Any]], case: str, sentence: str
) -> None:
    assert printed[case]["error"].startswith(sentence)


def test_a_wrong_argument_has_the_sentence_of_python(printed: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="roi_align: input must") as error:
        ops.roi_align(wave((3, 8, 8), 1), rois(), 2)
    assert printed["wrong_shape"]["record"] == str(error.value)
    assert str(error.value) in printed["wrong_shape"]["error"]


def test_nothing_is_recorded_when_no_gradient_is_wanted(printed: dict[str, dict[str, Any]]) -> None:
    assert printed["no_gradient_wanted"]["requires_grad"] == 0


# --- a kernel of its own --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_kernel(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    home = tmp_path_factory.mktemp("own")
    no_gpu = str(build_folder() / "fake_cuda")  # a driver that runs nothing
    return run(programs / "own_kernel", home, LD_LIBRARY_PATH=no_gpu)


def test_a_kernel_of_ones_own_is_compiled_ahead_and_launched(
    own_kernel: list[dict[str, Any]],
) -> None:
    warm, first, second, counters = own_kernel[:4]
    assert warm == {"compiled": 4, "present": 0, "failed": 0, "errors": []}
    assert first["error"] == second["error"] == "no error"
    assert counters["launches"] == 2
    assert counters["compiles"] == 4


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("text", "the text of user/acme_scale.cuh must stay the same"),
        ("entry", "acme_scale: entry must be a __global__ function of the source; got acme::miss"),
        ("include", "got <vector> in user/acme_odd.cuh(1). torchkiln has common/"),
        ("block", "block must have from 1 to 1024x1024x64 threads; got 2048x1x1"),
    ],
)
def test_mistakes_in_kernels_of_ones_own_are_told(
    own_kernel: list[dict[str, Any]], case: str, sentence: str
) -> None:
    errors = {line["case"]: line["error"] for line in own_kernel if "case" in line}
    assert sentence in errors[case]
