"""soft_nms and soft_nms_padded."""

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
from support.strategies import boxes, seeds
from support.threads import threads
from torchkiln import ops, reference
from torchkiln.reference.detection.soft_nms import parity
from torchkiln.testing import Inputs

methods = st.sampled_from(["naive", "linear", "gaussian"])


class TestSoftNms(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0}
    without: ClassVar = {"cuda_graph[soft_nms]": "waits for the number of boxes that are kept"}
    failures = (
        Failure(
            "three_columns",
            {"boxes": lambda boxes: boxes[:, :3]},
            ValueError,
            r"^soft_nms: boxes must have shape \(N, 4\); got \(70, 3\)$",
            function="soft_nms",
        ),
        Failure(
            "too_few_scores",
            {"scores": lambda scores: scores[:9]},
            ValueError,
            r"^soft_nms_padded: scores must have shape \(70,\); got \(9,\)$",
        ),
        Failure(
            "unknown_method",
            {"method": "cubic"},
            ValueError,
            '^soft_nms_padded: method must be "naive", "linear" or "gaussian"; got \'cubic\'$',
        ),
        Failure(
            "no_width",
            {"method": "linear", "sigma": 0.0},
            ValueError,
            "^soft_nms_padded: sigma must be greater than 0; got 0",
        ),
        Failure(
            "no_method",
            {"method": []},
            ValueError,
            r"^soft_nms: method must be .* got \[\]$",
            function="soft_nms",
        ),
        Failure(
            "negative_offset",
            {"offset": -1.0},
            ValueError,
            "^soft_nms_padded: offset must be a finite number of at least 0; got -1",
        ),
        Failure(
            "min_score_is_nan",
            {"min_score": math.nan},
            ValueError,
            "^soft_nms_padded: min_score must be a number; got nan$",
        ),
        Failure(
            "negative_output",
            {"max_output": -1},
            ValueError,
            "^soft_nms_padded: max_output must be at least 0; got -1$",
        ),
        Failure(
            "floating_classes",
            {"idxs": torch.zeros(70)},
            TypeError,
            r"^soft_nms: idxs must be an integer tensor; got float32\. ",
            function="soft_nms",
        ),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        return {"boxes": new.boxes(n), "scores": new.uniform(n), "max_output": 7}

    @given(boxes(), methods, seeds)
    def test_shuffling_changes_nothing(self, rows: Tensor, method: str, seed: int) -> None:
        scores = Inputs(seed).uniform(rows.shape[0])
        order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
        indices, values = ops.soft_nms(rows, scores, method=method)
        shuffled, same = ops.soft_nms(rows[order], scores[order], method=method)
        assert torch.equal(same, values)
        assert torch.equal(rows[order][shuffled], rows[indices])

    @given(boxes(), methods, seeds)
    def test_scores_fall_and_stay_in_order(self, rows: Tensor, method: str, seed: int) -> None:
        scores = Inputs(seed).uniform(rows.shape[0])
        indices, values = ops.soft_nms(rows, scores, method=method, min_score=0.1)
        assert indices.unique().shape == indices.shape
        assert bool((values <= scores[indices]).all())
        assert bool((values[1:] <= values[:-1]).all())
        assert bool((values >= 0.1).all())

    @given(boxes(), methods, seeds)
    def test_classes_are_one_call_each(self, rows: Tensor, method: str, seed: int) -> None:
        new = Inputs(seed)
        scores, idxs = new.uniform(rows.shape[0]), new.integers(rows.shape[0], low=-2, high=3)
        expected: dict[int, float] = {}
        for value in idxs.unique():
            members = (idxs == value).nonzero()[:, 0]
            kept, values = ops.soft_nms(rows[members], scores[members], method=method)
            expected |= dict(zip(members[kept].tolist(), values.tolist(), strict=True))
        indices, values = ops.soft_nms(rows, scores, method=method, idxs=idxs)
        assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == expected
        assert bool((values[1:] <= values[:-1]).all())

    @given(boxes(), st.integers(0, 50), st.booleans(), seeds)
    def test_padded_is_the_same(
        self, rows: Tensor, max_output: int, with_classes: bool, seed: int
    ) -> None:
        new = Inputs(seed)
        scores = new.uniform(rows.shape[0])
        idxs = new.integers(rows.shape[0], high=4) if with_classes else None
        indices, values = ops.soft_nms(rows, scores, idxs=idxs)
        padded, kept, count = ops.soft_nms_padded(rows, scores, max_output, idxs=idxs)
        n = min(max_output, indices.shape[0])
        assert count.item() == n
        assert torch.equal(padded[:n], indices[:n])
        assert torch.equal(kept[:n], values[:n])
        assert bool((padded[n:] == -1).all())
        assert bool((kept[n:] == 0).all())

    @given(boxes(), seeds)
    def test_naive_without_low_scores_is_nms(self, rows: Tensor, seed: int) -> None:
        """Where no IoU equals the threshold."""
        scores = Inputs(seed).uniform(rows.shape[0], low=0.5)
        indices, values = ops.soft_nms(rows, scores, 0.4321, method="naive", min_score=0.1)
        assert torch.equal(indices, ops.nms(rows, scores, 0.4321))
        assert torch.equal(values, scores[indices])

    @pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
    @pytest.mark.parametrize("min_score", [-1.0, 0.0, 0.3])
    def test_many_boxes_of_one_class(self, method: str, min_score: float) -> None:
        """So many that most are lowered by several at once, and that the array shrinks."""
        new = Inputs(700)
        rows, scores = new.boxes(700, 60.0).double(), new.uniform(700).double()
        number = ["naive", "linear", "gaussian"].index(method)
        expected = reference.soft_nms(rows, scores, 0.3, 0.5, min_score, number)
        for count in (1, 4):
            with threads(count):
                indices, values = ops.soft_nms(
                    rows, scores, 0.3, min_score=min_score, method=method
                )
            assert torch.equal(indices, expected[0])
            torch.testing.assert_close(values, expected[1])

    def test_ties_go_to_the_lower_row(self, device: str) -> None:
        rows = torch.tensor([[0.0, 0, 2, 2], [9, 9, 10, 10], [0, 0, 2, 2], [0, 1, 2, 3]])
        scores = torch.tensor([0.5, 0.5, 0.5, 0.75], dtype=torch.float32)
        # The last overlaps rows 0 and 2 by 2 of 6, and they each other completely.
        indices, values = ops.soft_nms(rows.to(device), scores.to(device), 0.3, min_score=0.0)
        assert indices.tolist() == [3, 1, 0, 2]
        assert values.tolist() == pytest.approx([0.75, 0.5, 1 / 3, 0.0])

    @pytest.mark.gpu
    @pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
    @pytest.mark.parametrize("classes", [0, 1, 80, 20000])
    @pytest.mark.parametrize("count", [1, 500, 1000, 5000])
    def test_cuda_keeps_what_the_cpu_keeps(self, count: int, classes: int, method: str) -> None:
        new = Inputs(count)
        rows, scores = new.boxes(count, 300.0).float(), new.uniform(count).float()
        idxs = new.integers(count, high=classes) if classes else None
        softness: dict[str, Any] = {"method": method, "min_score": 0.3, "idxs": idxs}
        indices, values = ops.soft_nms(rows, scores, **softness)
        if idxs is not None:
            softness["idxs"] = idxs.cuda()
        on_gpu = ops.soft_nms(rows.cuda(), scores.cuda(), **softness)
        assert torch.equal(on_gpu[0].cpu(), indices)
        torch.testing.assert_close(on_gpu[1].cpu(), values)


def test_an_infinite_box_reaches_a_threshold_of_0(device: str) -> None:
    rows = torch.tensor([[0.0, 0, 4, 4], [8, -math.inf, 9, 4]], device=device)
    scores = torch.tensor([0.75, 0.5], device=device)
    for threshold, kept in ((0.0, [0]), (0.1, [0, 1])):
        found = ops.soft_nms(rows, scores, threshold, min_score=0.25, method="naive")[0]
        assert found.tolist() == kept


def test_reference_by_hand() -> None:
    # The second overlaps the first by 8 of 24, the third the second alike.
    rows = torch.tensor([[0.0, 0, 4, 4], [0, 2, 4, 6], [0, 4, 4, 8]])
    scores = torch.tensor([0.75, 0.6, 0.5])
    indices, values = reference.soft_nms(rows, scores, 0.3, 0.5, 0.1, 1)
    assert indices.tolist() == [0, 2, 1]
    assert values.tolist() == pytest.approx([0.75, 0.5, 0.6 * 4 / 9])
    assert reference.soft_nms(rows, scores, 0.3, 0.5, 0.1, 0)[0].tolist() == [0, 2]
    gaussian = reference.soft_nms(rows, scores, 0.3, 0.5, 0.1, 2)[1].tolist()
    assert gaussian == pytest.approx([0.75, 0.5, 0.6 * math.exp(-4 / 9)])


def test_equality_with_the_threshold(device: str) -> None:
    """An IoU of 15 of 50 reaches a threshold of 0.3, in every dtype."""
    rows = torch.tensor([[3.0, 4, 9, 9], [3, 6, 8, 13]], device=device)
    scores = torch.tensor([0.75, 0.5], device=device)
    for dtype in (torch.float32, torch.float64):
        found = ops.soft_nms(rows.to(dtype), scores.to(dtype), 0.3, method="naive")[0]
        assert found.tolist() == [0]
