"""nms_bev, nms_normal_bev and their padded forms: other notations of nms_rotated and nms."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchkiln import ops, reference
from torchkiln.testing import Inputs

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def scene(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    new = Inputs()
    boxes = torch.cat([new.boxes(count, 40.0), new.uniform(count, 1, low=-2, high=2)], 1)
    return boxes.to(dtype), new.uniform(count).to(dtype)


def expected(boxes: Tensor, scores: Tensor, most: int | None = None) -> list[int]:
    """The reference of nms_rotated, in float64, for the best boxes."""
    rows = sorted(range(len(scores)), key=lambda row: (-float(scores[row]), row))[:most]
    wide = boxes.double()[rows]
    center, size = (wide[:, :2] + wide[:, 2:4]) / 2, wide[:, 2:4] - wide[:, :2]
    turned = torch.cat([center, size, wide[:, 4:]], 1)
    kept = reference.nms_rotated(turned, scores.double()[rows], 0.2)
    return [rows[row] for row in kept.tolist()]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("most", [None, 30, 0, 500], ids=str)
def test_nms_bev(dtype: torch.dtype, most: int | None, device: str) -> None:
    boxes, scores = scene(90, dtype)
    wanted = expected(boxes, scores, most)
    arguments = boxes.to(device), scores.to(device), 0.2
    assert ops.nms_bev(*arguments, pre_max_size=most).tolist() == wanted
    assert ops.nms_bev(*arguments, most, 5).tolist() == wanted[:5]
    indices, count = ops.nms_bev_padded(*arguments, 60, most)
    assert indices.tolist() == (wanted + [-1] * 60)[:60]
    assert count.item() == min(len(wanted), 60)


def test_nms_bev_without_boxes_and_with_nan(device: str) -> None:
    empty = torch.zeros(0, 5, device=device), torch.zeros(0, device=device)
    assert ops.nms_bev(*empty, 0.5).shape == (0,)
    assert ops.nms_bev_padded(*empty, 0.5, 3)[0].tolist() == [-1] * 3
    boxes, scores = scene(9)
    scores[:4] = math.nan
    kept = ops.nms_bev(boxes.to(device), scores.to(device), 0.5, 5)
    assert set(kept.tolist()) <= set(range(4, 9))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nms_normal_bev_is_nms_of_four_columns(dtype: torch.dtype, device: str) -> None:
    boxes, scores = (value.to(device) for value in scene(90, dtype))
    wanted = ops.nms(boxes[:, :4], scores, 0.2)
    assert torch.equal(ops.nms_normal_bev(boxes, scores, 0.2), wanted)
    indices, count = ops.nms_normal_bev_padded(boxes, scores, 0.2, 90)
    assert torch.equal(indices[: int(count)], wanted)
    assert (indices[int(count) :] == -1).all()


@pytest.mark.parametrize("name", ["nms_bev", "nms_normal_bev"])
def test_refuses(name: str) -> None:
    boxes, scores = scene(9)
    call = getattr(ops, name)
    for suffix, rest in (("", ()), ("_padded", (3,))):
        call = getattr(ops, name + suffix)
        with pytest.raises(ValueError, match=rf"^{name}{suffix}: boxes must have shape \(N, 5\); "):
            call(boxes[:, :4], scores, 0.5, *rest)
        with pytest.raises(ValueError, match=rf"^{name}{suffix}: scores must have shape \(9,\); "):
            call(boxes, scores[:4], 0.5, *rest)
        with pytest.raises(TypeError, match=f"^{name}{suffix}: scores must have the dtype of"):
            call(boxes, scores.double(), 0.5, *rest)
        with pytest.raises(TypeError, match=f"^{name}{suffix}: boxes must be a floating-point"):
            call(boxes.int(), scores, 0.5, *rest)
    for sizes in ((-1, None), (None, -1)):
        with pytest.raises(ValueError, match="_max_size must be at least 0; got -1"):
            ops.nms_bev(boxes, scores, 0.5, *sizes)


@pytest.mark.gpu
def test_the_padded_forms_are_captured() -> None:
    boxes, scores = (value.cuda() for value in scene(90))
    ops.nms_bev_padded(boxes, scores, 0.2, 60, 50), ops.nms_normal_bev_padded(boxes, scores, 0.2, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turned = ops.nms_bev_padded(boxes, scores, 0.2, 60, 50)
        normal = ops.nms_normal_bev_padded(boxes, scores, 0.2, 9)
    graph.replay()
    for found, wanted in (
        (turned, ops.nms_bev_padded(boxes, scores, 0.2, 60, 50)),
        (normal, ops.nms_normal_bev_padded(boxes, scores, 0.2, 9)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
