"""Names of mmcv.ops that work, against plain references; and where mmcv differs from torchkiln."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import math

import numpy
import pytest
import torch
from torch.testing import assert_close

from torchkiln import nn
from torchkiln import ops as native
from torchkiln.compat.mmcv import ops


def boxes_of(count: int, seed: int = 0, size: float = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=generator) * size
    corners[:, 2:] = corners[:, :2] + corners[:, 2:] / 2
    return corners


def scores_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def overlap(a, b, offset: float = 0, mode: str = "iou") -> float:
    """One pair, in Python's float64."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    inter = width * height
    return inter / (area_a + area_b - inter if mode == "iou" else area_a)


def greedy(boxes, scores, threshold, offset=0) -> list[int]:
    kept = []
    for row in sorted(range(len(scores)), key=lambda row: -scores[row]):
        if all(overlap(boxes[row], boxes[other], offset) <= threshold for other in kept):
            kept.append(row)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_equals_the_greedy_definition(offset):
    boxes, scores = boxes_of(60), scores_of(60)
    dets, inds = ops.nms(boxes, scores, 0.3, offset=offset)
    assert inds.tolist() == greedy(boxes.tolist(), scores.tolist(), 0.3, offset)
    assert 0 < len(inds) < 60
    assert torch.equal(dets, torch.cat([boxes[inds], scores[inds, None]], 1))


def test_nms_offset_changes_what_stays():
    boxes = torch.tensor([[0.0, 0, 1, 1], [1.0, 0, 2, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.3)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, 0.3, offset=1)[1].tolist() == [0]


def test_nms_score_threshold_is_strict_and_keeps_original_rows():
    boxes = boxes_of(40)
    scores = torch.arange(40) / 40.0
    dets, inds = ops.nms(boxes, scores, 0.5, score_threshold=0.5)
    rows = [row for row in range(40) if scores[row] > 0.5]
    expected = greedy([boxes[row].tolist() for row in rows], [float(scores[r]) for r in rows], 0.5)
    assert inds.tolist() == [rows[row] for row in expected]
    assert 20 not in inds.tolist()
    assert torch.equal(dets[:, :4], boxes[inds])


def test_nms_max_num():
    boxes, scores = boxes_of(60), scores_of(60)
    full = ops.nms(boxes, scores, 0.5)[1]
    assert torch.equal(ops.nms(boxes, scores, 0.5, max_num=3)[1], full[:3])
    assert torch.equal(ops.nms(boxes, scores, 0.5, max_num=0)[1], full)


def test_nms_takes_arrays():
    boxes, scores = boxes_of(30), scores_of(30)
    dets, inds = ops.nms(boxes.numpy(), scores.numpy(), 0.3)
    expected = ops.nms(boxes, scores, 0.3)
    assert isinstance(dets, numpy.ndarray)
    assert inds.dtype == numpy.int64
    numpy.testing.assert_array_equal(dets, expected[0].numpy())
    numpy.testing.assert_array_equal(inds, expected[1].numpy())


def test_nms_has_gradients_by_its_rows():
    boxes, scores = boxes_of(20).requires_grad_(), scores_of(20).requires_grad_()
    dets, inds = ops.nms(boxes, scores, 0.3)
    dets.sum().backward()
    expected = torch.zeros(20)
    expected[inds] = 1
    assert torch.equal(scores.grad, expected)
    assert torch.equal(boxes.grad, expected[:, None].expand(20, 4))


def test_nms_empty():
    dets, inds = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert inds.shape == (0,)
    assert inds.dtype == torch.int64


@pytest.mark.parametrize(
    ("boxes", "scores", "offset"),
    [((3, 5), (3,), 0), ((3, 4), (2,), 0), ((3, 4), (3,), 2)],
    ids=["columns", "lengths", "offset"],
)
def test_nms_rejects(boxes, scores, offset):
    with pytest.raises(AssertionError):
        ops.nms(torch.zeros(boxes), torch.zeros(scores), 0.5, offset=offset)
    with pytest.raises(AssertionError):
        ops.soft_nms(torch.zeros(boxes), torch.zeros(scores), 0.5, offset=offset)


def test_nms_function_class():
    from torchkiln.compat.mmcv._ops.nms import NMSop

    boxes, scores = boxes_of(30), scores_of(30)
    expected = ops.nms(boxes, scores, 0.3, 0, 0.2, 5)[1]
    assert torch.equal(NMSop.apply(boxes, scores, 0.3, 0, 0.2, 5), expected)


def test_soft_nms_function_class():
    """All rows, of which the first ones count, as mmcv's."""
    from torchkiln.compat.mmcv._ops.nms import SoftNMSop

    boxes, scores = boxes_of(30), scores_of(30)
    expected = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.2, "gaussian")
    dets, inds = SoftNMSop.apply(boxes, scores, 0.3, 0.5, 0.2, 2, 0)
    assert dets.shape == (30, 5)
    assert 0 < len(inds) < 30
    assert torch.equal(dets[: len(inds)], expected[0])
    assert torch.equal(inds, expected[1])


