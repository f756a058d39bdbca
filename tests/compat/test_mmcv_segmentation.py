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
    """By differences: of points in general position, where there is a gradient."""
    g = torch.Generator().manual_seed(0)
    points = 3 * torch.rand(4, 18, generator=g, dtype=torch.float64)
    squares = SQUARE.double() + torch.rand(4, 1, generator=g, dtype=torch.float64)
    giou, gradient = ops.convex_giou(points.requires_grad_(), squares)
    assert not giou.requires_grad
    assert not gradient.requires_grad
    step = 1e-6 * torch.eye(18, dtype=torch.float64)[:, None]
    there, back = (
        native.convex_giou((points.detach() + way).flatten(0, 1), squares.repeat(18, 1))
        for way in (step, -step)
    )
    assert_close(gradient, ((there - back) / 2e-6).reshape(18, 4).T, atol=1e-6, rtol=1e-6)


# Points, corners, and what mmcv's kernel gives: corners in common, sides on sides, the origin on a
# line with others or inside, all points the same corner.
TIES = [
    (
        [1, 1, 2, 2, 1, 2, 2, 1, 1, 3, 3, 1, 2, 3, 3, 2, 1.5, 1.5],
        [1, 1, 1, 2, 2, 2, 2, 1],
        [20408, 40816, *[0] * 6, 61224, *[-40816] * 2, 81633, -40816, *[-81633] * 2, -40816, 0, 0],
    ),
    (
        [2, 1, 5, 1, 5, 3, 3, 4, 2, 3, 3, 2, 3, 2, 4, 3, 2, 1],
        [2, 1, 4, 1, 4, 3, 2, 3],
        [0, 35556, -71111, 106667, -106667, -71111, 0, -106667, 35556, -35556, *[0] * 8],
    ),
    (
        [1, 1, 4, 1, 4, 4, 1, 4, 2, 2, 3, 3, 2, 3, 3, 2, 2.5, 1],
        [0, 0, 0, 3, 4, 3, 4, 0],
        [-95197, -100000, 67447, -100000, -68096, -36878, -44768, -68096, *[0] * 10],
    ),
    (
        [-1, -1, 2, -1, 2, 2, -1, 2, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0],
        [0, -2, 2, 0, 0, 2, -2, 0],
        [-74438, -74438, -102158, -12339, -63963, -63963, -12339, -102158, *[0] * 10],
    ),
    ([2] * 18, [0, 0, 2, 0, 2, 2, 0, 2], [0] * 18),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_quirk_convex_giou_gradient_where_there_is_none(dtype):
    points, corners = (torch.tensor([row[place] for row in TIES], dtype=dtype) for place in (0, 1))
    general = torch.rand(1, 18, generator=torch.Generator().manual_seed(1)).to(dtype)
    points, corners = torch.cat([points, general]), torch.cat([corners, corners[:1]])
    giou, gradient = ops.convex_giou(points, corners)
    expected = torch.tensor([row[2] for row in TIES], dtype=torch.float64) / 1e6
    precision = 1e-3 if dtype == torch.float16 else 1e-6
    assert_close(gradient[:-1].double(), expected, atol=precision, rtol=0)
    assert gradient.dtype == dtype
    own = points.clone().requires_grad_()
    value = native.convex_giou(own, corners)
    assert torch.equal(giou, value.detach())
    (other,) = torch.autograd.grad(value.sum(), own)
    assert torch.equal(gradient[-1], other[-1])
    assert ((gradient - other)[:-1].abs().amax(1) > 5e-3).all()
    with torch.inference_mode():
        assert torch.equal(ops.convex_giou(points, corners)[1], gradient)


def test_convex_giou_in_a_compiled_graph_and_of_nothing():
    points, corners = (torch.tensor(rows, dtype=torch.float32) for rows in TIES[0][:2])
    compiled = torch.compile(ops.convex_giou, fullgraph=True, backend="eager")
    giou, gradient = compiled(points[None], corners[None])
    assert_close(giou, ops.convex_giou(points[None], corners[None])[0])
    assert gradient.shape == (1, 18)
    both = ops.convex_giou(points[None][:0], corners[None][:0])
    assert [tuple(result.shape) for result in both] == [(0,), (0, 18)]
    nowhere = torch.ones(1, 18), torch.ones(1, 8)  # mmcv divides by their areas
    assert [result.abs().sum().item() for result in ops.convex_giou(*nowhere)] == [0, 0]


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
