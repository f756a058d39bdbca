"""box_iou and its generalized, distance and complete forms."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import boxes
from torchkiln import ops, reference
from torchkiln.reference.detection.box_iou import parity
from torchkiln.testing import Inputs, _scenes


class TestBoxIou(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"boxes1": 0, "boxes2": 0}
    failures = (
        Failure(
            "three_columns",
            {"boxes1": lambda boxes: boxes[:, :3]},
            ValueError,
            r"^box_iou: boxes1 must have shape \(N, 4\); got \(64, 3\)$",
        ),
        Failure(
            "one_dimension",
            {"boxes2": lambda boxes: boxes[0]},
            ValueError,
            r"^box_iou: boxes2 must have shape \(N, 4\); got \(4,\)$",
        ),
        Failure(
            "integers",
            {"boxes1": lambda boxes: boxes.int()},
            TypeError,
            r"^box_iou: boxes1 must be a floating-point tensor; got int32\. Convert it with ",
        ),
        Failure(
            "two_dtypes",
            {"boxes2": lambda boxes: boxes.half()},
            TypeError,
            r"^box_iou: boxes2 must have the dtype of boxes1 \(float32\); got float16$",
        ),
        Failure("none", {"boxes1": None}, TypeError, "^box_iou: boxes1 must be a tensor; got None"),
        Failure(
            "text", {"boxes2": "boxes"}, TypeError, "^box_iou: boxes2 must be a tensor; got str$"
        ),
        Failure(
            "another_form",
            {"boxes1": lambda boxes: boxes[:, :2]},
            ValueError,
            r"^box_iou: boxes1 must have shape",
            function="complete_box_iou",
        ),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Tensor]:
        return {"boxes1": new.boxes(n), "boxes2": new.boxes(n + 3)}

    @pytest.mark.gpu
    def test_refuses_two_devices(self) -> None:
        on_cpu = torch.zeros(2, 4)
        with pytest.raises(ValueError, match="boxes2 must be on the device of boxes1"):
            ops.box_iou(on_cpu, on_cpu.cuda())

    @given(boxes(), boxes())
    def test_is_symmetric(self, boxes1: Tensor, boxes2: Tensor) -> None:
        for name in self.parity.functions:
            form = getattr(ops, name)
            torch.testing.assert_close(form(boxes1, boxes2), form(boxes2, boxes1).T)

    @given(boxes(), boxes())
    def test_stays_in_its_range(self, boxes1: Tensor, boxes2: Tensor) -> None:
        iou = ops.box_iou(boxes1, boxes2)
        assert bool(((iou >= 0) & (iou <= 1)).all())
        assert bool((ops.generalized_box_iou(boxes1, boxes2).abs() <= 1).all())
        assert bool((ops.distance_box_iou(boxes1, boxes2) <= iou).all())

    @given(boxes(min_count=1))
    def test_is_one_with_itself(self, rows: Tensor) -> None:
        solid = rows[((rows[:, 2:] - rows[:, :2]) > 0).all(1)]
        for name in self.parity.functions:
            diagonal = getattr(ops, name)(solid, solid).diagonal()
            torch.testing.assert_close(diagonal, torch.ones_like(diagonal))

    @given(boxes(), boxes())
    def test_moves_with_the_boxes(self, boxes1: Tensor, boxes2: Tensor) -> None:
        moved = ops.complete_box_iou(boxes1 + 3, boxes2 + 3)
        torch.testing.assert_close(moved, ops.complete_box_iou(boxes1, boxes2))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # By hand: union 7, intersection 1; the box around both has area 9, squared diagonal 18,
        # and the centres are sqrt(2) apart. Both are squares: no aspect term.
        (0, 1 / 7),
        (1, 1 / 7 - 2 / 9),
        (2, 1 / 7 - 2 / 18),
        (3, 1 / 7 - 2 / 18),
    ],
)
def test_reference_by_hand(mode: int, expected: float) -> None:
    a = torch.tensor([[0, 0, 2, 2]], dtype=torch.float64)
    iou = reference.box_iou(a, a + 1, mode, 0.0)
    torch.testing.assert_close(iou, torch.tensor([[expected]], dtype=torch.float64))


def test_reference_aspect_by_hand() -> None:
    # Equal centres; 1 by 1 in sqrt(3) by 1, whose diagonal angles are 45 and 60 degrees.
    a = torch.tensor([[-0.5, -0.5, 0.5, 0.5]], dtype=torch.float64)
    b = a * torch.tensor([3**0.5, 1, 3**0.5, 1], dtype=torch.float64)
    iou, v = 3**-0.5, 4 * (1 / 12) ** 2
    expected = torch.tensor([[iou - v * v / (1 - iou + v)]], dtype=torch.float64)
    torch.testing.assert_close(reference.box_iou(a, b, 3, 0.0), expected)


@pytest.mark.parametrize("fmt", ["xyxy", "xywh", "cxcywh", "xywhr", "cxcywhr", "xyxyxyxy"])
def test_notations(fmt: str, device: str) -> None:
    """The same boxes in each notation: upright ones, which the rotated notations turn by 30."""
    new = Inputs()
    sets = [new.boxes(count, 30.0).to(device) for count in (7, 9)]
    if fmt in ("xyxy", "xywh", "cxcywh"):
        expected = ops.box_iou(*sets)
        sets = [ops.box_convert(boxes, "xyxy", fmt) for boxes in sets]
    else:
        turned = [
            torch.cat(
                [ops.box_convert(boxes, "xyxy", "cxcywh"), torch.full_like(boxes[:, :1], 30)], 1
            )
            for boxes in sets
        ]
        radians = torch.tensor([1, 1, 1, 1, math.pi / 180], device=device).double()
        expected = ops.box_iou_rotated(*(boxes * radians for boxes in turned), clockwise=False)
        sets = [ops.box_convert(boxes, "cxcywhr", fmt) for boxes in turned]
    assert 0 < expected.count_nonzero() < expected.numel()
    torch.testing.assert_close(ops.box_iou(*sets, fmt), expected)
    torch.testing.assert_close(
        ops.box_iou(*(boxes.float() for boxes in sets), fmt), expected.float()
    )
    aligned = ops.box_iou(sets[0], sets[1][:7], fmt, aligned=True)
    torch.testing.assert_close(aligned, expected[:, :7].diagonal())
    half = [boxes.half() for boxes in sets]
    assert ops.box_iou(*half, fmt).dtype == torch.float16
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.box_iou(half[0], sets[1].float(), fmt).dtype == torch.float32


def test_notations_refuse() -> None:
    a = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r'^box_iou: fmt must be "xyxy", .* got \'yxyx\'$'):
        ops.box_iou(a, a, "yxyx")
    with pytest.raises(
        ValueError, match=r"^box_iou: boxes1 must have shape \(\.\.\., 8\); got \(2, 5\)"
    ):
        ops.box_iou(a, a, "xyxyxyxy")
    with pytest.raises(ValueError, match=r'^box_iou: mode for "cxcywhr" must be "iou" or "iof"; '):
        ops.box_iou(a, a, "cxcywhr", mode="giou")
    with pytest.raises(ValueError, match=r'^box_iou: offset must be 0 for "xywhr"; got 1'):
        ops.box_iou(a, a, "xywhr", offset=1.0)


def test_the_order_of_the_union_has_the_least_rounding(device: str) -> None:
    """A mean error below that of the formula as it is written; a box and itself have 1."""
    sets = [_scenes.uniform_boxes(count, seed=count) for count in (2000, 100)]

    def iou(first: Tensor, second: Tensor) -> Tensor:
        low = torch.maximum(first[:, None, :2], second[:, :2])
        sides = (torch.minimum(first[:, None, 2:], second[:, 2:]) - low).clamp(min=0)
        areas = [(each[:, 2:] - each[:, :2]).prod(1) for each in (first, second)]
        return sides.prod(2) / (areas[0][:, None] + areas[1] - sides.prod(2))

    exact = iou(*(boxes.double() for boxes in sets))
    own = ops.box_iou(*(boxes.to(device) for boxes in sets)).cpu()
    errors = [(answer.double() - exact).abs().mean() for answer in (own, iou(*sets))]
    assert errors[0] < 0.97 * errors[1]
    boxes = sets[0].to(device)
    # Their union is exactly the box; the GPU's quick division is within two units.
    units = 0 if device == "cpu" else 2
    own = ops.box_iou(boxes, boxes).diagonal()
    assert (own - 1).abs().max() <= units * torch.finfo(own.dtype).eps


@pytest.mark.gpu
def test_more_pairs_than_32_bits_count() -> None:
    rows = Inputs().boxes(46_400).half().cuda()  # 2.15 billion pairs, 4.3 GB
    overlaps = ops.box_iou(rows, rows)
    for row in (0, -1):
        assert torch.equal(overlaps[row], ops.box_iou(rows[row][None], rows)[0])