@pytest.mark.parametrize(
    ("module", "name", "call", "settings"),
    [
        ("roi_pool", "RoIPoolFunction", "roi_pool", ((2, 2), 0.5)),
        ("prroi_pool", "PrRoIPoolFunction", "prroi_pool", ((2, 2), 0.5)),
        ("focal_loss", "SigmoidFocalLossFunction", "sigmoid_focal_loss", (1.5, 0.3, None, "sum")),
        ("focal_loss", "SoftmaxFocalLossFunction", "softmax_focal_loss", (1.5, 0.3, None, "sum")),
    ],
)
def test_function_classes_have_values_and_gradients(module, name, call, settings):
    function = getattr(importlib.import_module(f"torchkiln.compat.mmcv._ops.{module}"), name)
    assert issubclass(function, torch.autograd.Function)
    if module == "focal_loss":
        first, second = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), [0, 2, 1, 0]
        second = torch.tensor(second)
    else:
        first, second = features().float(), ROIS
    first.requires_grad_()
    found, expected = (f(first, second, *settings) for f in (function.apply, getattr(ops, call)))
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(output.sum(), first)[0] for output in (found, expected)]
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["nms", "soft_nms"])
def test_suppression_takes_either_kind_of_scores(name):
    boxes, scores = boxes_of(30), scores_of(30)
    call = getattr(ops, name)
    dets, inds = call(boxes, scores.numpy(), 0.4)
    assert torch.equal(inds, call(boxes, scores, 0.4)[1])
    dets, inds = call(boxes.numpy(), scores, 0.4)
    assert isinstance(dets, numpy.ndarray)
    assert isinstance(inds, numpy.ndarray)
    with pytest.raises(AssertionError):
        call(boxes.tolist(), scores, 0.4)


@pytest.mark.parametrize(
    "call",
    [lambda *a, **k: ops.nms(*a, **k), lambda *a, **k: ops.soft_nms(*a, **k)],
    ids=["nms", "soft_nms"],
)
def test_old_keyword_of_suppression(call):
    boxes, scores = boxes_of(30), scores_of(30)
    with pytest.warns(DeprecationWarning, match="iou_thr is deprecated; use iou_threshold"):
        dets, inds = call(boxes, scores, iou_thr=0.4)
    expected = call(boxes, scores, iou_threshold=0.4)
    assert torch.equal(dets, expected[0])
    assert torch.equal(inds, expected[1])
    with pytest.raises(AssertionError):
        call(boxes, scores, iou_thr=0.4, iou_threshold=0.4)


def soft_reference(boxes, scores, threshold, sigma, min_score, method, offset):
    """Slot by slot, as mmcv's loop over arrays; in float32 throughout."""
    f = numpy.float32
    boxes, scores = boxes.numpy().copy(), scores.numpy().copy()
    rows = list(range(len(scores)))
    out, inds, live, i = [], [], len(scores), 0

    def swap(i, j):
        boxes[[i, j]], scores[[i, j]] = boxes[[j, i]], scores[[j, i]]
        rows[i], rows[j] = rows[j], rows[i]

    while i < live:
        best = max(range(i, live), key=lambda slot: (scores[slot], -slot))
        swap(i, best)
        out.append([*boxes[i], scores[i]])
        inds.append(rows[i])
        slot = i + 1
        while slot < live:
            iou = f(overlap(boxes[i], boxes[slot], f(offset)))
            weight = f(1)
            if method == "gaussian":
                weight = f(math.exp(-(iou * iou) / sigma))
            elif iou >= threshold:
                weight = f(1) - iou if method == "linear" else f(0)
            scores[slot] *= weight
            if scores[slot] < min_score:
                boxes[slot], scores[slot], rows[slot] = (
                    boxes[live - 1],
                    scores[live - 1],
                    rows[live - 1],
                )
                live -= 1
                continue
            slot += 1
        i += 1
    return numpy.array(out), inds


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_equals_the_loop(method, offset):
    boxes, scores = boxes_of(50), scores_of(50)
    dets, inds = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    expected, rows = soft_reference(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert inds.tolist() == rows
    assert 0 < len(rows) < 50
    numpy.testing.assert_allclose(dets.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_soft_nms_empty_arrays_and_methods():
    dets, inds = ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5)
    assert inds.shape == (0,)
    boxes, scores = boxes_of(10), scores_of(10)
    as_arrays = ops.soft_nms(boxes.numpy(), scores.numpy())
    numpy.testing.assert_array_equal(as_arrays[0], ops.soft_nms(boxes, scores)[0].numpy())
    with pytest.raises(AssertionError, match="method must be one of naive, linear, gaussian"):
        ops.soft_nms(boxes, scores, method="cubic")


def test_soft_nms_keeps_a_nan_score_to_the_last():
    boxes = torch.tensor([[0.0, 0, 1, 1], [5.0, 5, 6, 6], [9.0, 9, 10, 10]])
    _, inds = ops.soft_nms(boxes, torch.tensor([math.nan, 0.5, 0.9]))
    assert inds.tolist() == [2, 1, 0]


def test_nms_match_groups():
    boxes, scores = boxes_of(40), scores_of(40)
    groups = ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.3)
    left = sorted(range(40), key=lambda row: -float(scores[row]))
    expected = []
    while left:
        best, *others = left
        near = [row for row in others if overlap(boxes[best].tolist(), boxes[row].tolist()) >= 0.3]
        expected.append([best, *near])
        left = [row for row in others if row not in near]
    assert [group.tolist() for group in groups] == expected
    assert any(len(group) > 1 for group in groups)
    assert groups[0].dtype == torch.int64


