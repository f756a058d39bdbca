"""Polygons, corner pooling and segmentation through the drop-in for mmcv.ops."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from torchkiln import ops as native
from torchkiln.compat.mmcv import ops


@pytest.mark.parametrize(
    ("mode", "shape", "expected", "grad"),
    [
        ("top", (1, 1, 5, 1), [3, 3, 3, 3, 1], [0, 0, 7, 8, 16]),
        ("bottom", (1, 1, 5, 1), [2, 2, 3, 3, 3], [3, 0, 4, 24, 0]),
        ("left", (1, 1, 1, 5), [3, 3, 3, 3, 1], [0, 0, 7, 8, 16]),
        ("right", (1, 1, 1, 5), [2, 2, 3, 3, 3], [3, 0, 4, 24, 0]),
    ],
)
def test_corner_pool(mode, shape, expected, grad):
    """Of two equal maxima the one further on in the pool's direction gets the gradient."""
    line = torch.tensor([2.0, 0, 3, 3, 1], requires_grad=True)
    module = ops.CornerPool(mode)
    assert module.mode == mode
    pooled = module(line.reshape(shape))
    assert pooled.flatten().tolist() == expected
    pooled.flatten().backward(torch.tensor([1.0, 2, 4, 8, 16]))
    assert line.grad.tolist() == grad


def test_corner_pool_refuses_other_modes():
    with pytest.raises(AssertionError, match="mode must be one of"):
        ops.CornerPool("corner")


SQUARE = torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2]])


def points_of(*corners):
    """Nine points, the last corner several times."""
    rows = torch.tensor(corners).reshape(-1, 2)
    return torch.cat([rows, rows[-1:].expand(9 - len(rows), 2)]).reshape(1, 18)


def test_convex_iou_by_hand():
    triangle = points_of(0.0, 0, 4, 0, 0, 2)
    far = SQUARE + 9
    assert_close(ops.convex_iou(triangle, torch.cat([SQUARE, far])), torch.tensor([[3 / 5, 0.0]]))


def test_quirk_convex_giou_returns_its_gradient():
    points = points_of(5.0, 0, 7, 0, 7, 2, 5, 2).requires_grad_()
    giou, gradient = ops.convex_giou(points, SQUARE)
    assert not giou.requires_grad
    assert not gradient.requires_grad
    value = native.convex_giou(points, SQUARE)
    assert_close(giou, value.detach())
    assert_close(gradient, torch.autograd.grad(value.sum(), points)[0])
    assert giou.item() == pytest.approx(-6 / 14)
    assert gradient.shape == (1, 18)


def test_min_area_polygons_by_hand():
    """Around a square on its corner, and around one along the axes."""
    points = torch.cat([points_of(1.0, 0, 2, 1, 1, 2, 0, 1), points_of(0.0, 0, 4, 0, 4, 2, 0, 2)])
    expected = torch.tensor([[2.0, 1, 1, 0, 0, 1, 1, 2], [4, 0, 0, 0, 0, 2, 4, 2]])
    assert_close(ops.min_area_polygons(points), expected)


def test_quirk_min_area_polygons_of_one_point():
    assert_close(ops.min_area_polygons(torch.full((1, 18), 3.0)), torch.full((1, 8), 3.0))


def test_points_in_polygons():
    points = torch.tensor([[1.0, 1], [3, 1]])
    inside = ops.points_in_polygons(points, torch.cat([SQUARE, SQUARE + 2]))
    assert inside.dtype == torch.float32
    assert inside.tolist() == [[1, 0], [0, 0]]
    with pytest.raises(AssertionError, match="points dimension should be 2"):
        ops.points_in_polygons(torch.zeros(3, 3), SQUARE)
    with pytest.raises(AssertionError, match="polygons dimension should be 8"):
        ops.points_in_polygons(points, torch.zeros(3, 4))


def test_quirk_points_in_polygons_on_the_outline():
    """Each side of a square, and two of its corners."""
    points = torch.tensor([[0.0, 1], [2, 1], [1, 0], [1, 2], [0, 0], [2, 2]])
    assert ops.points_in_polygons(points, SQUARE).flatten().tolist() == [0, 0, 0, 1, 0, 0]
    inside = native.points_in_polygons(points, SQUARE).flatten().int()
    assert inside.tolist() == [1, 0, 1, 0, 1, 0]
    assert ops.points_in_polygons(points.double(), SQUARE.double()).dtype == torch.float32


def test_contour_expand_takes_tensors_and_arrays():
    masks = torch.tensor([[[1, 1, 1, 0, 1]], [[1, 0, 0, 0, 1]]], dtype=torch.uint8)
    labels = torch.tensor([[2, 0, 0, 0, 1]], dtype=torch.int32)
    expected = [[2, 2, 2, 0, 1]]
    assert ops.contour_expand(masks, labels, 0, 2) == expected
    assert ops.contour_expand(masks.numpy(), labels.numpy(), 0, 2) == expected
    assert ops.contour_expand(masks, labels, 2, 2) == [[0, 0, 0, 0, 0]]
    with pytest.raises(AssertionError):
        ops.contour_expand(masks.tolist(), labels, 0, 2)


def test_quirk_contour_expand_floods_the_first_mask():
    masks = torch.ones(3, 1, 6, dtype=torch.uint8)
    masks[1, 0, 1:5] = torch.tensor([0, 1, 1, 1])
    labels = torch.tensor([[1, 0, 0, 0, 0, 2]], dtype=torch.int32)
    assert ops.contour_expand(masks, labels, 0, 2) == [[1, 1, 1, 2, 2, 2]]
    assert native.contour_expand(masks, labels, 0, 2).tolist() == [[1, 1, 2, 2, 2, 2]]
    assert ops.contour_expand(masks[:1], labels, 0, 2) == labels.tolist()


def test_quirk_pixel_group_takes_maps():
    """Any map: builds of mmcv that check their arguments stop the process for each."""
    labels = torch.tensor([[1, 0, 0, 2], [0, 0, 0, 2]], dtype=torch.int32)
    embedding = torch.tensor([[0.0, 0.5, 3, 3], [0, 9, 3, 3]])[..., None]
    score = torch.tensor([[0.2, 0.4, 0.5, 0.5], [0.6, 0.1, 0.8, 0.2]])
    arguments = (score, torch.ones(2, 4).bool(), embedding, labels, (labels > 0).to(torch.uint8))
    expected = [
        [0, 0],
        [0.4, 3, 0, 0, 1, 0, 0, 1],
        [0.5, 4, 2, 0, 3, 0, 2, 1, 3, 1],
    ]
    for given in (arguments, tuple(value.numpy() for value in arguments)):
        result = ops.pixel_group(*given, 3, 1.0)
        assert [row[1:] for row in result] == [row[1:] for row in expected]
        assert [row[0] for row in result] == pytest.approx([0, 0.4, 0.5], abs=1e-6)
    with pytest.raises(AssertionError, match="distance_threshold must be a float"):
        ops.pixel_group(*arguments, 3, 1)
