"""point_sample and the functions that move points between frames of reference."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from torchkiln import ops, reference
from torchkiln.ops.detection.point_sample import _gathered
from torchkiln.reference.detection.point_sample import parities
from torchkiln.testing import Case, Inputs, Parity

SAMPLE, REL_TO_ABS, ABS_TO_REL, REL_TO_REL = parities()


class TestPointSample(CompositionSuite):
    parity = SAMPLE
    dynamic: ClassVar = {"points": 1}
    failures = (
        Failure(
            "input_dimensions",
            {"input": lambda x: x[0]},
            ValueError,
            r"^point_sample: input must have shape \(N, C, H, W\); got \(3, 7, 9\)$",
        ),
        Failure(
            "points_columns",
            {"points": lambda points: points[..., :1]},
            ValueError,
            r"points must have shape \(N, P, 2\) or \(N, H, W, 2\); got \(2, 11, 1\)$",
        ),
        Failure(
            "batch",
            {"points": lambda points: points[:1]},
            ValueError,
            r"points must have the batch size of input \(2\); got 1$",
        ),
        Failure(
            "integers",
            {"input": lambda x: x.int()},
            TypeError,
            "input must be a floating-point tensor; got int32",
        ),
        Failure("mode", {"mode": "linear"}, ValueError, "mode must be .* got 'linear'$"),
        Failure("padding", {"padding_mode": 0}, ValueError, "padding_mode must be .* got 0$"),
        Failure(
            "two_devices",
            {"points": lambda points: points.to("meta")},
            ValueError,
            "points must be on the device of input",
        ),
    )


class TestRelRoiPointToAbsImgPoint(CompositionSuite):
    parity = REL_TO_ABS
    autocast = torch.float32
    dynamic: ClassVar = {"rois": 0, "rel_roi_points": 0}
    failures = (
        Failure(
            "rois_columns",
            {"rois": lambda rois: rois[:, :3]},
            ValueError,
            r"_point: rois must have shape \(N, 4\) or \(N, 5\); got \(7, 3\)$",
        ),
        Failure(
            "count",
            {"rel_roi_points": lambda points: points[:3]},
            ValueError,
            r"_point: rel_roi_points must have shape \(7, P, 2\); got \(3, 9, 2\)$",
        ),
        Failure(
            "two_dtypes",
            {"rel_roi_points": lambda points: points.double()},
            TypeError,
            r"rel_roi_points must have the dtype of rois \(float32\); got float64$",
        ),
    )


class TestAbsImgPointToRelImgPoint(CompositionSuite):
    parity = ABS_TO_REL
    autocast = torch.float32
    dynamic: ClassVar = {"abs_img_points": 0}
    failures = (
        Failure("img", {"img": 7}, ValueError, "img must be .*, or a tensor; got 7$"),
        Failure("img_side", {"img": (4, "x")}, ValueError, r"img must be \(height, width\), both"),
        Failure("img_negative", {"img": (4, -1)}, ValueError, r"both at least 0.*got \(4, -1\)$"),
        Failure("scale", {"spatial_scale": "x"}, TypeError, "spatial_scale must be a number; got"),
        Failure("img_size", {"img": torch.ones(3)}, ValueError, r"img must have shape \(N, C, H"),
    )


class TestRelRoiPointToRelImgPoint(TestRelRoiPointToAbsImgPoint):
    parity = REL_TO_REL


def _grid(rois: Tensor, size: tuple[int, int]) -> Tensor:
    """A grid for each region, on its device: the function itself takes no tensor."""
    return ops.generate_grid(rois.shape[0], size, rois.device)


def _grid_reference(rois: Tensor, size: tuple[int, int]) -> Tensor:
    return reference.generate_grid(rois.shape[0], size, rois.device)


def _regions(count: int, size: tuple[int, int], new: Inputs) -> dict[str, Any]:
    return {"rois": new.boxes(count), "size": size}


class TestGenerateGrid(CompositionSuite):
    parity = Parity(
        op="generate_grid",
        tier="A",
        function=_grid,
        reference=_grid_reference,
        cases=(
            Case("typical", functools.partial(_regions, 7, (14, 9))),
            Case("empty", functools.partial(_regions, 0, (2, 3))),
            Case("single", functools.partial(_regions, 1, (1, 1))),
            Case("no_rows", functools.partial(_regions, 3, (0, 4))),
            Case("no_columns", functools.partial(_regions, 3, (5, 0))),
        ),
    )
    dynamic: ClassVar = {"rois": 0}
    failures = (
        Failure(
            "negative",
            {"size": (2, -1)},
            ValueError,
            r"^generate_grid: size must be two integers, both at least 0; got \(2, -1\)$",
        ),
        Failure(
            "one_side",
            {"size": 4},
            ValueError,
            r"^generate_grid: size must be two integers, both at least 0; got 4$",
        ),
    )


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (0, 4), (5, 0)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_grid_equals_reference(count: int, size: tuple[int, int], device: str) -> None:
    grid = ops.generate_grid(count, size, device)
    expected = reference.generate_grid(count, size, device)
    torch.testing.assert_close(grid, expected)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_all_modes_are_torchs(
    mode: str, padding_mode: str, align_corners: bool, device: str
) -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 3, 5, 6, device=device)
    points = torch.rand(2, 9, 2, device=device) * 1.5 - 0.25
    expected = torch.nn.functional.grid_sample(
        image, 2 * points[:, :, None] - 1, mode, padding_mode, align_corners
    )
    actual = ops.point_sample(image, points, align_corners, mode=mode, padding_mode=padding_mode)
    torch.testing.assert_close(actual, expected.squeeze(3))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("size", [(5, 6), (1, 4), (1, 1)], ids=str)
def test_the_deterministic_way_is_grid_sample(
    size: tuple[int, int], mode: str, padding_mode: str, align_corners: bool
) -> None:
    new = Inputs()
    image = new.normal(2, 3, *size).requires_grad_()
    points = new.uniform(2, 9, 4, 2, low=-1.5, high=2.5).requires_grad_()
    outputs = (
        _gathered(image, points, mode, padding_mode, align_corners),
        torch.nn.functional.grid_sample(image, 2 * points - 1, mode, padding_mode, align_corners),
    )
    torch.testing.assert_close(*outputs)
    weight = new.normal(*outputs[0].shape)
    grads = [torch.autograd.grad((o * weight).sum(), (image, points)) for o in outputs]
    torch.testing.assert_close(*grads)


def test_nan_beside_the_image_stays_there() -> None:
    """Pixels that points outside are clamped to are not taken."""
    image = torch.full((1, 1, 2, 2), torch.nan)
    points = torch.full((1, 1, 1, 2), 3.0, requires_grad=True)
    output = _gathered(image, points, "bilinear", "zeros", False)
    assert output.item() == 0
    assert torch.autograd.grad(output.sum(), points)[0].tolist() == [[[[0, 0]]]]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_deterministic_gradients(mode: str) -> None:
    """Thousands of points on few pixels; torch refuses the gradient of its own."""
    new = Inputs()
    image = new.normal(1, 8, 3, 3).float().cuda().requires_grad_()
    points = new.uniform(1, 5000, 2).float().cuda()
    torch.use_deterministic_algorithms(True)
    try:
        sampled = [ops.point_sample(image, points, mode=mode).square().sum() for _ in range(3)]
        first, *others = [torch.autograd.grad(total, image)[0] for total in sampled]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, other) for other in others)
    plain = ops.point_sample(image, points, mode=mode, deterministic=False).square().sum()
    torch.testing.assert_close(first, torch.autograd.grad(plain, image)[0], rtol=1e-4, atol=1e-3)


def test_positions_of_half_types_are_computed_in_float32(device: str) -> None:
    """Between two of 4096 columns float16 has no position."""
    ramp = torch.arange(4096.0, device=device).half().expand(1, 1, 1, -1)
    points = torch.tensor([[[0.6127, 0.5]]], device=device)
    exact = ops.point_sample(ramp.float(), points)
    assert torch.equal(ops.point_sample(ramp, points), exact.half())


def test_an_image_without_pixels_gives_zeros(device: str) -> None:
    points = torch.rand(2, 5, 2, device=device)
    for shape in ((2, 3, 0, 4), (2, 3, 4, 0), (2, 0, 4, 4)):
        image = torch.ones(shape, device=device, requires_grad=True)
        result = ops.point_sample(image, points)
        assert result.shape == (2, shape[1], 5)
        assert not result.any()
        result.sum().backward()


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_a_point_that_is_not_finite_gives_zero(padding_mode: str, device: str) -> None:
    image = torch.ones(1, 2, 3, 3, device=device, requires_grad=True)
    values = [[math.nan, 0.5], [0.5, math.inf], [-math.inf, 0.5]]
    points = torch.tensor([values], device=device, requires_grad=True)
    result = ops.point_sample(image, points, padding_mode=padding_mode)
    assert not result.any()
    for grad in torch.autograd.grad(result.sum(), (image, points)):
        assert not grad.any()