def test_nms_match_takes_arrays_and_refuses_other_shapes():
    dets = torch.cat([boxes_of(20), scores_of(20)[:, None]], 1)
    groups = ops.nms_match(dets.numpy(), 0.3)
    assert all(isinstance(group, numpy.ndarray) for group in groups)
    assert [g.tolist() for g in groups] == [g.tolist() for g in ops.nms_match(dets, 0.3)]
    assert ops.nms_match(torch.zeros(0, 5), 0.3) == []
    with pytest.raises(AssertionError, match=r"dets must be \(N, 5\)"):
        ops.nms_match(dets[:, :4], 0.3)


def by_class(boxes, scores, labels, threshold):
    kept = []
    for label in set(labels.tolist()):
        rows = (labels == label).nonzero().squeeze(1).tolist()
        inside = greedy(
            [boxes[r].tolist() for r in rows], [float(scores[r]) for r in rows], threshold
        )
        kept += [rows[row] for row in inside]
    return sorted(kept, key=lambda row: -float(scores[row]))


@pytest.mark.parametrize("split_thr", [10000, 10], ids=["whole", "split"])
def test_batched_nms_stays_inside_classes(split_thr):
    boxes, scores, labels = boxes_of(60), scores_of(60), torch.arange(60) % 3
    config = {"type": "nms", "iou_threshold": 0.3, "split_thr": split_thr}
    dets, keep = ops.batched_nms(boxes, scores, labels, config)
    assert keep.tolist() == by_class(boxes, scores, labels, 0.3)
    assert torch.equal(dets, torch.cat([boxes[keep], scores[keep, None]], 1))
    assert config == {"type": "nms", "iou_threshold": 0.3, "split_thr": split_thr}
    limited = ops.batched_nms(boxes, scores, labels, {**config, "max_num": 4})
    assert torch.equal(limited[1], keep[:4])


@pytest.mark.parametrize("kind", ["nms", "soft_nms"])
def test_batched_nms_split_equals_whole(kind):
    boxes, scores, labels = boxes_of(80), scores_of(80), torch.arange(80) % 4
    config = {"type": kind, "iou_threshold": 0.5}
    whole = ops.batched_nms(boxes, scores, labels, config)
    split = ops.batched_nms(boxes, scores, labels, {**config, "split_thr": 10})
    assert torch.equal(whole[1], split[1])
    assert_close(whole[0], split[0], rtol=1e-5, atol=1e-6)


def test_batched_nms_of_two_classes_as_bools():
    boxes, scores, labels = boxes_of(40), scores_of(40), torch.arange(40) % 2 == 0
    whole = ops.batched_nms(boxes, scores, labels, {"iou_threshold": 0.3})
    split = ops.batched_nms(boxes, scores, labels, {"iou_threshold": 0.3, "split_thr": 10})
    assert torch.equal(whole[1], split[1])


def test_batched_nms_class_agnostic_from_either_place():
    boxes, scores, labels = boxes_of(60), scores_of(60), torch.arange(60) % 3
    expected = greedy(boxes.tolist(), scores.tolist(), 0.3)
    config = {"iou_threshold": 0.3}
    assert ops.batched_nms(boxes, scores, labels, config, True)[1].tolist() == expected
    config["class_agnostic"] = True
    assert ops.batched_nms(boxes, scores, labels, config, False)[1].tolist() == expected


def test_batched_nms_without_configuration_sorts():
    boxes, scores = boxes_of(20), scores_of(20)
    dets, keep = ops.batched_nms(boxes, scores, torch.zeros(20), None)
    assert torch.equal(keep, scores.argsort(descending=True))
    assert torch.equal(dets, torch.cat([boxes[keep], scores[keep, None]], 1))


def test_batched_nms_takes_a_function_and_moves_rotated_boxes_by_their_centres():
    seen = []

    def record(boxes, scores):
        seen.append(boxes)
        return torch.cat([boxes, scores[:, None]], 1), torch.arange(len(scores))

    boxes = torch.tensor([[1.0, 2, 4, 3, 0.5], [2.0, 1, 2, 2, -0.5]])
    dets, _ = ops.batched_nms(boxes, scores_of(2), torch.tensor([0, 2]), {"type": record})
    shift = 2 * (2 + 4 + 1)
    expected = boxes + torch.tensor([[0.0] * 5, [shift, shift, 0, 0, 0]])
    assert torch.equal(seen[0], expected)
    assert torch.equal(dets[:, :5], boxes)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_bbox_overlaps(mode, offset):
    first, second = boxes_of(7), boxes_of(5, seed=3)
    result = ops.bbox_overlaps(first, second, mode, offset=offset)
    expected = [[overlap(a, b, offset, mode) for b in second.tolist()] for a in first.tolist()]
    assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    aligned = ops.bbox_overlaps(first[:5], second, mode, aligned=True, offset=offset)
    assert_close(aligned, result[:5].diagonal())
    half = ops.bbox_overlaps(first.half(), second.half(), mode, offset=offset)
    assert half.dtype == torch.float16
    assert_close(half.float(), result, rtol=1e-2, atol=1e-2)


def test_bbox_overlaps_on_two_devices():
    boxes = boxes_of(3)
    with pytest.raises(RuntimeError, match=r"^inconsistent device: box_iou: boxes2 must be on"):
        ops.bbox_overlaps(boxes, boxes.to("meta"))


