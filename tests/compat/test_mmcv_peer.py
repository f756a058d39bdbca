"""Where the drop-in follows mmcv against torchkiln.ops: errors, graphs, ties, strange values."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from torchkiln import nn
from torchkiln import ops as native
from torchkiln.compat.mmcv import ops
from torchkiln.compat.mmcv._common import listed_errors

NAN, INF = math.nan, math.inf


def _pair(columns: int) -> tuple[Tensor, Tensor]:
    rows = torch.rand(4, columns, generator=torch.Generator().manual_seed(columns))
    return rows, rows.double()


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("box_iou_rotated", 5, 5),
        ("convex_iou", 18, 8),
        ("convex_giou", 18, 8),
        ("points_in_polygons", 2, 8),
        ("boxes_iou_bev", 5, 5),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_dtypes_are_the_error_that_torch_has(name, first, second):
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        getattr(ops, name)(_pair(first)[0], _pair(second)[1])
    with pytest.raises(RuntimeError, match="expected scalar type Double but found Float"):
        getattr(ops, name)(_pair(first)[1], _pair(second)[0])


def test_two_dtypes_in_losses_regions_and_soft_nms():
    labels, weight = torch.tensor([0, 1, 0, 1]), torch.ones(2, dtype=torch.float64)
    boxes, scores = _pair(4)[0], torch.rand(4, dtype=torch.float64)
    calls = [
        lambda: ops.sigmoid_focal_loss(torch.zeros(4, 2), labels, weight=weight),
        lambda: ops.softmax_focal_loss(torch.zeros(4, 2), labels, weight=weight),
        lambda: ops.soft_nms(boxes, scores),
        lambda: ops.diff_iou_rotated_2d(torch.ones(1, 1, 5), torch.ones(1, 1, 5).double()),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
            call()
    rois = torch.tensor([[0, 1, 1, 3, 3]])
    for pool in (ops.roi_align, ops.roi_pool):
        with pytest.raises(RuntimeError, match="expected scalar type Float but found Long"):
            pool(torch.zeros(1, 1, 4, 4), rois, 2)


def test_maps_of_another_dtype():
    masks, labels = torch.ones(2, 3, 3, dtype=torch.uint8), torch.ones(3, 3, dtype=torch.int32)
    maps = torch.rand(3, 3), masks[0], torch.rand(3, 3, 4)
    with pytest.raises(RuntimeError, match="expected scalar type Int but found Long"):
        ops.contour_expand(masks, labels.long(), 0, 1)
    with pytest.raises(RuntimeError, match="expected scalar type Byte but found Float"):
        ops.contour_expand(masks.float(), labels, 0, 1)
    with pytest.raises(RuntimeError, match="expected scalar type Int but found Long"):
        ops.pixel_group(*maps, labels.long(), masks[0], 2, 0.5)


def test_two_devices_and_other_mistakes():
    @listed_errors
    def fail(sentence: str) -> None:
        raise ValueError(sentence)

    sentence = "nms: scores must be on the device of boxes (cuda:0); got cpu"
    with pytest.raises(RuntimeError, match=rf"^inconsistent device: {sentence[:30]}"):
        fail(sentence)
    with pytest.raises(ValueError, match=r"^nms: boxes must have shape"):
        fail("nms: boxes must have shape (N, 4); got (3,)")


def test_border_align_names_the_factor():
    with pytest.raises(AssertionError, match="divisible by factor 4"):
        ops.border_align(torch.zeros(1, 6, 2, 2), torch.zeros(1, 4, 4), 2)


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32")])
def test_scores_of_another_dtype_are_only_sorted(dtypes):
    boxes_dtype, scores_dtype = (getattr(torch, name) for name in dtypes)
    g = torch.Generator().manual_seed(0)
    boxes = (torch.rand(30, 4, generator=g) * 8).to(boxes_dtype)
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.randperm(30, generator=g).to(scores_dtype)
    labels, settings = torch.arange(30) % 3, {"iou_threshold": 0.3}
    for row, expected in (
        (ops.nms(boxes, scores, 0.3), ops.nms(boxes.float(), scores.float(), 0.3)),
        (
            ops.batched_nms(boxes, scores, labels, {**settings, "split_thr": 1}),
            ops.batched_nms(boxes.float(), scores.float(), labels, {**settings, "split_thr": 1}),
        ),
    ):
        assert row[1].tolist() == expected[1].tolist()
        assert row[0].dtype == torch.float32  # as torch.cat of both
    turned = torch.cat([boxes, boxes[:, :1]], 1)
    expected = ops.nms_rotated(turned.float(), scores.float(), 0.3)[1]
    assert ops.nms_rotated(turned, scores, 0.3)[1].tolist() == expected.tolist()
    solid = torch.cat([boxes, boxes[:, 1:]], 1)
    expected = ops.nms3d_normal(solid.float(), scores.float(), 0.3)
    assert ops.nms3d_normal(solid, scores, 0.3).tolist() == expected.tolist()


@pytest.mark.parametrize("module", [ops.RoIAlign, ops.RoIPool, ops.PrRoIPool, ops.SimpleRoIAlign])
def test_sizes_may_be_numbers_of_numpy(module):
    assert module(numpy.int64(3), 1.0).output_size == (3, 3)
    assert module((numpy.int64(3), 2), 1.0).output_size == (3, 2)
    with pytest.raises(TypeError):
        module(2.5, 1.0)


@pytest.mark.parametrize("rotated", [False, True])
def test_regions_are_checked_in_a_compiled_graph(rotated):
    image = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    turn = [0.3] * rotated
    good = torch.tensor([[0.0, 1, 2, 4, 5, *turn]])
    bad = torch.tensor([[0.0, 4, 2, -1, 5, *turn]])
    module = ops.RoIAlignRotated(2, 1.0) if rotated else ops.RoIAlign(2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, good), module(image, good))
    for run in (module, compiled):
        with pytest.raises(RuntimeError, match="must have a non-negative size"):
            run(image, bad)


def test_line_nms_keeps_counts_and_names_parents():
    lanes = torch.zeros(5, 5 + 6, dtype=torch.float64)
    lanes[:, 4] = 6
    lanes[:, 5:] = torch.tensor([9.0, 1, 9.5, 1.25, 20])[:, None]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    keep, count, parent = ops.line_nms(lanes, scores, 1.0, 5)
    assert keep.tolist() == [0, 1, 4, 0, 0]
    assert (count.item(), parent.tolist()) == (3, [1, 2, 1, 2, 3])
    assert (count.shape, count.dtype, keep.dtype) == ((), torch.int64, torch.int64)
    assert keep[:3].tolist() == native.line_nms(lanes, scores.double(), 1.0).tolist()
    keep, count, parent = ops.line_nms(lanes, scores, 1.0, 1)
    assert (keep.tolist(), count.item()) == ([0, 0, 0, 0, 0], 1)
    assert parent.tolist() == [1, 0, 1, 0, 0]
    assert ops.line_nms(lanes, scores, 1.0, 0)[1].item() == 0
    empty = ops.line_nms(lanes[:0], scores[:0], 1.0, 3)
    assert [tensor.tolist() for tensor in empty] == [[], 0, []]
    for bad in ((lanes[0], scores), (lanes[:, :5], scores), (lanes, scores[:2])):
        with pytest.raises(AssertionError):
            ops.line_nms(*bad, 1.0, 5)


def test_line_nms_looks_where_both_lanes_run():
    # Starts 1 and 3 of 6 heights, lengths 4 and 2: they share heights 3 and 4.
    head = torch.tensor([[0.0, 0, 0.2, 0, 4], [0.0, 0, 0.6, 0, 2]])
    x = torch.tensor([[9.0, 9, 9, 1, 2, 9], [0.0, 0, 0, 2, 4, 0]])  # mean distance 1.5
    lanes, scores = torch.cat([head, x], 1), torch.tensor([0.9, 0.8])
    assert ops.line_nms(lanes, scores, 1.5, 2)[1].item() == 2
    assert ops.line_nms(lanes, scores, 1.5001, 2)[1].item() == 1
    lanes[1, 2] = -0.5  # where one starts outside, the other's start counts
    lanes[1, 4] = 9
    assert ops.line_nms(lanes, scores, 20.0, 2)[1].item() == 1
    lanes[0, 2] = -0.5
    assert ops.line_nms(lanes, scores, 20.0, 2)[1].item() == 2


def test_line_nms_is_imported_but_none_of_mmcvs_names():
    from torchkiln.compat.mmcv import _tree

    assert _tree.modules()["mmcv.ops.line_nms"].line_nms is ops.line_nms
    assert "line_nms" not in ops.__all__
    assert "line_nms" in dir(ops)


# One test for each row of the table of quirks in docs/compat_mmcv.md.


def test_quirk_line_nms_rows_are_not_ordered():
    """The second best lane suppresses what is close to row 1, which is the worst."""
    lanes = torch.zeros(3, 5 + 4)
    lanes[:, 4] = 4
    lanes[:, 5:] = torch.tensor([0.0, 50, 100])[:, None]
    scores = torch.tensor([0.9, 0.7, 0.8])
    keep, count, parent = ops.line_nms(lanes, scores, 1.0, 3)
    assert (keep.tolist(), count.item(), parent.tolist()) == ([0, 2, 0], 2, [1, 2, 2])
    assert native.line_nms(lanes, scores, 1.0).tolist() == [0, 2, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_quirk_corner_pool_takes_integers(dtype):
    row = torch.tensor([[[[2, 1, 3, 0, 2]]]], dtype=dtype)
    expected = {"left": [3, 3, 3, 2, 2], "right": [2, 2, 3, 3, 3]}
    for mode, values in expected.items():
        pooled = ops.CornerPool(mode)(row)
        assert (pooled.flatten().tolist(), pooled.dtype) == (values, dtype)
    for mode, same in (("top", "left"), ("bottom", "right")):
        assert ops.CornerPool(mode)(row.mT).flatten().tolist() == expected[same]
    with pytest.raises(TypeError, match="corner_pool: input must be"):
        native.corner_pool(row, "left")


def test_quirk_convex_iou_and_min_area_polygons_have_no_gradient():
    points = torch.rand(3, 18, generator=torch.Generator().manual_seed(0)).requires_grad_()
    square = torch.tensor([[0.0, 0, 1, 0, 1, 1, 0, 1]], requires_grad=True)
    for result in (ops.convex_iou(points, square), ops.min_area_polygons(points)):
        assert not result.requires_grad
        (grad,) = torch.autograd.grad(result.sum() + points.sum(), points)
        assert (grad == 1).all()
    for result in (native.convex_iou(points, square), native.min_area_polygons(points)):
        with pytest.raises(NotImplementedError, match="a gradient is not implemented"):
            result.sum().backward()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_quirk_point_sample_of_points_that_are_not_finite(padding_mode, align_corners):
    image = torch.arange(1.0, 5).reshape(1, 1, 2, 2)
    points = torch.tensor([[[NAN, 0.5], [INF, 0.5], [0.5, -INF], [0.25, 0.75]]])
    expected = functional.grid_sample(
        image,
        points[:, :, None] * 2 - 1,
        padding_mode=padding_mode,
        align_corners=align_corners,
    )
    settings = {"padding_mode": padding_mode}
    sampled = ops.point_sample(image, points, align_corners, **settings)
    assert_close(sampled, expected.squeeze(3), equal_nan=True)
    own = native.point_sample(image, points, align_corners, **settings)
    assert own[0, 0, :3].tolist() == [0, 0, 0]
    assert own[0, 0, 3] == sampled[0, 0, 3]
    differ = sampled[0, 0, :3].isnan() if padding_mode == "zeros" else sampled[0, 0, :3] != 0
    assert differ.any()


def test_quirk_simple_roi_align_of_regions_that_are_not_finite():
    image = torch.ones(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 0, 0, INF, 4], [0, 0, 0, 4, 4]])
    assert ops.SimpleRoIAlign(1, 1.0)(image, rois).flatten().tolist() == [0, 1]
    assert nn.SimpleRoIAlign(1, 1.0)(image, rois).flatten().tolist() == [0, 1]
