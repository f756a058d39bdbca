"""Detectors of mmdet, from its own configuration files, on `torchkiln.compat.mmcv`."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

# Faster on two shared cores than two threads that wait for each other.
PROGRAM = """
import json, sys
from pathlib import Path
from torchkiln.compat import mmcv as drop_in
drop_in.install()
import mmdet.models, numpy, torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

name, device = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
init_default_scope("mmdet")
folder = Path(mmdet.__file__).parent / ".mim" / "configs" / name.replace("-", "_")
config = Config.fromfile(folder / f"{name}_r50_fpn_1x_coco.py").model
config.backbone.init_cfg = None  # random weights
config.data_preprocessor = None
if "rcnn" in name:
    config.train_cfg.rcnn.sampler.num = 64  # of 512 regions an image: most of a step's time
model = MODELS.build(config).to(device)

size = (128, 160)
boxes = [[20, 10, 70, 60], [80, 50, 150, 110]]
masks = numpy.zeros((2, *size), numpy.uint8)
images = torch.zeros(1, 3, *size, device=device)
for i, (x1, y1, x2, y2) in enumerate(boxes):
    masks[i, y1:y2, x1:x2] = 1
    images[0, i, y1:y2, x1:x2] = 1
sample = DetDataSample(metainfo=dict(
    img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
    scale_factor=(1.0, 1.0)))
sample.gt_instances = InstanceData(
    bboxes=torch.tensor(boxes, dtype=torch.float32, device=device),
    labels=torch.tensor([1, 5], device=device), masks=BitmapMasks(masks, *size))

model.eval()
with torch.no_grad():
    found = model.predict(images, [sample])[0].pred_instances
assert found.bboxes.shape == (len(found.scores), 4)

model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
totals = []
for step in range(20):
    losses = model.loss(images, [sample])
    total = sum(part.sum() for name, value in losses.items() if "loss" in name
                for part in (value if isinstance(value, list) else [value]))
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
    optimizer.step()
    totals.append(total.item())
print(json.dumps(totals))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="mmdet is not installed")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["faster-rcnn", "mask-rcnn", "retinanet"])
def test_a_detector_predicts_and_learns(name: str, device: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, name, device]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout.splitlines()[-1])
    assert all(torch.tensor(totals).isfinite()), totals
    assert totals[-1] < 0.8 * totals[0], totals