def test_bbox_overlaps_empty_and_rejects():
    boxes = boxes_of(3)
    assert ops.bbox_overlaps(boxes, torch.zeros(0)).shape == (3, 0)
    assert ops.bbox_overlaps(boxes[:0], boxes[:0], aligned=True).shape == (0,)
    for bad in (
        {"mode": "giou"},
        {"offset": 2},
        {"aligned": True, "bboxes2": boxes[:2]},
        {"bboxes2": boxes[:, :3]},
    ):
        with pytest.raises(AssertionError):
            ops.bbox_overlaps(boxes, **{"bboxes2": boxes, **bad})


ROIS = torch.tensor([[0, 1.0, 1, 9.5, 12], [1, 2.25, 0, 13, 7], [0, 0, 0, 15, 15]])


def features(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)


def bilinear(plane, y, x):
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(())
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    ly, lx = y - y0, x - x0
    top = plane[y0, x0] * (1 - lx) + plane[y0, x1] * lx
    bottom = plane[y1, x0] * (1 - lx) + plane[y1, x1] * lx
    return top * (1 - ly) + bottom * ly


def align_reference(input, rois, size, scale, ratio, mode, aligned):
    rows = []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - 0.5 * aligned for corner in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_h, bin_w = height / size[0], width / size[1]
        gh, gw = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for plane in input[int(index)]:
            for ph in range(size[0]):
                for pw in range(size[1]):
                    samples = [
                        bilinear(
                            plane,
                            y1 + ph * bin_h + (i + 0.5) * bin_h / gh,
                            x1 + pw * bin_w + (j + 0.5) * bin_w / gw,
                        )
                        for i in range(gh)
                        for j in range(gw)
                    ]
                    values = torch.stack(samples)
                    rows.append(values.mean() if mode == "avg" else values.max())
    return torch.stack(rows).reshape(len(rois), input.shape[1], *size)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "legacy"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode, ratio, aligned):
    input = features().requires_grad_()
    result = ops.roi_align(input, ROIS.double(), (2, 3), 0.5, ratio, mode, aligned)
    expected = align_reference(input, ROIS.double(), (2, 3), 0.5, ratio, mode, aligned)
    assert_close(result, expected, rtol=1e-9, atol=1e-9)
    weight = torch.rand_like(result)
    assert_close(
        torch.autograd.grad((result * weight).sum(), input),
        torch.autograd.grad((expected * weight).sum(), input),
        rtol=1e-9,
        atol=1e-9,
    )


def test_roi_align_defaults_and_forms():
    from torchkiln.compat.mmcv._ops.roi_align import RoIAlignFunction

    input = features().float()
    expected = ops.roi_align(input, ROIS, (2, 2), 1.0, 0, "avg", True)
    assert torch.equal(ops.roi_align(input, ROIS, 2), expected)
    assert torch.equal(RoIAlignFunction.apply(input, ROIS, (2, 2), 1.0, 0, "avg", True), expected)
    module = ops.RoIAlign(2, pool_mode="max", sampling_ratio=2.0, spatial_scale=1)
    assert (module.output_size, module.sampling_ratio) == ((2, 2), 2)
    assert torch.equal(module(input, ROIS), ops.roi_align(input, ROIS, 2, 1.0, 2, "max"))
    assert list(module.state_dict()) == []


def test_roi_align_like_torchvision_takes_the_average():
    module = ops.RoIAlign(2, 0.5, pool_mode="max", use_torchvision=True)
    assert module.use_torchvision
    expected = ops.roi_align(features(), ROIS, 2, 0.5)
    assert torch.equal(module(features(), ROIS), expected)


def test_old_keywords_of_roi_align():
    with pytest.warns(DeprecationWarning, match="is deprecated; use") as warned:
        module = ops.RoIAlign(out_size=2, spatial_scale=0.5, sample_num=2)
    assert [str(w.message) for w in warned] == [
        "RoIAlign: out_size is deprecated; use output_size",
        "RoIAlign: sample_num is deprecated; use sampling_ratio",
    ]
    new = ops.RoIAlign(output_size=2, spatial_scale=0.5, sampling_ratio=2)
    assert torch.equal(module(features(), ROIS), new(features(), ROIS))
    with pytest.raises(AssertionError, match="output_size must be given once"):
        ops.RoIAlign(out_size=2, output_size=2)


@pytest.mark.parametrize("call", [ops.roi_align, ops.roi_pool], ids=["roi_align", "roi_pool"])
def test_regions_have_five_columns(call):
    with pytest.raises(AssertionError, match=r"RoI must be \(idx, x1, y1, x2, y2\)"):
        call(features(), ROIS[:, :4], 2)


def test_roi_align_rejects_other_modes():
    with pytest.raises(AssertionError, match="pool_mode"):
        ops.roi_align(features(), ROIS, 2, pool_mode="sum")


