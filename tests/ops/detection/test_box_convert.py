"""box_convert: all pairs of notations, by hand, there and back."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from support.strategies import boxes
from torchkiln import reference
from torchkiln.ops import box_convert
from torchkiln.reference.detection.box_convert import parity
from torchkiln.testing import Inputs


class TestBoxConvert(CompositionSuite):
    parity = parity()
    dynamic: ClassVar = {"boxes": 0}
    failures = (
        Failure(
            "columns",
            {"boxes": lambda boxes: boxes[:, :4]},
            ValueError,
            r"^box_convert: boxes must have shape \(\.\.\., 5\); got \(9, 4\)$",
        ),
        Failure(
            "integers",
            {"boxes": lambda boxes: boxes.int()},
            TypeError,
            r"^box_convert: boxes must be a floating-point tensor; got int32\. Convert it with ",
        ),
        Failure("none", {"boxes": None}, TypeError, "boxes must be a tensor; got None"),
        Failure(
            "notation",
            {"in_fmt": "xxyy"},
            ValueError,
            '^box_convert: in_fmt must be "xyxy", "xywh", .* or "xyxyxyxy"; got \'xxyy\'$',
        ),
        Failure(
            "another_kind",
            {"out_fmt": "xyxy"},
            ValueError,
            "^box_convert: out_fmt must be rotated, as in_fmt \"xywhr\" is; got 'xyxy'$",
        ),
    )


@pytest.mark.parametrize("convert", [box_convert, reference.box_convert])
def test_by_hand(convert: object) -> None:
    assert callable(convert)
    # 4 wide and 2 high; a quarter turn to the left about its upper left corner.
    box = torch.tensor([10.0, 20.0, 4.0, 2.0, 90.0], dtype=torch.float64)
    corners = torch.tensor([10, 20, 10, 16, 12, 16, 12, 20], dtype=torch.float64)
    torch.testing.assert_close(convert(box, "xywhr", "xyxyxyxy"), corners)
    centred = torch.tensor([11, 18, 4, 2, 90], dtype=torch.float64)
    torch.testing.assert_close(convert(box, "xywhr", "cxcywhr"), centred)
    torch.testing.assert_close(convert(corners, "xyxyxyxy", "cxcywhr"), centred)


def test_the_same_notation_is_a_copy(device: str) -> None:
    rows = torch.ones(2, 4, device=device)
    assert box_convert(rows, "xyxy", "xyxy").data_ptr() != rows.data_ptr()


def test_boxes_of_no_size_have_finite_gradients(device: str) -> None:
    corners = torch.ones(3, 8, device=device, requires_grad=True)
    for form in ("xywhr", "cxcywhr"):
        (grad,) = torch.autograd.grad(box_convert(corners, "xyxyxyxy", form).sum(), corners)
        assert grad.isfinite().all()


def test_half_types_are_computed_in_float32(device: str) -> None:
    # 2 * 40,000 is beyond float16.
    rows = torch.tensor([[40_000.0, 0, 50_000, 8]], device=device, dtype=torch.float16)
    assert box_convert(rows, "xyxy", "cxcywh")[0, 0] == 44_992  # float16's nearest to 45,000


@given(boxes())
def test_there_and_back(rows: Tensor) -> None:
    for form in ("xywh", "cxcywh"):
        back = box_convert(box_convert(rows, "xyxy", form), form, "xyxy")
        torch.testing.assert_close(back, rows)
    angle = Inputs(rows.shape[0]).uniform(rows.shape[0], 1, low=-179, high=179)
    turned = torch.cat([rows[:, :2], rows[:, 2:] + 1, angle], 1)
    for form in ("cxcywhr", "xyxyxyxy"):
        back = box_convert(box_convert(turned, "xywhr", form), form, "xywhr")
        torch.testing.assert_close(back, turned)
