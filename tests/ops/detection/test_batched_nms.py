"""batched_nms and batched_nms_padded: every type, with and without classes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from torchkiln import ops
from torchkiln.reference.detection.batched_nms import parity
from torchkiln.testing import Inputs

TYPES = (
    "nms",
    "soft_nms",
    "nms_rotated",
    "nms_quadri",
    "nms_bev",
    "nms_normal_bev",
    "nms3d",
    "nms3d_normal",
)


def _rows(type: str, count: int, new: Inputs) -> Tensor:
    """The same boxes as each type wants them."""
    corners = new.boxes(count, 40.0).float()
    center, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    still = torch.zeros(count, 1)
    if type == "nms_rotated":
        return torch.cat([center, size, still], 1)
    if type == "nms_quadri":
        return corners[:, [0, 1, 2, 1, 2, 3, 0, 3]]
    if type.endswith("bev"):
        return torch.cat([corners, still], 1)
    if type.startswith("nms3d"):
        return torch.cat([center, still, size, still + 1, still], 1)
    return corners


class TestBatchedNmsPadded(CompositionSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0, "idxs": 0}
    failures = (
        Failure(
            "type", {"type": "nmms"}, ValueError, "^batched_nms_padded: type must be .* got 'nmms'"
        ),
        Failure(
            "option",
            {"sigma": 0.5},
            TypeError,
            "^batched_nms_padded: options of type 'nms' must be offset and score_threshold; "
            "got sigma$",
        ),
        Failure("max_output", {"max_output": -1}, ValueError, "max_output must be .* got -1$"),
        Failure(
            "huge", {"max_output": 2**40}, ValueError, r"max_output must be at most 2\^30; got "
        ),
    )


@pytest.mark.parametrize("type", TYPES)
def test_every_type_keeps_what_nms_keeps(type: str, device: str) -> None:
    new = Inputs()
    scores, idxs = new.uniform(90).float(), new.integers(90, high=4)
    arguments = [value.to(device) for value in (_rows(type, 90, Inputs(1)), scores, idxs)]
    corners = _rows("nms", 90, Inputs(1))
    for agnostic in (False, True):
        expected = _by_class(corners, scores, idxs, agnostic)
        options: dict[str, Any] = {"type": type, "class_agnostic": agnostic}
        if type == "soft_nms":
            options |= {"method": "naive", "min_score": 1e-9}
        assert ops.batched_nms(*arguments, 0.3, **options).tolist() == expected
        assert 5 < len(expected) < 90
        assert ops.batched_nms(*arguments, 0.3, split_thr=9, **options).tolist() == expected
        assert ops.batched_nms(*arguments, 0.3, max_output=5, **options).tolist() == expected[:5]
        indices, count = ops.batched_nms_padded(*arguments, 0.3, 100, **options)
        assert indices.tolist() == expected + [-1] * (100 - len(expected))
        assert count.item() == len(expected)
        assert ops.batched_nms_padded(*arguments, 0.3, 5, **options)[0].tolist() == expected[:5]


def _by_class(corners: Tensor, scores: Tensor, idxs: Tensor, agnostic: bool) -> list[int]:
    if agnostic:
        return ops.nms(corners, scores, 0.3).tolist()
    kept = []
    for label in idxs.unique():
        rows = (idxs == label).nonzero().squeeze(1)
        kept += rows[ops.nms(corners[rows], scores[rows], 0.3)].tolist()
    return sorted(kept, key=lambda row: -float(scores[row]))


def test_options_of_the_types() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [1.0, 0, 2, 1], [9.0, 9, 10, 10]])
    scores, idxs = torch.tensor([0.9, 0.8, 0.2]), torch.zeros(3, dtype=torch.int32)
    assert ops.batched_nms(boxes, scores, idxs, 0.3).tolist() == [0, 1, 2]
    assert ops.batched_nms(boxes, scores, idxs, 0.3, offset=1).tolist() == [0, 2]
    padded = ops.batched_nms_padded(boxes, scores, idxs, 0.3, 3, offset=1, score_threshold=0.2)
    assert padded[0].tolist() == [0, -1, -1]
    # Along one line from x towards y, or on two lines beside each other.
    turned = torch.tensor([[0.0, 0, 8, 1, math.pi / 4], [1.0, 1, 8, 1, math.pi / 4]])
    for clockwise, expected in ((True, [0]), (False, [0, 1])):
        options: dict[str, Any] = {"type": "nms_rotated", "clockwise": clockwise}
        assert ops.batched_nms(turned, scores[:2], idxs[:2], 0.5, **options).tolist() == expected
        padded = ops.batched_nms_padded(turned, scores[:2], idxs[:2], 0.5, 2, **options)
        assert padded[1].item() == len(expected)


def test_lanes_inside_classes(device: str) -> None:
    lanes = torch.zeros(4, 8, device=device)
    lanes[:, 4], lanes[:, 5:] = 3, torch.tensor([0.0, 5, 10, 15], device=device)[:, None]
    scores = torch.tensor([0.5, 0.9, 0.6, 0.8], device=device)
    idxs = torch.tensor([0, 0, 1, 1], device=device)
    assert ops.batched_nms(lanes, scores, idxs, 6.0, type="line_nms").tolist() == [1, 3]
    found = ops.batched_nms(lanes, scores, idxs, 4.0, type="line_nms", class_agnostic=True)
    assert found.tolist() == [1, 3, 2, 0]
    idxs = torch.tensor([0, 1, 2, 1], device=device)
    indices, count = ops.batched_nms_padded(lanes, scores, idxs, 6.0, 4, type="line_nms")
    assert indices.tolist() == [1, 3, 2, 0]
    assert count.item() == 4


def test_soft_nms_sorts_by_the_new_scores(device: str) -> None:
    rows = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [5, 0, 9, 4]], device=device)
    scores, idxs = torch.tensor([0.5, 0.9, 0.3], device=device), torch.zeros(3, device=device).int()
    assert ops.batched_nms(rows, scores, idxs, 0.5, type="soft_nms").tolist() == [1, 2, 0]
    options: dict[str, Any] = {"type": "soft_nms", "method": "naive"}
    assert ops.batched_nms_padded(rows, scores, idxs, 0.5, 3, **options)[0].tolist() == [1, 2, -1]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"type": "nms4d"}, ValueError, '^batched_nms: type must be "nms", .* or "line_nms"; '),
        (
            {"type": "nms_quadri", "clockwise": True},
            TypeError,
            "^batched_nms: options of type 'nms_quadri' must be none; got clockwise$",
        ),
        (
            {"foo": 1},
            TypeError,
            "^batched_nms: options of type 'nms' must be offset and score_threshold; got foo$",
        ),
        ({"split_thr": -1}, ValueError, "^batched_nms: split_thr must be at least 0; got -1$"),
        ({"split_thr": "x"}, TypeError, "^batched_nms: split_thr must be an integer; got 'x'$"),
        ({"max_output": 1.5}, TypeError, r"^batched_nms: max_output must be an integer; got 1\.5$"),
        ({"type": "nms_quadri", "max_output": -1}, ValueError, "max_output must be at least 0"),
        ({"max_output": -1}, ValueError, "^batched_nms: max_output must be at least 0; got -1$"),
        ({"offset": -1.0}, ValueError, "^batched_nms: offset must be a finite number of at least"),
        (
            {"score_threshold": math.nan},
            ValueError,
            "^batched_nms: score_threshold must be a number; got nan$",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.batched_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3).int(), 0.5, **options)


def test_no_classes_are_not_one_class() -> None:
    boxes, scores = torch.zeros(3, 4), torch.zeros(3)
    with pytest.raises(TypeError, match=r"^batched_nms: idxs must be a tensor; got None$"):
        ops.batched_nms(boxes, scores, None, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^batched_nms_padded: idxs must be a tensor; got None$"):
        ops.batched_nms_padded(boxes, scores, None, 0.5, 3)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES)
def test_the_padded_form_is_captured(type: str) -> None:
    scores, idxs = Inputs().uniform(90).float().cuda(), Inputs().integers(90, high=4).cuda()
    rows = _rows(type, 90, Inputs(1)).cuda()
    expected = ops.batched_nms_padded(rows, scores, idxs, 0.3, 60, type=type)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.batched_nms_padded(rows, scores, idxs, 0.3, 60, type=type)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
