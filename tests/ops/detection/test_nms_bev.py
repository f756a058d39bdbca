"""nms_bev, nms_normal_bev and their padded forms: other notations of nms_rotated and nms."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from support.op_suite import CompositionSuite
from torchkiln import ops, reference
from torchkiln.reference.detection.nms_bev import parities
from torchkiln.testing import Inputs

PARITIES = {parity.op: parity for parity in parities()}

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


class _Suite(CompositionSuite):
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0}


class TestNmsBevPadded(_Suite):
    parity = PARITIES["nms_bev_padded"]


class TestNmsNormalBevPadded(_Suite):
    parity = PARITIES["nms_normal_bev_padded"]


_WAITS: dict[str, str] = {
    **CompositionSuite.without,
    "cuda_graph": "waits for the number of boxes that are kept",
}


class TestNmsBev(_Suite):
    parity = PARITIES["nms_bev"]
    without: ClassVar = _WAITS


class TestNmsNormalBev(_Suite):
    parity = PARITIES["nms_normal_bev"]
    without: ClassVar = _WAITS


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


def test_nan_scores_come_after_minus_infinity(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1, 0], [5.0, 5, 6, 6, 0]], device=device)
    scores = torch.tensor([math.nan, -math.inf], device=device)
    assert ops.nms_bev(boxes, scores, 0.5, pre_max_size=1).tolist() == [1]
    assert ops.nms_bev(boxes, scores, 0.5).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["nms_bev", "nms_normal_bev"])
def test_autocast_takes_two_dtypes(name: str, device: str) -> None:
    boxes, scores = (value.to(device) for value in scene(60))
    for suffix, rest in (("", ()), ("_padded", (60,))):
        call = getattr(ops, name + suffix)
        expected = call(boxes, scores.bfloat16().float(), 0.2, *rest)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = call(boxes, scores.bfloat16(), 0.2, *rest)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["nms_bev", "nms_normal_bev"])
def test_labels(name: str, device: str) -> None:
    """Inside of each label, as if it were alone."""
    boxes, scores = (value.to(device) for value in scene(90))
    labels = Inputs().integers(90, high=3).int().to(device)
    call, padded = getattr(ops, name), getattr(ops, name + "_padded")
    wanted: list[int] = []
    for label in range(3):
        rows = (labels == label).nonzero().squeeze(1)
        wanted += rows[call(boxes[rows], scores[rows], 0.2)].tolist()
    wanted.sort(key=lambda row: -float(scores[row]))
    assert call(boxes, scores, 0.2, labels=labels).tolist() == wanted
    indices, count = padded(boxes, scores, 0.2, 90, labels=labels)
    assert indices[: int(count)].tolist() == wanted
    with pytest.raises(TypeError, match=rf"^{name}: labels must be an integer tensor; got float32"):
        call(boxes, scores, 0.2, labels=scores)
    with pytest.raises(ValueError, match=rf"^{name}: labels must have shape \(90,\); got \(3,\)$"):
        call(boxes, scores, 0.2, labels=labels[:3])


@pytest.mark.parametrize("name", ["nms_bev", "nms_bev_padded", "nms_normal_bev_padded"])
def test_errors_name_the_function(name: str) -> None:
    boxes, scores = scene(9)
    most = (3,) if name.endswith("padded") else ()
    with pytest.raises(ValueError, match=f"^{name}: iou_threshold must be a number; got nan$"):
        getattr(ops, name)(boxes, scores, math.nan, *most)
    if most:
        with pytest.raises(ValueError, match=f"^{name}: max_output must be at least 0; got -1$"):
            getattr(ops, name)(boxes, scores, 0.5, -1)
        with pytest.raises(ValueError, match=rf"^{name}: max_output must be at most 2\^30; got"):
            getattr(ops, name)(boxes, scores, 0.5, 2**40)
