"""line_nms, line_nms_padded and line_nms_groups."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch

from support.op_suite import Failure, OpSuite
from torchkiln import ops, reference
from torchkiln.reference.detection.line_nms import parity
from torchkiln.testing import Inputs


class TestLineNms(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0}
    without: ClassVar = {"cuda_graph[line_nms]": "waits for the number of lanes that are kept"}
    failures = (
        Failure(
            "six_columns",
            {"boxes": lambda boxes: boxes[:, :6]},
            ValueError,
            r"^line_nms: boxes must have shape \(N, 5 \+ S\) with S of at least 2; got \(70, 6\)$",
            function="line_nms",
        ),
        Failure(
            "distance_is_nan",
            {"distance": math.nan},
            ValueError,
            "^line_nms_padded: distance must be a number; got nan$",
        ),
        Failure(
            "negative_output",
            {"max_output": -1},
            ValueError,
            "^line_nms_padded: max_output must be at least 0; got -1$",
        ),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        lanes = torch.cat([new.uniform(n, 4), new.uniform(n, 9, high=8)], 1)
        return {"boxes": lanes, "scores": new.uniform(n), "distance": 2.0, "max_output": 7}

    def test_only_common_heights_count(self, device: str) -> None:
        """The same x everywhere, on heights 0 to 1, 2 to 3 and 1 to 2 of four."""
        lanes = torch.zeros(3, 9)
        lanes[:, 2], lanes[:, 4] = torch.tensor([0.0, 2 / 3, 1 / 3]), 2
        scores = torch.tensor([0.9, 0.8, 0.7])
        assert ops.line_nms(lanes.to(device), scores.to(device), 1.0).tolist() == [0, 1]

    def test_lengths_are_cut_off_and_starts_rounded(self, device: str) -> None:
        """On two of four heights: the second lane leaves the first one at the third."""
        lanes = torch.zeros(2, 9)
        lanes[0, 4], lanes[1, 4], lanes[1, 7:] = 2.9, 4, 50
        scores = torch.tensor([0.9, 0.8])
        for start, kept in ((0.0, [0]), (0.16, [0]), (0.17, [0, 1]), (1 / 3, [0, 1])):
            lanes[0, 2] = start
            assert ops.line_nms(lanes.to(device), scores.to(device), 1.0).tolist() == kept

    def test_lanes_that_start_outside(self, device: str) -> None:
        """One meets lanes inside of the image, two do not meet each other."""
        lanes = torch.zeros(3, 9)
        lanes[:, 2], lanes[:, 4] = torch.tensor([-1.0, -1.0, 0.0]), 6
        scores = torch.tensor([0.9, 0.8, 0.7])
        assert ops.line_nms(lanes.to(device), scores.to(device), 1.0).tolist() == [0, 1]


def test_reference_by_hand() -> None:
    lanes = torch.tensor([[0.0, 0, 0, 0, 3, 1, 2, 3], [0, 0, 0, 0, 3, 3, 4, 5]])
    scores = torch.tensor([0.8, 0.9])
    assert reference.line_nms(lanes, scores, 2.0).tolist() == [1, 0]
    assert reference.line_nms(lanes, scores, 2.1).tolist() == [1]


def test_parents(device: str) -> None:
    """Of lanes 5 apart in a row: the second is the best, and takes both neighbours."""
    lanes = torch.zeros(4, 8, device=device)
    lanes[:, 4], lanes[:, 5:] = 3, torch.tensor([0.0, 5, 10, 15], device=device)[:, None]
    scores = torch.tensor([0.5, 0.9, 0.6, 0.8], device=device)
    kept, parents = ops.line_nms(lanes, scores, 6.0, return_parents=True)
    # Lane 3 is as far from lane 2 as lane 1 is, which comes first.
    assert kept.tolist() == [1, 3]
    assert parents.tolist() == [0, 0, 0, 1]
    kept, parents = ops.line_nms(lanes, scores, 6.0, 1, return_parents=True)
    assert kept.tolist() == [1]
    assert parents.tolist() == [0, 0, 0, -1]
    assert ops.line_nms(lanes, scores, 6.0, 1).tolist() == [1]
    kept, parents = ops.line_nms(lanes[:0], scores[:0], 6.0, return_parents=True)
    assert kept.shape == parents.shape == (0,)
    with pytest.raises(ValueError, match=r"^line_nms: top_k must be at least 0; got -1$"):
        ops.line_nms(lanes, scores, 6.0, -1)
    with pytest.raises(TypeError, match=r"^line_nms: top_k must be an integer; got 1\.5$"):
        ops.line_nms(lanes, scores, 6.0, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^line_nms: labels must be None with return_parents"):
        ops.line_nms(lanes, scores, 6.0, labels=scores.int(), return_parents=True)
