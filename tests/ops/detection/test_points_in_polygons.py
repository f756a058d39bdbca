"""points_in_polygons: shared edges, either direction, concave and crossed outlines."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import torch
from hypothesis import given

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import reference
from torchkiln.ops import points_in_polygons
from torchkiln.ops.detection.points_in_polygons import _points_in_polygons
from torchkiln.reference.detection.points_in_polygons import parity
from torchkiln.testing import Inputs


class TestPointsInPolygons(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"points": 0, "polygons": 0}
    failures = (
        Failure(
            "points_columns",
            {"points": lambda points: points[:, :1]},
            ValueError,
            r"^points_in_polygons: points must have shape \(N, 2\); got \(33, 1\)$",
        ),
        Failure(
            "polygons_columns",
            {"polygons": lambda polygons: polygons[:, :6]},
            ValueError,
            r"^points_in_polygons: polygons must have shape \(N, 8\); got \(9, 6\)$",
        ),
        Failure(
            "integers",
            {"points": lambda points: points.int()},
            TypeError,
            "points must be a floating-point tensor; got int32",
        ),
        Failure(
            "two_dtypes",
            {"polygons": lambda polygons: polygons.half()},
            TypeError,
            r"polygons must have the dtype of points \(float32\); got float16$",
        ),
    )


def test_by_hand(device: str) -> None:
    # A square, an arrowhead that points to the right, and a bow tie of two triangles.
    rows = [[0, 0, 4, 0, 4, 4, 0, 4], [0, 0, 4, 2, 0, 4, 2, 2], [0, 0, 4, 4, 4, 0, 0, 4]]
    polygons = torch.tensor(rows, device=device).float()
    points = torch.tensor([[1, 2.1], [3, 2.1], [2, 0.5], [5, 2.1]], device=device)
    expected = [[1, 0, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert points_in_polygons(points, polygons).int().tolist() == expected


@given(seeds)
def test_a_point_is_in_one_of_two_that_share_an_edge(seed: int) -> None:
    """A square in two parts; points on the cut, which eighths hold exactly, and anywhere."""
    new = Inputs(seed)
    low, high = new.integers(2, high=8).div(8).tolist()
    rows = [[0, 0, low, 0, high, 1, 0, 1], [low, 0, 1, 0, 1, 1, high, 1]]
    y = new.integers(30, high=8).double() / 8
    cut = torch.stack([low + (high - low) * y, y], 1)
    points = torch.cat([cut, new.uniform(30, 2)])
    found = points_in_polygons(points, torch.tensor(rows, dtype=torch.float64))
    assert (found.sum(1) == 1).all()


@given(seeds)
def test_the_direction_does_not_matter(seed: int) -> None:
    new = Inputs(seed)
    polygons, points = new.integers(9, 8, high=6).float(), new.integers(40, 2, high=6).float()
    backwards = polygons.unflatten(1, (4, 2)).flip(1).flatten(1)
    found = points_in_polygons(points, polygons)
    assert torch.equal(found, points_in_polygons(points, backwards))


def test_reference_of_the_peers_rule_by_hand() -> None:
    """On the outline the sides before decide: the last side is looked at first."""
    square = torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2]])
    points = torch.tensor([[0.0, 1], [2, 1], [1, 0], [1, 2], [1, 1], [3, 1], [0, 0], [2, 2]])
    expected = [0, 0, 0, 1, 1, 0, 0, 0]
    assert reference.points_in_polygons(points, square, True).flatten().tolist() == expected


@given(seeds)
def test_the_peers_rule(seed: int) -> None:
    """Multiples of a quarter, which float32 divides exactly where it matters."""
    new = Inputs(seed)
    polygons, points = new.integers(12, 8, high=5).float(), new.integers(40, 2, high=17).float() / 4
    found = _points_in_polygons(points, polygons, True)
    assert found.dtype == torch.float32
    assert torch.equal(
        found, reference.points_in_polygons(points.double(), polygons.double(), True)
    )


def test_more_pairs_than_the_peer_tells(device: str) -> None:
    """What is beyond 2,097,152 stays 0 in mmcv."""
    points = Inputs().uniform(2000, 2, high=2).float().to(device)
    square = torch.tensor([[0.0, 0, 1, 0, 1, 1, 0, 1]], device=device)
    is_inside = points_in_polygons(points, square.repeat(1100, 1))
    assert torch.equal(is_inside, (points < 1).all(1, keepdim=True).expand(-1, 1100))
