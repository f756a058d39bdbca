"""masks_to_boxes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import CompositionSuite, Failure
from support.strategies import seeds
from torchkiln.ops import masks_to_boxes
from torchkiln.reference.detection.masks_to_boxes import parity
from torchkiln.testing import Inputs


class TestMasksToBoxes(CompositionSuite):
    parity = parity()
    dynamic: ClassVar = {"masks": 0}
    failures = (
        Failure(
            "two_dimensions",
            {"masks": lambda masks: masks[0]},
            ValueError,
            r"^masks_to_boxes: masks must have shape \(N, H, W\); got \(9, 14\)$",
        ),
        Failure("none", {"masks": None}, TypeError, "masks must be a tensor; got None$"),
    )


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_a_filled_box_is_found(seed: int, height: int, width: int) -> None:
    y1, x1 = Inputs(seed).integers(2, high=20).tolist()
    masks = torch.zeros(2, 40, 40)
    masks[1, y1 : y1 + height, x1 : x1 + width] = 1
    expected = [[0, 0, 0, 0], [x1, y1, x1 + width - 1, y1 + height - 1]]
    assert masks_to_boxes(masks).tolist() == expected