def pool_reference(input, rois, size, scale):
    height, width = input.shape[2:]
    rows = []
    for index, x1, y1, x2, y2 in rois.tolist():
        left, top = x1 * scale, y1 * scale
        bin_w = ((x2 + 1) * scale - left) / size[1]
        bin_h = ((y2 + 1) * scale - top) / size[0]
        for plane in input[int(index)]:
            for ph in range(size[0]):
                for pw in range(size[1]):
                    ys = [math.floor(ph * bin_h + top), math.ceil((ph + 1) * bin_h + top)]
                    xs = [math.floor(pw * bin_w + left), math.ceil((pw + 1) * bin_w + left)]
                    ys, xs = (
                        [min(max(edge, 0), limit) for edge in edges]
                        for edges, limit in ((ys, height), (xs, width))
                    )
                    cells = plane[ys[0] : ys[1], xs[0] : xs[1]]
                    empty = cells.numel() == 0 or bin_w <= 0 or bin_h <= 0
                    rows.append(plane.sum() * 0 if empty else cells.max())
    return torch.stack(rows).reshape(len(rois), input.shape[1], *size)


def test_roi_pool_does_not_round():
    rois = torch.tensor([[0, 1.5, 0.25, 9.5, 12.25], [1, 2.25, 3.5, 40, 7], [0, 9, 9, 2, 2]])
    input = features().requires_grad_()
    result = ops.roi_pool(input, rois.double(), (2, 3), 0.5)
    expected = pool_reference(input, rois, (2, 3), 0.5)
    assert torch.equal(result, expected)
    assert_close(
        torch.autograd.grad(result.square().sum(), input),
        torch.autograd.grad(expected.square().sum(), input),
    )
    module = ops.RoIPool((2, 3), 0.5)
    assert torch.equal(module(features(), rois.double()), expected)
    assert not torch.equal(result, native.roi_pool(input, rois.double(), (2, 3), 0.5))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_sigmoid_focal_loss(reduction, weighted):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 3, 4, 1, 2, 4])  # 4 is background
    weight = torch.tensor([1.0, 2, 0.5, 3], dtype=torch.float64) if weighted else None
    positive = torch.nn.functional.one_hot(labels, 5)[:, :4]
    p = logits.sigmoid()
    expected = torch.where(
        positive == 1,
        -0.3 * (1 - p) ** 1.5 * p.log(),
        -0.7 * p**1.5 * (1 - p).log(),
    )
    if weight is not None:
        expected = expected * torch.cat([weight, weight.new_ones(1)])[labels, None]
    if reduction != "none":
        expected = expected.sum() / (6 if reduction == "mean" else 1)
    result = ops.sigmoid_focal_loss(logits, labels, 1.5, 0.3, weight, reduction)
    assert_close(result, expected)
    assert_close(
        torch.autograd.grad(result.sum(), logits), torch.autograd.grad(expected.sum(), logits)
    )
    module = ops.SigmoidFocalLoss(1.5, 0.3, weight, reduction)
    assert_close(module(logits, labels), expected)
    assert list(module.state_dict()) == (["weight"] if weighted else [])


@pytest.mark.parametrize(
    "change",
    [
        {"target": torch.zeros(3)},
        {"target": torch.zeros(2, dtype=torch.int64)},
        {"input": torch.zeros(3)},
        {"reduction": "max"},
        {"weight": torch.zeros(3)},
    ],
    ids=["dtype", "rows", "dimensions", "reduction", "weight"],
)
def test_sigmoid_focal_loss_rejects(change):
    arguments = {"input": torch.zeros(3, 2), "target": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(AssertionError):
        ops.sigmoid_focal_loss(**arguments)


def test_convolutions_are_torchs():
    input, weight = torch.rand(1, 4, 6, 6), torch.rand(2, 4, 3, 3)
    assert torch.equal(
        ops.conv2d(input, weight, None, 2, 1), torch.nn.functional.conv2d(input, weight, None, 2, 1)
    )
    transposed = torch.nn.functional.conv_transpose2d(input, weight.transpose(0, 1), None, 2, 1, 1)
    assert torch.equal(
        ops.conv_transpose2d(input, weight.transpose(0, 1), None, 2, 1, 1), transposed
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Conv2d", (1, 2, 3)),
        ("ConvTranspose2d", (1, 2, 3)),
        ("Linear", (2, 3)),
        ("MaxPool2d", (2,)),
    ],
)
def test_wrappers_warn_and_are_torchs(name, arguments):
    with pytest.warns(DeprecationWarning, match=f"^mmcv.ops.{name}: is deprecated"):
        module = getattr(ops, name)(*arguments)
    assert isinstance(module, getattr(torch.nn, name))


# One test for each row of the table of quirks in docs/compat_mmcv.md.


def test_quirk_bbox_overlaps_empty_union():
    point = torch.tensor([[1.0, 1, 1, 1]])
    assert ops.bbox_overlaps(point, point).isnan().all()
    assert native.box_iou(point, point).tolist() == [[0.0]]


def test_quirk_bbox_overlaps_of_integers():
    boxes = torch.tensor([[0, 0, 10, 10], [5, 5, 15, 15]]) + 2049  # not in float16
    expected = ops.bbox_overlaps(boxes.double(), boxes.double())
    assert_close(ops.bbox_overlaps(boxes, boxes), expected.float())
    assert ops.bbox_overlaps(boxes, boxes[:0]).dtype == torch.float32
    with pytest.raises(TypeError, match="boxes1 must be a floating-point tensor; got int64"):
        native.box_iou(boxes, boxes)


