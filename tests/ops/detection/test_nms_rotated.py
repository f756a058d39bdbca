"""nms_rotated, nms_quadri, nms3d, nms3d_normal and their padded forms."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import counts, seeds
from torchkiln import ops, reference
from torchkiln.reference.detection import nms_rotated as declared
from torchkiln.reference.detection.box_iou_rotated import corners
from torchkiln.testing import Inputs

PARITIES = {parity.op: parity for parity in declared.parities()}


class _Suite(OpSuite):
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0}

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        columns = self.parity.cases[0].make(new)["boxes"].shape[1]
        return {
            "boxes": new.uniform(n, columns, low=1, high=9),
            "scores": new.uniform(n),
            "iou_threshold": 0.5,
            "max_output": 7,
        }


def _waits(op: str) -> dict[str, str]:
    return {f"cuda_graph[{op}]": "waits for the number of boxes that are kept"}


class TestNmsRotated(_Suite):
    parity = PARITIES["nms_rotated"]
    without: ClassVar = _waits("nms_rotated")
    failures = (
        Failure(
            "four_columns",
            {"boxes": lambda boxes: boxes[:, :4]},
            ValueError,
            r"^nms_rotated: boxes must have shape \(N, 5\); got \(70, 4\)$",
            function="nms_rotated",
        ),
        Failure(
            "floating_labels",
            {"labels": torch.zeros(70)},
            TypeError,
            r"^nms_rotated: labels must be an integer tensor; got float32\. "
            r"Convert it with labels\.long\(\)$",
            function="nms_rotated",
        ),
        Failure(
            "too_few_labels",
            {"labels": torch.zeros(9, dtype=torch.int64)},
            ValueError,
            r"^nms_rotated_padded: labels must have shape \(70,\); got \(9,\)$",
        ),
        Failure(
            "threshold_is_nan",
            {"iou_threshold": math.nan},
            ValueError,
            "^nms_rotated_padded: iou_threshold must be a number; got nan$",
        ),
        Failure(
            "negative_output",
            {"max_output": -1},
            ValueError,
            "^nms_rotated_padded: max_output must be at least 0; got -1$",
        ),
    )

    @given(counts, seeds)
    def test_not_turned_is_nms(self, count: int, seed: int) -> None:
        new = Inputs(seed)
        corners, scores = new.boxes(count, 20.0), new.uniform(count)
        sizes = corners[:, 2:] - corners[:, :2]
        turned = torch.cat([corners[:, :2] + sizes / 2, sizes, torch.zeros(count, 1)], 1)
        expected = ops.nms(corners, scores, 0.3217)
        assert torch.equal(ops.nms_rotated(turned, scores, 0.3217), expected)
        assert torch.equal(ops.nms_rotated(turned, scores, 0.3217, clockwise=False), expected)

    @given(counts, st.booleans(), seeds)
    def test_labels_are_one_call_each(self, count: int, clockwise: bool, seed: int) -> None:
        new = Inputs(seed)
        boxes, scores = new.uniform(count, 5, low=1, high=9), new.uniform(count)
        labels = new.integers(count, high=3)
        kept = ops.nms_rotated(boxes, scores, 0.3, labels, clockwise)
        parts = [torch.empty(0, dtype=torch.int64)]
        for value in labels.unique():
            members = (labels == value).nonzero()[:, 0]
            part = ops.nms_rotated(boxes[members], scores[members], 0.3, None, clockwise)
            parts.append(members[part])
        joined = torch.cat(parts)
        assert torch.equal(kept, joined[scores[joined].argsort(descending=True)])

    def test_the_sense_of_an_angle(self, device: str) -> None:
        """Two long boxes along one diagonal, or crossing."""
        boxes = torch.tensor([[0.0, 0, 10, 1, math.pi / 4], [3.0, 3, 10, 1, math.pi / 4]])
        boxes, scores = boxes.to(device), torch.tensor([0.9, 0.8], device=device)
        assert ops.nms_rotated(boxes, scores, 0.3).tolist() == [0]
        assert ops.nms_rotated(boxes, scores, 0.3, clockwise=False).tolist() == [0, 1]

    def test_far_from_the_origin_nothing_is_lost(self, device: str) -> None:
        """What does not overlap is kept, whatever the size of the coordinates."""
        step = torch.arange(50.0, device=device)
        boxes = torch.stack([step * 8, step * 0, step * 0 + 6, step * 0 + 4, step / 7], 1)
        boxes[:, :2] += 1e5
        scores = torch.linspace(1, 0, 50, device=device)
        assert ops.nms_rotated(boxes, scores, 0.0).tolist() == list(range(50))

    @pytest.mark.gpu
    @pytest.mark.parametrize("count", [1, 64, 2000, 5000])
    @pytest.mark.parametrize("labels", [0, 15])
    def test_cuda_keeps_what_the_cpu_keeps(self, count: int, labels: int) -> None:
        workload = self.parity.workloads[0]
        made = workload.arguments({"boxes": count}, torch.float32, "contiguous", "cpu")
        classes = Inputs().integers(count, high=labels) if labels else None
        expected = ops.nms_rotated(made["boxes"], made["scores"], 0.1234, classes)
        on_gpu = None if classes is None else classes.cuda()
        actual = ops.nms_rotated(made["boxes"].cuda(), made["scores"].cuda(), 0.1234, on_gpu)
        assert torch.equal(actual.cpu(), expected)


class TestNmsQuadri(_Suite):
    parity = PARITIES["nms_quadri"]
    without: ClassVar = _waits("nms_quadri")
    failures = (
        Failure(
            "five_columns",
            {"boxes": lambda boxes: boxes[:, :5]},
            ValueError,
            r"^nms_quadri: boxes must have shape \(N, 8\); got \(70, 5\)$",
            function="nms_quadri",
        ),
    )

    @given(counts, seeds)
    def test_rectangles_are_rotated_boxes(self, count: int, seed: int) -> None:
        new = Inputs(seed)
        boxes, scores = new.uniform(count, 5, low=1, high=9), new.uniform(count)
        vertices = reference.detection.box_iou_rotated.corners(boxes).flatten(1)
        expected = ops.nms_rotated(boxes, scores, 0.3217)
        assert torch.equal(ops.nms_quadri(vertices, scores, 0.3217), expected)

    def test_concave(self, device: str) -> None:
        """A dart, and a box in its notch."""
        dart = [0.0, 0, 4, 2, 0, 4, 1, 2]
        boxes = torch.tensor([dart, [0, 1.9, 0.8, 1.9, 0.8, 2.1, 0, 2.1]], device=device)
        assert ops.nms_quadri(boxes, boxes[:, 2], 0.001).tolist() == [0, 1]


class TestNms3d(_Suite):
    parity = PARITIES["nms3d"]
    without: ClassVar = _waits("nms3d")
    failures = (
        Failure(
            "five_columns",
            {"boxes": lambda boxes: boxes[:, :5]},
            ValueError,
            r"^nms3d: boxes must have shape \(N, 7\); got \(70, 5\)$",
            function="nms3d",
        ),
    )

    def test_heights_do_not_count(self, device: str) -> None:
        boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0.3], [0, 0, 99, 4, 2, 5, 0.3]], device=device)
        assert ops.nms3d(boxes, boxes[:, 2], 0.5).tolist() == [1]


class TestNms3dNormal(_Suite):
    parity = PARITIES["nms3d_normal"]
    without: ClassVar = _waits("nms3d_normal")
    failures = (
        Failure(
            "integers",
            {"boxes": lambda boxes: boxes.int()},
            TypeError,
            r"^nms3d_normal: boxes must be a floating-point tensor; got int32\. ",
            function="nms3d_normal",
        ),
    )


@pytest.mark.parametrize("op", list(PARITIES))
@given(count=counts, max_output=st.integers(0, 50), with_labels=st.booleans(), seed=seeds)
def test_padded_is_the_same(
    op: str, count: int, max_output: int, with_labels: bool, seed: int
) -> None:
    new = Inputs(seed)
    case = PARITIES[op].cases[0].make(new)
    boxes: Tensor = case["boxes"][:count]
    scores = new.uniform(boxes.shape[0])
    labels = new.integers(boxes.shape[0], high=3) if with_labels else None
    kept = getattr(ops, op)(boxes, scores, 0.2, labels)[:max_output]
    indices, count_kept = getattr(ops, f"{op}_padded")(boxes, scores, 0.2, max_output, labels)
    assert count_kept.item() == kept.shape[0]
    assert torch.equal(indices[: kept.shape[0]], kept)
    assert bool((indices[kept.shape[0] :] == -1).all())


def test_reference_by_hand() -> None:
    # A square, the same one turned by 45 degrees (IoU 0.707), and one that touches neither.
    boxes = torch.tensor([[0.0, 0, 2, 2, 0], [0, 0, 2, 2, math.pi / 4], [9, 9, 2, 2, 0]])
    scores = torch.tensor([0.7, 0.8, 0.9])
    assert reference.nms_rotated(boxes, scores, 0.7).tolist() == [2, 1]
    assert reference.nms_rotated(boxes, scores, 0.71).tolist() == [2, 1, 0]
    labels = torch.tensor([0, 1, 1])
    assert reference.nms_rotated(boxes, scores, 0.7, labels).tolist() == [2, 1, 0]
    upright = torch.cat([boxes[:, :2], boxes[:, :1], boxes[:, 2:4], boxes[:, 2:3], boxes[:, 4:]], 1)
    assert reference.nms3d(upright, scores, 0.7).tolist() == [2, 1]
    assert reference.nms3d_normal(upright, scores, 0.99).tolist() == [2, 1]


def _apart(count: int) -> tuple[Tensor, Tensor]:
    """Rotated boxes in pairs, moved towards each other until they all but touch."""
    new = Inputs()
    first, second = declared._turned(new, count).float(), declared._turned(new, count).float()
    near, far = torch.ones(count), torch.zeros(count)
    for _ in range(24):
        middle = (near + far) / 2
        meets = (
            _gap(corners(first.double()), corners(_moved(first, second, middle).double())) < 1e-4
        )
        near, far = torch.where(meets, middle, near), torch.where(meets, far, middle)
    second = _moved(first, second, far)
    apart = _gap(corners(first.double()), corners(second.double())) > 1e-5
    return first[apart], second[apart]


def _moved(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    center = second[:, :2] + share[:, None] * (first - second)[:, :2]
    return torch.cat([center, second[:, 2:]], 1)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """The widest one across a line along a side of polygons (N, 4, 2); below 0 where they meet."""
    sides = torch.cat([polygon.roll(-1, 1) - polygon for polygon in (a, b)], 1)
    normal = torch.nn.functional.normalize(torch.stack([-sides[..., 1], sides[..., 0]], -1), dim=-1)
    a, b = normal @ a.mT, normal @ b.mT
    return torch.maximum(b.amin(2) - a.amax(2), a.amin(2) - b.amax(2)).amax(1)


@pytest.mark.parametrize("op", ["nms_rotated", "nms_quadri", "nms3d", "nms_bev", "batched_nms"])
def test_boxes_that_do_not_meet_stay_at_a_threshold_of_0(op: str, device: str) -> None:
    """Rounding must not leave them an overlap, however near they are."""
    first, second = _apart(8000)
    assert len(first) > 5000
    boxes = torch.stack([first, second], 1).flatten(0, 1)
    labels = torch.arange(len(boxes)) // 2
    options: dict[str, Any] = {}
    if op == "nms_quadri":
        boxes = corners(boxes.double()).float().flatten(1)
    elif op == "nms3d":
        height = torch.ones(len(boxes), 1)
        boxes = torch.cat([boxes[:, :2], height, boxes[:, 2:4], height, boxes[:, 4:]], 1)
    elif op == "nms_bev":
        half = boxes[:, 2:4] / 2
        boxes = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half, boxes[:, 4:]], 1)
    elif op == "batched_nms":
        options["type"] = "nms_rotated"
    name = "idxs" if op == "batched_nms" else "labels"
    options[name] = labels.to(device)
    scores = Inputs().uniform(len(boxes)).float()
    kept = getattr(ops, op)(boxes.to(device), scores.to(device), iou_threshold=0.0, **options)
    assert len(kept) == len(boxes)


_COLUMNS = {
    "nms_padded": 4,
    "soft_nms_padded": 4,
    "line_nms_padded": 9,
    "nms_rotated_padded": 5,
    "nms_quadri_padded": 8,
    "nms3d_padded": 7,
    "nms3d_normal_padded": 7,
}


@pytest.mark.parametrize("op", list(_COLUMNS))
def test_a_length_that_no_memory_has(op: str, device: str) -> None:
    boxes = torch.ones(3, _COLUMNS[op], device=device)
    threshold = {"distance" if op == "line_nms_padded" else "iou_threshold": 0.5}
    for most in (2**30 + 1, 2**40):
        sentence = (
            rf"^{op}: max_output must be at most 2\^30; got {most}\. No more rows can be kept"
        )
        with pytest.raises(ValueError, match=sentence):
            getattr(ops, op)(boxes, boxes[:, 0], max_output=most, **threshold)


def test_the_most_boxes_may_be_any_number(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [5, 5, 9, 9]], device=device)
    scores, idxs = torch.tensor([0.8, 0.9], device=device), torch.tensor([0, 1], device=device)
    assert ops.nms(boxes, scores, 0.5, max_output=2**40).tolist() == [1, 0]
    assert ops.batched_nms(boxes, scores, idxs, 0.5, max_output=2**62).tolist() == [1, 0]


@pytest.mark.parametrize("size", [2.0**-200, 2.0**-100, 2.0**200])
def test_quads_of_any_size_in_float64(size: float, device: str) -> None:
    new = Inputs()
    boxes = corners(declared._turned(new, 60)).flatten(1).to(device)
    scores = new.uniform(60).to(device)
    kept = ops.nms_quadri(boxes, scores, 0.2)
    assert len(kept) < 60
    assert torch.equal(ops.nms_quadri(size * boxes, scores, 0.2), kept)
    padded, count = ops.nms_quadri_padded(size * boxes, scores, 0.2, 60)
    assert torch.equal(padded[: int(count)], kept)
