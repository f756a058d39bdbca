"""nn.SimpleRoIAlign, against point_sample of each region's own image."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from torchkiln import nn, reference
from torchkiln.testing import Case, Inputs, Parity


def call(features: Tensor, rois: Tensor, aligned: bool = True) -> Tensor:
    return nn.SimpleRoIAlign((2, 3), 0.5, aligned)(features, rois)


def expected(features: Tensor, rois: Tensor, aligned: bool = True) -> Tensor:
    """Region by region."""
    size = features.shape[2:]
    pooled = [features.new_zeros(0, features.shape[1], 2, 3) + 0 * features.sum() + 0 * rois.sum()]
    for roi in rois:
        grid = reference.generate_grid(1, (2, 3), rois.device).to(rois)
        points = reference.rel_roi_point_to_rel_img_point(roi[None], grid, size, 0.5)
        image = features[int(roi[0])][None]
        pooled.append(reference.point_sample(image, points, not aligned).unflatten(2, (2, 3)))
    return torch.cat(pooled)


def problem(count: int, new: Inputs, **settings: object) -> dict[str, object]:
    """Regions out of order, some beyond the image; finite differences move the index, too."""
    rois = torch.cat([new.integers(count, 1, high=3) + 0.5, new.boxes(count, 40.0) - 5], 1)
    return {"features": new.normal(3, 4, 9, 11), "rois": rois, **settings}


class TestSimpleRoIAlign(CompositionSuite):
    parity = Parity(
        op="SimpleRoIAlign",
        tier="B",
        differentiable=("features", "rois"),
        function=call,
        reference=expected,
        cases=(
            Case("typical", functools.partial(problem, 7)),
            Case("not_aligned", functools.partial(problem, 7, aligned=False)),
            Case("single", functools.partial(problem, 1)),
            Case("no_regions", functools.partial(problem, 0)),
        ),
        dtypes=(torch.float32, torch.float64),
    )
    dynamic: ClassVar = {"rois": 0}
    failures = (
        Failure(
            "rois",
            {"rois": lambda rois: rois[:, 1:]},
            ValueError,
            r"^SimpleRoIAlign: rois must have shape \(K, 5\); got \(7, 4\)$",
        ),
        Failure(
            "features",
            {"features": lambda x: x[0]},
            ValueError,
            r"^SimpleRoIAlign: features must have shape \(N, C, H, W\)",
        ),
        Failure("integers", {"features": lambda x: x.int()}, TypeError, "got int32"),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features(dtype: torch.dtype, device: str) -> None:
    new = Inputs()
    arguments = problem(5, new)
    features, rois = arguments["features"], arguments["rois"]
    assert isinstance(features, Tensor)
    assert isinstance(rois, Tensor)
    features, rois = features.to(device, dtype), rois.to(device).float()
    torch.testing.assert_close(call(features, rois), call(features.float(), rois).to(dtype))


def test_what_is_in_no_image_is_zero(device: str) -> None:
    features = torch.ones(2, 3, 8, 8, device=device, requires_grad=True)
    rows = [[2, 0, 0, 8, 8], [-1, 0, 0, 8, 8], [0, math.nan, 0, 8, 8], [1, 90, 90, 99, 99]]
    rois = torch.tensor(rows, device=device).float()
    pooled = call(features, rois)
    assert not pooled.any()
    (grad,) = torch.autograd.grad(pooled.sum(), features)
    assert not grad.any()
    assert call(features[:0], rois).shape == (4, 3, 2, 3)
    for empty in (features[:, :0], features[:, :, :0], features[..., :0]):
        pooled = call(empty, rois)
        assert pooled.shape == (4, empty.shape[1], 2, 3)
        assert not pooled.any()


@pytest.mark.parametrize("size", [0, (0, 2), (2.0, 2.0), "7", (1, 2, 3)])
def test_refuses_a_size(size: object) -> None:
    with pytest.raises(ValueError, match=r"^SimpleRoIAlign: output_size must be "):
        nn.SimpleRoIAlign(size, 1.0)  # type: ignore[arg-type]