def test_quirk_roi_align_negative_size():
    rois = torch.tensor([[0, 5.0, 5, 2, 9]])
    with pytest.raises(RuntimeError, match="ROIAlign must have a non-negative size"):
        ops.roi_align(features(), rois.double(), 2)
    assert ops.roi_align(features(), rois.double(), 2, aligned=False).shape == (1, 3, 2, 2)
    assert not native.roi_align(features(), rois.double(), 2, aligned=True).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_quirk_roi_align_max_without_samples(dtype):
    rois = torch.tensor([[0, 3.0, 3, 3, 6], [0, 1, 1, 5, 5]])
    result = ops.roi_align(features().to(dtype), rois, 2, pool_mode="max")
    lowest = torch.tensor(torch.finfo(torch.float32).min, dtype=torch.float64).to(dtype)
    assert (result[0] == lowest).all()
    assert (result[1] > 0).all()
    expected = native.roi_align(features().to(dtype), rois, 2, aligned=True, pool_mode="max")
    assert not expected[0].any()
    assert torch.equal(expected[1], result[1])


def test_quirk_roi_pool_corners():
    rois = torch.tensor([[0, 0.5, 0.5, 2.4, 2.4]], dtype=torch.float64)
    image = torch.arange(64.0, dtype=torch.float64).reshape(1, 1, 8, 8)
    assert ops.roi_pool(image, rois, 1).item() == 3 * 8 + 3
    assert native.roi_pool(image, rois, 1).item() == 2 * 8 + 2


def test_quirk_prroi_pool_dtypes_and_size():
    image = torch.arange(16.0, dtype=torch.float64).reshape(1, 1, 4, 4)
    rois = torch.tensor([[0, 1, 1, 2, 2]], dtype=torch.float64, requires_grad=True)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert ops.prroi_pool(image.to(dtype), rois, 1).item() == 7.5
    module = ops.PrRoIPool(1)
    assert torch.equal(module(image, rois), ops.prroi_pool(image, rois, (1, 1), 1.0))
    assert torch.equal(ops.prroi_pool(image, rois, 2), native.prroi_pool(image, rois, 2))
    (grad,) = torch.autograd.grad(module(image, rois).sum(), rois)
    assert grad.tolist() == [[0, 0.5, 2, 0.5, 2]]


@pytest.mark.parametrize("name", ["nms", "nms_rotated", "nms_quadri", "nms3d", "nms3d_normal"])
def test_quirk_nms_of_scores_that_are_nan(name):
    boxes = {  # the second one covers the first, the third is elsewhere
        "nms": [[0, 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12]],
        "nms_rotated": [[2, 2, 4, 4, 0], [2, 2.5, 4, 5, 0], [9, 9, 3, 3, 0]],
        "nms_quadri": [
            [0, 0, 4, 0, 4, 4, 0, 4],
            [0, 0, 4, 0, 4, 5, 0, 5],
            [9, 9, 12, 9, 12, 12, 9, 12],
        ],
    }.get(name, [[2, 2, 0, 4, 4, 1, 0], [2, 2.5, 0, 4, 5, 1, 0], [9, 9, 0, 3, 3, 1, 0]])
    rows, scores = torch.tensor(boxes, dtype=torch.float32), torch.tensor([0.9, math.nan, 0.5])
    result = getattr(ops, name)(rows, scores, 0.5)
    kept = result if torch.is_tensor(result) else result[1]
    assert kept.tolist() == [0, 2, 1] == getattr(native, name)(rows, scores, 0.5).tolist()


def test_quirk_batched_nms_shift():
    boxes = torch.tensor([[-30.0, 0, -20, 10], [-31, -1, -21, 9]])  # moved by 11 they would touch
    labels = torch.tensor([0, 0])
    boxes[1] -= boxes.max() + 1
    labels[1] = 1
    scores = torch.tensor([0.9, 0.8])
    shifted = ops.batched_nms(boxes, scores, labels, {"iou_threshold": 0.3})[1]
    assert shifted.tolist() == [0]
    assert native.batched_nms(boxes, scores, labels, 0.3).tolist() == [0, 1]


def test_quirk_batched_nms_agnostic_above_the_split():
    boxes, scores, labels = boxes_of(60), scores_of(60), torch.arange(60) % 3
    config = {"iou_threshold": 0.3, "split_thr": 10}
    keep = ops.batched_nms(boxes, scores, labels, config, class_agnostic=True)[1]
    assert keep.tolist() == greedy(boxes.tolist(), scores.tolist(), 0.3)


def test_quirk_batched_soft_nms():
    """Classes whose shift would let them meet; their best boxes below min_score."""
    boxes = torch.tensor([[-8.0, 0, 0, 8], [-7.0, 0, 1, 8], [-8.0, 0, 0, 8]])
    scores, labels = torch.tensor([0.9, 0.8, 0.05]), torch.tensor([0, 1, 2])
    config = {"type": "soft_nms", "min_score": 0.1}
    for split_thr in (10000, 1):
        dets, keep = ops.batched_nms(boxes, scores, labels, {**config, "split_thr": split_thr})
        assert keep.tolist() == [0, 1]
        assert torch.equal(dets[:, 4], scores[:2])
    assert ops.batched_nms(boxes, scores / 10, labels, config)[1].tolist() == [0]


