"""nms_rotated, nms_quadri, nms3d and their relatives in mmcv.ops."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy
import pytest
import torch

from torchkiln import ops as native
from torchkiln.compat.mmcv import ops

SQUARE = [0.0, 0, 2, 2]


def turned_of(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 5, generator=generator) * torch.tensor([20, 20, 9, 9, 3])
    boxes[:, 2:4] += 1
    return boxes


def scores_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def greedy(overlaps: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    for row in scores.argsort(descending=True).tolist():
        if all(overlaps[row, other] <= threshold for other in kept):
            kept.append(row)
    return kept


def golden() -> tuple[torch.Tensor, torch.Tensor]:
    """What mmcv's own test draws."""
    numpy.random.seed(42)
    boxes = numpy.random.rand(555, 7).astype(numpy.float32)
    scores = numpy.random.rand(555).astype(numpy.float32)
    return torch.from_numpy(boxes), torch.from_numpy(scores)


@pytest.mark.parametrize("clockwise", [True, False])
def test_nms_rotated(clockwise):
    boxes, scores = turned_of(60).requires_grad_(), scores_of(60)
    dets, keep = ops.nms_rotated(boxes, scores, 0.2, clockwise=clockwise)
    overlaps = ops.box_iou_rotated(boxes, boxes, clockwise=clockwise)
    assert keep.tolist() == greedy(overlaps, scores, 0.2)
    assert 0 < len(keep) < 60
    assert torch.equal(dets, torch.cat([boxes[keep], scores[keep, None]], 1))
    dets.sum().backward()
    assert boxes.grad is not None
    assert bool((boxes.grad[keep] == 1).all())


def test_nms_quadri_and_types_of_batched_nms():
    turned, scores, labels = turned_of(60), scores_of(60), torch.arange(60) % 3
    center, half = turned[:, None, :2], turned[:, None, 2:4] / 2
    corners = center + half * torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    for boxes, kind in ((corners.flatten(1), "nms_quadri"), (turned, "nms_rotated")):
        function = getattr(ops, kind)
        dets, keep = function(boxes, scores, 0.1)
        assert 0 < len(keep) < 60
        assert dets.shape == (len(keep), boxes.shape[1] + 1)
        config = {"type": kind, "iou_threshold": 0.1}
        assert torch.equal(ops.batched_nms(boxes, scores, labels, config, True)[1], keep)
        whole = ops.batched_nms(boxes, scores, labels, config)
        split = ops.batched_nms(boxes, scores, labels, {**config, "split_thr": 10})
        assert torch.equal(whole[0], split[0])
        assert torch.equal(whole[1], split[1])
        for label in range(3):
            rows = (labels == label).nonzero()[:, 0]
            own = rows[function(boxes[rows], scores[rows], 0.1)[1]]
            assert sorted(own.tolist()) == [
                row for row in sorted(whole[1].tolist()) if row % 3 == label
            ]


def test_nms3d_golden():
    boxes, scores = golden()
    assert len(ops.nms3d(boxes, scores, 0.3)) == 176
    assert len(ops.nms3d_normal(boxes, scores, 0.3)) == 148


def test_nms_bev():
    turned, scores = turned_of(50), scores_of(50)
    half = turned[:, 2:4] / 2
    corners = torch.cat([turned[:, :2] - half, turned[:, :2] + half, turned[:, 4:]], 1)
    with pytest.warns(DeprecationWarning, match="nms_bev: is deprecated"):
        kept = ops.nms_bev(corners, scores, 0.2)
    assert torch.equal(kept, native.nms_rotated(turned, scores, 0.2))
    with pytest.warns(DeprecationWarning, match="nms_bev"):
        few = ops.nms_bev(corners, scores, 0.2, pre_max_size=20, post_max_size=5)
    best = scores.argsort(descending=True)[:20]
    assert torch.equal(few, best[native.nms_rotated(turned[best], scores[best], 0.2)][:5])
    with pytest.warns(DeprecationWarning, match="nms_normal_bev: is deprecated"):
        assert torch.equal(
            ops.nms_normal_bev(corners, scores, 0.2), native.nms(corners[:, :4], scores, 0.2)
        )


