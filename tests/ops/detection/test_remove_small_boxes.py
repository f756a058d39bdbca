"""remove_small_boxes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from support.strategies import boxes
from torchkiln import reference
from torchkiln.ops import remove_small_boxes
from torchkiln.reference.detection.remove_small_boxes import parity


class TestRemoveSmallBoxes(CompositionSuite):
    parity = parity()
    dynamic: ClassVar = {"boxes": 0}
    without: ClassVar = {
        **CompositionSuite.without,
        "cuda_graph": "the size of the result depends on data",
    }
    failures = (
        Failure(
            "columns",
            {"boxes": lambda boxes: boxes[:, :3]},
            ValueError,
            r"^remove_small_boxes: boxes must have shape \(\.\.\., 4\); got \(65, 3\)$",
        ),
        Failure(
            "one_dimension",
            {"boxes": lambda boxes: boxes[0]},
            ValueError,
            r"^remove_small_boxes: boxes must have shape \(N, 4\); got \(4,\)$",
        ),
        Failure("nan", {"min_size": math.nan}, ValueError, "min_size must be a number; got nan$"),
        Failure("none", {"boxes": None}, TypeError, "boxes must be a tensor; got None$"),
    )


def test_a_side_of_the_minimum_is_enough(device: str) -> None:
    rows = torch.tensor([[0, 0, 2, 3.0], [0, 0, 2, 1.99]], device=device)
    assert remove_small_boxes(rows, 2).tolist() == [0]


def test_a_side_between_infinities_is_small(device: str) -> None:
    rows = torch.tensor([[0, math.inf, 2, math.inf]], device=device)
    assert remove_small_boxes(rows, -1).tolist() == []
    assert reference.remove_small_boxes(rows, -1).tolist() == []


@given(boxes())
def test_a_larger_minimum_keeps_fewer(rows: Tensor) -> None:
    kept = remove_small_boxes(rows, 1)
    fewer = remove_small_boxes(rows[kept], 2)
    assert torch.equal(kept[fewer], remove_small_boxes(rows, 2))


def test_compiles_with_a_number_of_the_call() -> None:
    rows = torch.tensor([[0, 0, 2, 3.0], [0, 0, 2, 1.99]])
    compiled = torch.compile(remove_small_boxes, backend="eager", fullgraph=True, dynamic=True)
    assert compiled(rows, 2.0).tolist() == [0]
    assert compiled(rows, 1.5).tolist() == [0, 1]


def test_refuses_an_integer_beyond_64_bits() -> None:
    with pytest.raises(TypeError, match=f"min_size must be a number; got {2**63}$"):
        remove_small_boxes(torch.zeros(1, 4), 2**63)


def test_refuses_a_word() -> None:
    with pytest.raises(
        TypeError, match=r"^remove_small_boxes: min_size must be a number; got 'a'$"
    ):
        remove_small_boxes(torch.zeros(1, 4), "a")  # type: ignore[arg-type]