def test_quirk_soft_nms_ties():
    # The loop moves row 0 to the place of row 2, behind row 1.
    boxes = torch.tensor([[0.0, 0, 1, 1], [5.0, 0, 6, 1], [9.0, 0, 10, 1]])
    scores = torch.tensor([0.5, 0.5, 0.9])
    assert soft_reference(boxes, scores, 0.3, 0.5, 0.05, "linear", 0)[1] == [2, 1, 0]
    assert ops.soft_nms(boxes, scores)[1].tolist() == [2, 0, 1]
    assert native.soft_nms(boxes, scores)[0].tolist() == [2, 0, 1]


def test_quirk_soft_nms_best_below_min_score():
    boxes, scores = torch.tensor([[0.0, 0, 1, 1], [5.0, 5, 6, 6]]), torch.tensor([0.25, 0.5])
    dets, inds = ops.soft_nms(boxes, scores, min_score=0.75)
    assert inds.tolist() == [1]
    assert dets.tolist() == [[5, 5, 6, 6, 0.5]]
    assert native.soft_nms(boxes, scores, min_score=0.75)[0].tolist() == []


def test_quirk_batched_nms_empty():
    arguments = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    dets, keep = ops.batched_nms(*arguments, {"iou_threshold": 0.3})
    assert dets.shape == (0, 5)
    assert keep.dtype == torch.int64


def test_quirk_sigmoid_focal_loss_saturation():
    logits = torch.tensor([[17.0], [25.0]])
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([1, 1]), reduction="none")
    assert_close(loss.squeeze(1), torch.tensor([12.75, 18.75]), rtol=1e-5, atol=0)


def test_quirk_sigmoid_focal_loss_background_weight():
    logits, labels = torch.tensor([[0.3, -0.2]]), torch.tensor([2])
    weighted = ops.sigmoid_focal_loss(logits, labels, weight=torch.tensor([5.0, 7.0]))
    assert_close(weighted, ops.sigmoid_focal_loss(logits, labels))


def test_quirk_nms_match_at_the_threshold():
    dets = torch.tensor([[0.0, 0, 2, 2, 0.9], [0, 0, 1, 2, 0.8]])  # IoU exactly 0.5
    assert [group.tolist() for group in ops.nms_match(dets, 0.5)] == [[0, 1]]
    tenths = torch.tensor(
        [[3.0, 4, 9, 9, 0.9], [3, 6, 8, 13, 0.8]]
    )  # 15 / 50 is 0.3 in float32 too
    assert [group.tolist() for group in ops.nms_match(tenths, 0.3)] == [[0, 1]]
    assert [group.tolist() for group in ops.nms_match(tenths.numpy(), 0.3)] == [[0, 1]]
    tenths[1, 0] = float("nan")
    assert [group.tolist() for group in ops.nms_match(tenths, 0.3)] == [[0], [1]]
    assert ops.nms(dets[:, :4], dets[:, 4], 0.5)[1].tolist() == [0, 1]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_softmax_focal_loss(reduction):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 3, 4, -1, 2])  # -1 costs nothing
    weight = torch.tensor([1.0, 2, 0.5, 3, 1.5], dtype=torch.float64)
    p = logits.softmax(1)[torch.arange(5), labels.clamp(min=0)]
    expected = -0.3 * (1 - p) ** 1.5 * p.log() * weight[labels.clamp(min=0)] * (labels >= 0)
    if reduction != "none":
        expected = expected.sum() / (5 if reduction == "mean" else 1)
    result = ops.softmax_focal_loss(logits, labels, 1.5, 0.3, weight, reduction)
    assert_close(result, expected)
    along = torch.arange(1.0, 1 + result.numel(), dtype=torch.float64).reshape(result.shape)
    assert_close(
        torch.autograd.grad(result, logits, along), torch.autograd.grad(expected, logits, along)
    )
    module = ops.SoftmaxFocalLoss(1.5, 0.3, weight, reduction)
    assert_close(module(logits, labels), expected)
    with pytest.raises(AssertionError):
        ops.softmax_focal_loss(logits, labels.float())


def test_points_in_polygons():
    square = torch.tensor([[0.0, 0, 4, 0, 4, 4, 0, 4]])
    points = torch.tensor([[1.0, 1], [5, 1], [3, 3.5]])
    inside = ops.points_in_polygons(points, square)
    assert inside.dtype == torch.float32
    assert inside.tolist() == [[1], [0], [1]]
    for bad in ((points[:, :1], square), (points, square[:, :6])):
        with pytest.raises(AssertionError, match="dimension should be"):
            ops.points_in_polygons(*bad)


def test_point_sample_and_its_helpers():
    module = ops.point_sample
    from torchkiln.compat.mmcv._ops import point_sample as helpers

    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    points = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(2))
    expected = torch.nn.functional.grid_sample(
        images, helpers.denormalize(points)[:, :, None], align_corners=True
    )
    assert_close(module(images, points, align_corners=True), expected.squeeze(3))
    grid = helpers.denormalize(points)[:, :, None]
    assert_close(helpers.bilinear_grid_sample(images, grid, True), expected)
    assert_close(helpers.normalize(helpers.denormalize(points)), points)
    assert helpers.get_shape_from_feature_map(images).tolist() == [[[7, 5]]]
    assert helpers.generate_grid(2, (1, 2), "cpu").tolist() == [[[0.25, 0.5], [0.75, 0.5]]] * 2
    rois = torch.tensor([[0.0, 1, 1, 3, 5], [1, 0, 2, 6, 4]], requires_grad=True)
    inside = helpers.rel_roi_point_to_abs_img_point(rois, points)
    corner, size = rois[:, None, 1:3], rois[:, None, 3:] - rois[:, None, 1:3]
    assert_close(inside, (corner + points * size).detach())
    shares = ops.rel_roi_point_to_rel_img_point(rois, points, (5, 7), 0.5)
    assert torch.equal(helpers.abs_img_point_to_rel_img_point(inside, (5, 7), 0.5), shares)
    with pytest.raises(AssertionError):
        helpers.abs_img_point_to_rel_img_point(inside, 5)
    assert_close(shares, inside * 0.5 / torch.tensor([7.0, 5]))
    assert not shares.requires_grad
    with pytest.raises(AssertionError):
        ops.rel_roi_point_to_rel_img_point(rois, points, 5)


