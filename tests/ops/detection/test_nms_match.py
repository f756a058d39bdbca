"""nms_groups and nms_match."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import CompositionSuite, Failure, OpSuite
from support.strategies import boxes, seeds
from torchkiln import ops, reference
from torchkiln.reference.detection.nms_match import parities
from torchkiln.testing import Inputs

PARITIES = {parity.op: parity for parity in parities()}


class TestNmsGroups(OpSuite):
    parity = PARITIES["nms_groups"]
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0}
    failures = (
        Failure(
            "three_columns",
            {"boxes": lambda boxes: boxes[:, :3]},
            ValueError,
            r"^nms_groups: boxes must have shape \(N, 4\); got \(70, 3\)$",
        ),
        Failure(
            "threshold_is_nan",
            {"iou_threshold": math.nan},
            ValueError,
            "^nms_groups: iou_threshold must be a number; got nan$",
        ),
    )


class TestNmsMatch(CompositionSuite):
    parity = PARITIES["nms_match"]
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0}
    failures = (
        Failure(
            "three_columns",
            {"boxes": lambda boxes: boxes[:, :3]},
            ValueError,
            r"boxes must have shape \(N, 4\); got \(70, 3\)$",
        ),
    )
    without: ClassVar = {
        **CompositionSuite.without,
        **dict.fromkeys(
            ("fake_equals_real", "one_graph_for_all_sizes", "compiles", "cuda_graph"),
            "how many groups there are, nobody knows before; nms_groups has fixed sizes",
        ),
    }

    @given(boxes(), seeds)
    def test_groups_of_nms(self, rows: Tensor, seed: int) -> None:
        """Where no IoU equals the threshold, nms keeps the first of each group."""
        scores = Inputs(seed).uniform(rows.shape[0])
        groups = ops.nms_match(rows, scores, 0.4321)
        assert [int(group[0]) for group in groups] == ops.nms(rows, scores, 0.4321).tolist()
        assert sorted(int(row) for group in groups for row in group) == list(range(len(rows)))
        for group in groups:
            assert bool((scores[group][1:] <= scores[group][:-1]).all())
            overlaps = ops.box_iou(rows[group[:1]], rows[group[1:]])
            assert bool((overlaps >= 0.4321).all())

    @given(boxes(), seeds)
    def test_list_and_numbers_agree(self, rows: Tensor, seed: int) -> None:
        scores = Inputs(seed).integers(rows.shape[0], high=5).double()
        order, numbers, count = ops.nms_groups(rows, scores, 0.5)
        listed = ops.nms_match(rows, scores, 0.5)
        assert len(listed) == count
        for number, group in enumerate(listed):
            assert torch.equal(group, order[numbers == number])

    def test_the_threshold_itself_joins(self, device: str) -> None:
        rows = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]], device=device)
        scores = torch.tensor([0.9, 0.8], device=device)
        assert [group.tolist() for group in ops.nms_match(rows, scores, 0.5)] == [[0, 1]]
        assert ops.nms(rows, scores, 0.5).tolist() == [0, 1]

    def test_nothing(self, device: str) -> None:
        rows = torch.zeros(0, 4, device=device)
        assert ops.nms_match(rows, rows[:, 0], 0.5) == []

    @pytest.mark.gpu
    @pytest.mark.parametrize("count", [1, 33, 1000, 5000])
    def test_cuda_groups_as_the_cpu(self, count: int) -> None:
        new = Inputs(count)
        rows, scores = new.boxes(count, 300.0).float(), new.uniform(count).float()
        expected = ops.nms_groups(rows, scores, 0.4)
        actual = ops.nms_groups(rows.cuda(), scores.cuda(), 0.4)
        for on_gpu, on_cpu in zip(actual, expected, strict=True):
            assert torch.equal(on_gpu.cpu(), on_cpu)


def test_reference_by_hand() -> None:
    # The second overlaps the first by 12 of 16, the third the second by 8 of 20.
    rows = torch.tensor([[0.0, 0, 4, 4], [0, 1, 4, 4], [0, 3, 4, 6]])
    scores = torch.tensor([0.7, 0.8, 0.9])
    order, numbers, count = reference.nms_groups(rows, scores, 0.75)
    assert order.tolist() == [2, 1, 0]
    assert numbers.tolist() == [0, 1, 1]
    assert count.item() == 2
