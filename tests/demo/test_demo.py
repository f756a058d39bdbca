"""The main job: a pretrained detector, unmodified, finds the one face on the photograph."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from torchkiln_cli import demo
from torchkiln_cli.main import cli
from torchkiln_cli.warm import UsageError

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in demo._PACKAGES),
    reason="the demo's packages are not installed",
)
BOX = (181, 62, 268, 172)


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """The demo's JSON and its picture, from one run on an empty cache."""
    folder = tmp_path_factory.mktemp("demo")
    picture = folder / "faces.png"
    options = ("--json", "--arch", "sm_80,sm_90", "--output", str(picture))
    done = subprocess.run(
        [sys.executable, "-m", "torchkiln_cli.main", "demo", *options],
        env={**os.environ, "TORCHKILN_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), picture


@installed
class TestDemo:
    def test_finds_the_face(self, answer):
        facts, _ = answer
        (face,) = facts["faces"]
        assert face["box"] == pytest.approx(BOX, abs=2)
        assert face["score"] > 0.999
        x1, y1, x2, y2 = face["box"]
        assert len(face["landmarks"]) == 5
        assert all(x1 < x < x2 and y1 < y < y2 for x, y in face["landmarks"])

    def test_our_kernel_answered(self, answer):
        facts, _ = answer
        assert facts["nms_calls"] > 5

    def test_draws_on_the_photograph(self, answer):
        from PIL import Image, ImageChops

        _, path = answer
        with Image.open(demo.photograph()) as photograph, Image.open(path) as drawn:
            assert drawn.size == photograph.size
            changed = ImageChops.difference(drawn, photograph.convert("RGB")).getbbox()
        left, top, right, bottom = changed
        assert left == pytest.approx(BOX[0], abs=8)
        assert right >= BOX[2] - 4
        assert top < BOX[1]  # the score stands above the box
        assert bottom == pytest.approx(BOX[3], abs=8)

    def test_compiles_its_operators_for_other_gpus(self, answer):
        facts, _ = answer
        assert {row["arch"] for row in facts["kernels"]} == {"sm_80", "sm_90"}
        assert {row["status"] for row in facts["kernels"]} <= {"compiled", "hit"}
        assert all(row["bytes"] > 0 and row["registers"] > 0 for row in facts["kernels"])

    def test_an_image_that_is_none(self, tmp_path):
        path = tmp_path / "text.jpg"
        path.write_text("no picture")
        result = CliRunner().invoke(cli, ["demo", "--image", str(path)])
        assert result.exit_code == 2
        assert "--image must be a picture that Pillow can read" in result.stderr

    def test_an_image_that_is_too_small(self, tmp_path):
        from PIL import Image

        path = tmp_path / "tiny.png"
        Image.new("RGB", (30, 12)).save(path)
        result = CliRunner().invoke(cli, ["demo", "--image", str(path)])
        assert result.exit_code == 2
        assert "--image must have 20 pixels a side or more; got 30 x 12" in result.stderr

    def test_a_picture_without_a_face(self, answer, tmp_path):
        from PIL import Image

        _, drawn = answer  # with the kernels of that run
        path, output = tmp_path / "grey.png", tmp_path / "out.png"
        Image.new("RGB", (64, 48), (128, 128, 128)).save(path)
        options = ("--json", "--arch", "sm_90", "--image", str(path), "--output", str(output))
        done = subprocess.run(
            [sys.executable, "-m", "torchkiln_cli.main", "demo", *options],
            env={**os.environ, "TORCHKILN_CACHE_DIR": str(drawn.parent / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["faces"] == []

    def test_an_output_that_cannot_be_written(self, tmp_path):
        from PIL import Image

        for output in (tmp_path / "none" / "out.png", tmp_path / "out.unknown"):
            with pytest.raises(UsageError, match="--output must be a picture"):
                demo._save(Image.new("RGB", (64, 48)), str(output))


def test_missing_packages_are_one_sentence_with_the_line_to_run(monkeypatch):
    missing = {"torchvision", "facenet_pytorch", "PIL"}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    with pytest.raises(UsageError) as caught:
        demo._require_packages(None)
    assert str(caught.value).startswith("The demo needs torchvision, facenet-pytorch, ")
    assert "pip install --no-deps torchvision facenet-pytorch" in str(caught.value)
    assert "&& pip install pillow" in str(caught.value)
