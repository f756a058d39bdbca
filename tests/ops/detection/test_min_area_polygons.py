"""min_area_polygons: rectangles around points."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import torch
from hypothesis import given, settings

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import ops, reference
from torchkiln.reference.detection.min_area_polygons import parity
from torchkiln.testing import Inputs


class TestMinAreaPolygons(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"pointsets": 0}
    failures = (
        Failure(
            "columns",
            {"pointsets": lambda rows: rows[:, :16]},
            ValueError,
            r"^min_area_polygons: pointsets must have shape \(N, 18\); got \(65, 16\)",
        ),
        Failure(
            "integers",
            {"pointsets": lambda rows: rows.long()},
            TypeError,
            r"^min_area_polygons: pointsets must be a floating-point tensor; got int64",
        ),
    )


def test_reference_by_hand() -> None:
    # A square on its corner; its lowest side runs at 45 degrees.
    corners = torch.tensor([[1.0, 0], [2, 1], [1, 2], [0, 1]], dtype=torch.float64)
    points = torch.cat([corners, torch.ones(5, 2)]).reshape(1, 18)
    expected = torch.tensor([[2.0, 1, 1, 0, 0, 1, 1, 2]], dtype=torch.float64)
    torch.testing.assert_close(reference.min_area_polygons(points), expected)


@settings(max_examples=25)
@given(seeds)
def test_is_a_rectangle_around_all_points(seed: int) -> None:
    points = Inputs(seed).normal(20, 9, 2)
    corners = ops.min_area_polygons(points.flatten(1)).unflatten(1, (4, 2))
    along, across = corners[:, 0] - corners[:, 1], corners[:, 2] - corners[:, 1]
    torch.testing.assert_close((along * across).sum(1), torch.zeros(20).double(), atol=1e-9, rtol=0)
    for side in (along, across):
        share = ((points - corners[:, 1:2]) * side[:, None]).sum(2) / side.square().sum(1)[:, None]
        # Each side of it touches a point, and none is beyond.
        for value, bound in ((share.amin(1), 0.0), (share.amax(1), 1.0)):
            torch.testing.assert_close(value, torch.full_like(value, bound), atol=1e-9, rtol=0)
    areas = along.norm(dim=1) * across.norm(dim=1)
    box = (points.amax(1) - points.amin(1)).prod(1)
    assert bool((areas <= box + 1e-9).all())
