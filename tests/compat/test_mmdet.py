"""Detectors of mmdet, from its own configuration files, on `torchkiln.compat.mmdet`."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="mmdet is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["faster-rcnn", "mask-rcnn", "retinanet"])
def test_a_detector_predicts_and_learns(name: str, device: str, tmp_path: Path) -> None:
    # One thread is faster on two shared cores than two that wait for each other.
    options = ["--device", device, "--model", name, "--threads", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.mmdet_training", *options]
    command += ["--output", str(tmp_path / "report")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "report.json").read_text())["models"][name]
    totals = row["losses"]
    assert len(totals) == 20
    assert all(torch.tensor(totals).isfinite()), totals
    assert totals[-1] < 0.8 * totals[0], totals
    page = (tmp_path / "report.md").read_text()
    assert f"| {name} | {row['first_inference_ms']:.1f} |" in page


EXTRACTORS = """
import torch
from torchkiln import ops
from torchkiln.compat import mmdet as drop_in

calls = []
ours = ops.multi_scale_roi_align
ops.multi_scale_roi_align = lambda *arguments: calls.append(1) or ours(*arguments)
drop_in.install()
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
theirs = SingleRoIExtractor.forward.__wrapped__

def extractor(kind=SingleRoIExtractor, **layer):
    layer = dict(type="RoIAlign", output_size=7, sampling_ratio=0) | layer
    return kind(layer, 8, [4, 8, 16, 32])

torch.manual_seed(0)
maps = [torch.randn(2, 8, 64 // 2**i, 80 // 2**i, requires_grad=True) for i in range(4)]
corner = torch.rand(60, 2) * 100
image = torch.randint(2, (60, 1)).float()
rois = torch.cat([image, corner, corner + torch.rand(60, 2) ** 3 * 600 + 1], 1)

# One launch, and what mmdet's own loop over levels gives.
module = extractor()
def results(call):
    pooled = call(module, maps, rois)
    return [pooled, *torch.autograd.grad(pooled.square().sum(), maps)]
found = results(SingleRoIExtractor.forward)
assert len(calls) == 1 and module(maps, rois).equal(found[0])
assert module.map_roi_levels(rois, 4).unique().tolist() == [0, 1, 2, 3]
calls.clear()
for one, other in zip(found, results(theirs), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
assert not calls
assert module(maps, rois[:0]).shape == (0, 8, 7, 7)

# As many maps as the neck has, or fewer.
torch.testing.assert_close(module(maps[:2], rois), theirs(module, maps[:2], rois))

# Half precision, as with AMP: the maps' dtype.
half = [level.detach().bfloat16() for level in maps]
assert module(half, rois).dtype == torch.bfloat16
calls.clear()

# Level by level, as before: what our operator does not do.
class Other(SingleRoIExtractor):
    def map_roi_levels(self, rois, num_levels):
        return super().map_roi_levels(rois, num_levels) * 0

assert Other.forward is SingleRoIExtractor.forward
with torch.no_grad():
    first = extractor(Other)(maps, rois)
    assert first.equal(extractor().roi_layers[0](maps[0], rois))
    extractor(pool_mode="max")(maps, rois)
    module(maps, rois, roi_scale_factor=1.2)
    module(maps[:1], rois)
assert not calls

drop_in.uninstall()
assert SingleRoIExtractor.forward is theirs
drop_in.install()
module(maps, rois)
assert calls and SingleRoIExtractor.forward is not theirs
"""


def test_all_levels_of_an_extractor_take_one_launch() -> None:
    command = [sys.executable, "-W", "ignore", "-c", EXTRACTORS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