@pytest.mark.parametrize(("name", "columns"), [("nms3d", 5), ("nms3d_normal", 5), ("nms_bev", 7)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_columns(name, columns):
    with pytest.raises(AssertionError, match=r"boxes must have shape \(N, "):
        getattr(ops, name)(torch.zeros(3, columns), torch.zeros(3), 0.3)


def test_quirk_nms_rotated_labels():
    boxes = torch.tensor([[*SQUARE, 0], [*SQUARE, 0]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    assert ops.nms_rotated(boxes, scores, 0.5, labels)[1].tolist() == [0]
    assert native.nms_rotated(boxes, scores, 0.5, labels).tolist() == [0, 1]
    corners = torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2]]).repeat(2, 1)
    assert ops.nms_quadri(corners, scores, 0.5, labels.float())[1].tolist() == [0]
    assert native.nms_quadri(corners, scores, 0.5, labels).tolist() == [0, 1]


def test_quirk_nms_rotated_empty():
    for name, columns in (("nms_rotated", 5), ("nms_quadri", 8)):
        dets, keep = getattr(ops, name)(torch.zeros(0, columns), torch.zeros(0), 0.5)
        assert dets.shape == (0, columns)
        assert keep is None
        assert getattr(native, name)(torch.zeros(0, columns), torch.zeros(0), 0.5).shape == (0,)
        labels = torch.zeros(0, dtype=torch.int64)
        config = {"type": name, "iou_threshold": 0.5}
        dets, keep = ops.batched_nms(torch.zeros(0, columns), torch.zeros(0), labels, config)
        assert dets.shape == (0, columns + 1)
        assert keep.shape == (0,)


def test_quirk_nms_rotated_at_the_threshold():
    """IoU exactly a half: mmcv's CPU suppresses, its GPU does not."""
    boxes, scores = torch.tensor([[0.0, 0, 2, 2, 0], [0, 0.5, 2, 1, 0]]), torch.tensor([0.9, 0.8])
    assert ops.box_iou_rotated(boxes[:1], boxes[1:]).item() == 0.5
    assert ops.nms_rotated(boxes, scores, 0.5)[1].tolist() == [0, 1]


def test_quirk_nms_quadri_corners():
    """Two equal parallelograms, whose overlap mmcv finds to be a third."""
    boxes = torch.tensor([[0.0, 0, 4, 4, 4, 14, 0, 10]]).repeat(2, 1)
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms_quadri(boxes, scores, 0.5)[1].tolist() == [0, 1]
    assert native.nms_quadri(boxes, scores, 0.5).tolist() == [0]


def test_quirk_nms3d_margin():
    """Boxes with less than half a centimetre between them overlap in mmcv."""
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 1, 0], [2.004, 0, 0, 2, 2, 1, 0]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms3d(boxes, scores, 5e-4).tolist() == [0]
    assert native.nms3d(boxes, scores, 5e-4).tolist() == [0, 1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_soft_nms_is_one_graph(backend):
    """Also where no box reaches the least score, and the best one stays all the same."""
    corner = 9 * torch.rand(20, 2, generator=torch.Generator().manual_seed(2))
    boxes, scores = torch.cat([corner, corner + 3], 1), scores_of(20)

    def call(boxes, scores):
        return ops.soft_nms(boxes, scores, min_score=0.3, method="gaussian")

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for factor, count in ((1.0, None), (0.1, 1)):
        dets, inds = call(boxes, factor * scores)
        found = compiled(boxes, factor * scores)
        assert torch.equal(found[0], dets)
        assert torch.equal(found[1], inds)
        assert len(inds) == count if count else len(inds) > 1
