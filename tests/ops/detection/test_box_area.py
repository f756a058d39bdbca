"""box_area: notations, empty boxes, the range of float16."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from support.strategies import boxes
from torchkiln import ops
from torchkiln.reference.detection.box_area import parity


class TestBoxArea(CompositionSuite):
    parity = parity()
    dynamic: ClassVar = {"boxes": 0}
    failures = (
        Failure(
            "columns",
            {"boxes": lambda boxes: boxes[:, :3]},
            ValueError,
            r"^box_area: boxes must have shape \(\.\.\., 4\); got \(33, 3\)$",
        ),
        Failure("scalar", {"boxes": torch.tensor(1.0)}, ValueError, r"got \(\)$"),
        Failure(
            "integers",
            {"boxes": lambda boxes: boxes.long()},
            TypeError,
            r"^box_area: boxes must be a floating-point tensor; got int64\. Convert it with ",
        ),
        Failure(
            "notation",
            {"fmt": "xywhr"},
            ValueError,
            '^box_area: fmt must be "xyxy", "xywh" or "cxcywh"; got \'xywhr\'$',
        ),
    )


def test_half_types_do_not_overflow(device: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        area = ops.box_area(torch.tensor([[0, 0, 512, 512]], dtype=dtype, device=device))
        assert area.dtype == torch.float32
        assert area.item() == 512**2


@given(boxes())
def test_is_the_same_in_each_notation(rows: Tensor) -> None:
    for form in ("xywh", "cxcywh"):
        area = ops.box_area(ops.box_convert(rows, "xyxy", form), form)
        torch.testing.assert_close(area, ops.box_area(rows))