def test_quirk_rel_roi_point_has_no_gradient():
    rois = torch.tensor([[0.0, 1, 1, 3, 5]], requires_grad=True)
    points = torch.tensor([[[0.5, 0.25]]])
    from torchkiln.compat.mmcv._ops import point_sample as helpers

    for name, rest in (
        ("rel_roi_point_to_abs_img_point", ()),
        ("rel_roi_point_to_rel_img_point", ((5, 7),)),
    ):
        theirs = getattr(helpers, name)(rois, points, *rest)
        ours = getattr(native, name)(rois, points, *rest)
        assert not theirs.requires_grad
        assert_close(theirs, ours.detach())
        (grad,) = torch.autograd.grad(ours.sum(), rois)
        assert grad.abs().sum() > 0


def test_versions():
    assert ops.get_compiler_version().split()[0] in ("GCC", "Clang")
    assert ops.get_compiling_cuda_version().split(".")[0].isdigit()


def test_quirk_simple_roi_align_order():
    images = torch.arange(2.0)[:, None, None, None].expand(2, 1, 4, 4)
    rois = torch.tensor([[1.0, 0, 0, 4, 4], [0, 0, 0, 4, 4], [1, 1, 1, 3, 3]])
    assert ops.SimpleRoIAlign(1, 1.0)(images, rois).flatten().tolist() == [0, 1, 1]
    assert nn.SimpleRoIAlign(1, 1.0)(images, rois).flatten().tolist() == [1, 0, 1]
    assert ops.SimpleRoIAlign(2, 1.0)(images, rois[:0]).shape == (0, 1, 2, 2)


def test_quirk_roi_pool_gradient_of_negative_size():
    image = torch.ones(1, 1, 5, 5, requires_grad=True)
    pooled = ops.roi_pool(image, torch.tensor([[0.0, 4, 4, 1, 1]]), 2)
    assert pooled.flatten().tolist() == [0, 0, 0, 0]
    (grad,) = torch.autograd.grad(pooled.sum(), image)
    assert grad.abs().sum() == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_quirk_roi_align_max_gradient_on_the_rim(channels_last):
    """One sample, a pixel above the map: mmcv takes its y for that of no sample."""
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    if channels_last:
        image = image.expand(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    image.requires_grad_()
    rows = [[0.0, 0.5, -1.5, 2.5, 0.5], [0, 0.5, -1.25, 2.5, 0.75]]
    for roi, expected in zip(torch.tensor(rows), (0.0, 1.0), strict=True):
        pooled = ops.roi_align(image, roi[None], 1, 1.0, 1, "max")
        assert pooled.flatten()[0].item() == 1
        (grad,) = torch.autograd.grad(pooled.sum(), image)
        assert grad[0, 0].flatten().tolist() == [0, expected, 0, 0, 0, 0, 0, 0, 0]
    plain = native.roi_align(image, torch.tensor(rows[:1]), 1, 1.0, 1, True, pool_mode="max")
    (grad,) = torch.autograd.grad(plain.sum(), image)
    assert grad[0, 0, 0, 1].item() == 1


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2, 3])
def test_roi_align_max_has_the_gradient_elsewhere(ratio, aligned):
    """Of samples that lie anywhere but on the rim, as ours."""
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 12, 14, generator=g, dtype=torch.float64, requires_grad=True)
    corner, side = 12 * torch.rand(9, 2, generator=g) - 2, 9 * torch.rand(9, 2, generator=g)
    rois = torch.cat([torch.randint(2, (9, 1), generator=g), corner, corner + side], 1).double()
    grads = []
    for pool in (
        ops.roi_align(image, rois, (2, 3), 0.7, ratio, "max", aligned),
        native.roi_align(image, rois, (2, 3), 0.7, ratio, aligned, pool_mode="max"),
    ):
        grads += torch.autograd.grad(pool.clamp(min=-9).square().sum(), image)
    assert_close(*grads)


def test_quirk_softmax_focal_loss_without_reduction():
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, weights = torch.tensor([0, 1, -1]), torch.tensor([1.0, 10, 100])
    loss = ops.softmax_focal_loss(logits, labels, reduction="none")
    assert loss.shape == (3,)
    assert loss[2] == 0
    (grad,) = torch.autograd.grad((loss * weights).sum(), logits)
    (plain,) = torch.autograd.grad(
        ops.softmax_focal_loss(logits, labels, reduction="none").sum(), logits
    )
    assert_close(grad, plain * weights[:, None])
    assert plain[2].tolist() == [0, 0]
