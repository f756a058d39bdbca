"""nms, batched_nms and nms_padded."""

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
from torchkiln import ops, reference
from torchkiln.reference.detection.nms import parity
from torchkiln.testing import Inputs

thresholds = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


class TestNms(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"boxes": 0, "scores": 0}
    without: ClassVar = {
        f"cuda_graph[{function}]": "waits for the number of boxes that are kept"
        for function in ("nms", "batched_nms")
    }
    failures = (
        Failure(
            "three_columns",
            {"boxes": lambda boxes: boxes[:, :3]},
            ValueError,
            r"^nms: boxes must have shape \(N, 4\); got \(70, 3\)$",
            function="nms",
        ),
        Failure(
            "integers",
            {"boxes": lambda boxes: boxes.int()},
            TypeError,
            r"^nms: boxes must be a floating-point tensor; got int32\. ",
            function="nms",
        ),
        Failure(
            "scores_of_two_dimensions",
            {"scores": lambda scores: scores[:, None]},
            ValueError,
            r"^nms: scores must have shape \(N,\); got \(70, 1\)$",
            function="nms",
        ),
        Failure(
            "too_few_scores",
            {"scores": lambda scores: scores[:9]},
            ValueError,
            r"^nms: scores must have shape \(70,\); got \(9,\)$",
            function="nms",
        ),
        Failure(
            "two_dtypes",
            {"scores": lambda scores: scores.half()},
            TypeError,
            r"^nms: scores must have the dtype of boxes \(float32\); got float16$",
            function="nms",
        ),
        Failure(
            "threshold_is_nan",
            {"iou_threshold": math.nan},
            ValueError,
            "^nms: iou_threshold must be a number; got nan$",
            function="nms",
        ),
        Failure(
            "floating_classes",
            {"idxs": lambda idxs: idxs.float()},
            TypeError,
            r"^batched_nms: idxs must be an integer tensor; got float32\. ",
            function="batched_nms",
        ),
        Failure(
            "too_few_classes",
            {"idxs": lambda idxs: idxs[:9]},
            ValueError,
            r"^batched_nms: idxs must have shape \(70,\); got \(9,\)$",
            function="batched_nms",
        ),
        Failure(
            "negative_output",
            {"max_output": -1},
            ValueError,
            "^nms_padded: max_output must be at least 0; got -1$",
        ),
        Failure("none", {"scores": None}, TypeError, "scores must be a tensor; got None"),
    )

    def sized(self, new: Inputs, n: int) -> dict[str, Any]:
        return {
            "boxes": new.boxes(n),
            "scores": new.uniform(n),
            "iou_threshold": 0.5,
            "max_output": 7,
        }

    @given(boxes(), thresholds, seeds)
    def test_shuffling_changes_nothing(self, rows: Tensor, threshold: float, seed: int) -> None:
        new = Inputs(seed)
        scores = new.uniform(rows.shape[0])
        order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
        kept = ops.nms(rows, scores, threshold)
        shuffled = ops.nms(rows[order], scores[order], threshold)
        assert torch.equal(order[shuffled], kept)

    @given(boxes(), thresholds, seeds)
    def test_what_is_kept_stays(self, rows: Tensor, threshold: float, seed: int) -> None:
        scores = Inputs(seed).uniform(rows.shape[0])
        kept = ops.nms(rows, scores, threshold)
        again = ops.nms(rows[kept], scores[kept], threshold)
        assert torch.equal(again, torch.arange(kept.shape[0]))

    @given(boxes(), thresholds, seeds)
    def test_classes_are_one_nms_each(self, rows: Tensor, threshold: float, seed: int) -> None:
        new = Inputs(seed)
        scores, idxs = new.uniform(rows.shape[0]), new.integers(rows.shape[0], low=-2, high=3)
        expected = [torch.empty(0, dtype=torch.int64)]
        for value in idxs.unique():
            members = (idxs == value).nonzero()[:, 0]
            expected.append(members[ops.nms(rows[members], scores[members], threshold)])
        joined = torch.cat(expected)
        joined = joined[scores[joined].argsort(descending=True)]
        assert torch.equal(ops.batched_nms(rows, scores, idxs, threshold), joined)

    @given(boxes(), st.integers(0, 50), st.booleans(), seeds)
    def test_padded_is_the_same(
        self, rows: Tensor, max_output: int, with_classes: bool, seed: int
    ) -> None:
        new = Inputs(seed)
        scores, idxs = new.uniform(rows.shape[0]), new.integers(rows.shape[0], high=4)
        if with_classes:
            kept = ops.batched_nms(rows, scores, idxs, 0.5)[:max_output]
            indices, count = ops.nms_padded(rows, scores, 0.5, max_output, idxs)
        else:
            kept = ops.nms(rows, scores, 0.5)[:max_output]
            indices, count = ops.nms_padded(rows, scores, 0.5, max_output)
        assert count.item() == kept.shape[0]
        assert torch.equal(indices[: kept.shape[0]], kept)
        assert bool((indices[kept.shape[0] :] == -1).all())

    def test_classes_do_not_move_boxes(self, device: str) -> None:
        """With an offset per class these would touch, or be infinite in float16."""
        rows = torch.tensor([[6e4, 6e4, 6.1e4, 6.1e4], [0, 0, 10, 10]]).repeat(3, 1)
        rows = rows.to(device, torch.float16)
        scores = torch.arange(6, device=device).half()
        idxs = torch.tensor([0, 0, 1, 1, 90, 90], device=device)
        assert ops.batched_nms(rows, scores, idxs, 0.5).tolist() == [5, 4, 3, 2, 1, 0]
        assert ops.batched_nms(rows, scores, idxs * 0, 0.5).tolist() == [5, 4]

    @pytest.mark.parametrize("integer", [torch.uint8, torch.int8, torch.int16, torch.int32])
    def test_classes_of_any_integer(self, integer: torch.dtype, device: str) -> None:
        new = Inputs()
        rows, scores = new.boxes(60, 30.0).to(device), new.uniform(60).to(device)
        idxs = new.integers(60, high=5).to(device)
        expected = ops.batched_nms(rows, scores, idxs, 0.5)
        assert torch.equal(ops.batched_nms(rows, scores, idxs.to(integer), 0.5), expected)

    @pytest.mark.parametrize(
        ("threshold", "kept"), [(-1.0, [0]), (1.0, [0, 1, 2]), (7.0, [0, 1, 2])]
    )
    def test_thresholds_outside(self, threshold: float, kept: list[int], device: str) -> None:
        rows = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [5, 5, 6, 6]], device=device)
        scores = torch.tensor([3.0, 2.0, 1.0], device=device)
        assert ops.nms(rows, scores, threshold).tolist() == kept

    def test_many_equal_boxes(self, device: str) -> None:
        """One box per class of thousands; a chain as long as the boxes; all in one."""
        n = 3000
        rows = torch.tensor([[0.0, 0, 1, 1]], device=device).repeat(n, 1)
        scores = torch.linspace(1, 0, n, device=device)
        numbers = torch.arange(n, device=device)
        assert ops.nms(rows, scores, 0.5).tolist() == [0]
        assert torch.equal(ops.batched_nms(rows, scores, numbers, 0.5), numbers)
        # Each overlaps its neighbours by 0.6: every second one goes.
        rows = rows + 0.25 * numbers[:, None]
        rows[:, 1], rows[:, 3] = 0, 1
        assert torch.equal(ops.nms(rows, scores, 0.5), numbers[::2])

    @pytest.mark.gpu
    def test_refuses_two_devices(self) -> None:
        rows = torch.zeros(2, 4, device="cuda")
        with pytest.raises(ValueError, match="scores must be on the device of boxes"):
            ops.nms(rows, torch.zeros(2), 0.5)

    @pytest.mark.gpu
    @pytest.mark.parametrize("count", [0, 1, 64, 1000, 4000, 20000])
    @pytest.mark.parametrize("classes", [1, 80, 20000])
    def test_cuda_keeps_what_the_cpu_keeps(self, count: int, classes: int) -> None:
        new = Inputs(count)
        rows, scores = new.boxes(count, 300.0).float(), new.uniform(count).float()
        idxs = new.integers(count, high=classes)
        expected = ops.batched_nms(rows, scores, idxs, 0.4)
        actual = ops.batched_nms(rows.cuda(), scores.cuda(), idxs.cuda(), 0.4)
        assert torch.equal(actual.cpu(), expected)
        expected = ops.nms(rows, scores, 0.4)
        assert torch.equal(ops.nms(rows.cuda(), scores.cuda(), 0.4).cpu(), expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize("with_classes", [False, True])
    def test_is_captured(self, with_classes: bool) -> None:
        """A captured graph follows its inputs, and neither capture nor replay waits."""
        new = Inputs()
        sets = [(new.boxes(2500, 200.0).float(), new.uniform(2500).float()) for _ in range(3)]
        idxs = new.integers(2500, high=7) if with_classes else None
        rows, scores = sets[0][0].cuda(), sets[0][1].cuda()
        on_gpu = None if idxs is None else idxs.cuda()
        ops.nms_padded(rows, scores, 0.5, 300, on_gpu)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            indices, count = ops.nms_padded(rows, scores, 0.5, 300, on_gpu)
        for new_rows, new_scores in sets:
            rows.copy_(new_rows)
            scores.copy_(new_scores)
            graph.replay()
            expected = ops.nms_padded(new_rows, new_scores, 0.5, 300, idxs)
            assert torch.equal(indices.cpu(), expected[0])
            assert torch.equal(count.cpu(), expected[1])

    @pytest.mark.gpu
    def test_capture_of_nms_is_refused(self) -> None:
        rows, scores = torch.rand(9, 4, device="cuda"), torch.rand(9, device="cuda")
        ops.nms(rows, scores, 0.5)
        with (
            pytest.raises(RuntimeError, match="nms_padded"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            ops.nms(rows, scores, 0.5)

    @pytest.mark.gpu
    def test_memory_grows_with_the_boxes(self) -> None:
        """Far below a bit for each pair."""
        count = 20000
        new = Inputs()
        rows, scores = new.boxes(count).float().cuda(), new.uniform(count).float().cuda()
        ops.nms(rows, scores, 0.5)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.nms(rows, scores, 0.5)
        assert torch.cuda.max_memory_allocated() - before < 64 * count


def test_reference_by_hand() -> None:
    # The second overlaps the first by 12 of 16, the third the second by 8 of 20: only the second
    # goes, and with it what suppresses nobody any more.
    rows = torch.tensor([[0.0, 0, 4, 4], [0, 1, 4, 4], [0, 3, 4, 6]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert reference.nms(rows, scores, 0.5).tolist() == [0, 2]
    assert reference.nms(rows, scores, 0.75).tolist() == [0, 1, 2]
    classes = torch.tensor([0, 1, 1])
    assert reference.batched_nms(rows, scores, classes, 0.0).tolist() == [0, 1]
    assert reference.nms_padded(rows, scores, 0.5, 3)[0].tolist() == [0, 2, -1]


def test_equality_with_the_threshold(device: str) -> None:
    """An IoU of 234 of 360 is no more than a threshold of 0.65, in every dtype."""
    rows = torch.tensor([[0.0, 0, 360, 1], [0, 0, 234, 1]], device=device)
    scores = torch.tensor([0.75, 0.5], device=device)
    for dtype in (torch.float32, torch.float64):
        assert ops.nms(rows.to(dtype), scores.to(dtype), 0.65).tolist() == [0, 1]


@pytest.mark.gpu
def test_more_boxes_than_the_peer_can_take() -> None:
    """Mmcv's mask goes wrong above 262,144. Of two equal boxes at a place the first one stays."""
    count = 300_000
    place = torch.arange(count // 2).repeat_interleave(2)
    corner = torch.stack([place % 1000, place // 1000], 1) * 10.0
    scores = torch.arange(count, 0, -1, dtype=torch.float32)
    kept = ops.nms(torch.cat([corner, corner + 8], 1).cuda(), scores.cuda(), 0.5)
    assert torch.equal(kept.cpu(), torch.arange(0, count, 2))
