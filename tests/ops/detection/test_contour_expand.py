"""contour_expand: rounds, ties, and the label of the nearest source."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from support.threads import threads
from torchkiln import ops, reference
from torchkiln.reference.detection.contour_expand import parity
from torchkiln.testing import Inputs


class TestContourExpand(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"masks": 1, "labels": 0}
    failures = (
        Failure(
            "float_masks",
            {"masks": lambda masks: masks.float()},
            TypeError,
            r"^contour_expand: masks must be a bool or uint8 tensor; got float32",
        ),
        Failure(
            "long_labels",
            {"labels": lambda labels: labels.long()},
            TypeError,
            r"^contour_expand: labels must be an int32 tensor; got int64",
        ),
        Failure(
            "another_size",
            {"masks": lambda masks: masks[:, 1:]},
            ValueError,
            r"^contour_expand: masks must have shape \(5, 23, 31\); got \(5, 22, 31\)",
        ),
        Failure(
            "no_masks",
            {"masks": lambda masks: masks[:0]},
            ValueError,
            r"^contour_expand: masks must have at least one plane; got \(0, 23, 31\)",
        ),
        Failure(
            "num_labels",
            {"num_labels": -1},
            ValueError,
            r"^contour_expand: num_labels must be from 0 to 16777216; got -1",
        ),
    )

    def sized(self, new: Inputs, n: int) -> Mapping[str, Any]:
        labels = new.integers(n, 7, high=3).int() * (new.uniform(n, 7) < 0.2)
        return {
            "masks": (new.uniform(3, n, 7) < 0.7).to(torch.uint8),
            "labels": labels.int(),
            "min_area": 0,
            "num_labels": 2,
        }


def _rows(text: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in text.split()], dtype=torch.int32)


def test_reference_by_hand() -> None:
    """The inner mask lets only the 2 in, which then is nearer to most of the outer one."""
    labels = _rows("10000 00000 00002")
    inner, outer = _rows("10000 00000 11111"), _rows("11111 11011 11111")
    masks = torch.stack([outer, inner, inner])
    assert torch.equal(reference.contour_expand(masks, labels, 0, 2), _rows("11122 12022 22222"))
    # By the outer mask alone the 1 gets half of it.
    flood = reference.contour_expand(masks[[0, 0]], labels, 0, 2)
    assert torch.equal(flood, _rows("11112 11022 11222"))


def test_on_several_threads() -> None:
    """Enough pixels at one distance for all of them; labels go past the ends of rows and pieces."""
    new = Inputs(3)
    masks = (new.uniform(3, 301, 211) < torch.tensor([0.9, 0.7, 0.5]).view(3, 1, 1)).byte()
    labels = torch.where(new.uniform(301, 211) < 0.05, new.integers(301, 211, low=1, high=40), 0)
    alone = ops.contour_expand(masks, labels.int(), 70, 39)
    for count in (2, 4, 16):
        with threads(count):
            assert torch.equal(ops.contour_expand(masks, labels.int(), 70, 39), alone)
    assert torch.equal(alone, reference.contour_expand(masks, labels.int(), 70, 39))


def test_label_out_of_range(device: str) -> None:
    labels = _rows("103").to(device)
    masks = torch.ones(2, 1, 3, dtype=torch.bool, device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"labels must be at most 2; got 3\. Pass a larger"):
            ops.contour_expand(masks, labels, 0, 2)
        return
    assert ops.contour_expand(masks, labels, 0, 2).tolist() == [[1, 1, 1]]


@settings(max_examples=20)
@given(seeds)
def test_is_the_nearest_source(seed: int) -> None:
    """In one round, by the distances of each source alone."""
    new = Inputs(seed)
    mask = new.uniform(9, 11) < 0.7
    labels = torch.where(new.uniform(9, 11) < 0.06, new.integers(9, 11, low=1, high=5), 0).int()
    far = 10_000
    best = torch.full((9, 11), far * 100)
    nearest = labels.clone()
    for index in labels.flatten().nonzero().flatten().tolist():
        distance = torch.full((9, 11), far)
        distance.view(-1)[index] = 0
        for _ in range(99):
            shifted = torch.full((4, 11, 13), far)
            for i, (y, x) in enumerate(((0, 1), (2, 1), (1, 0), (1, 2))):
                shifted[i, y : y + 9, x : x + 11] = distance + 1
            step = shifted[:, 1:-1, 1:-1].amin(0)
            distance = torch.where(mask & (labels == 0), distance.minimum(step), distance)
        key = distance * 100 + index
        nearer = (key < best) & (distance < far) & (labels == 0)
        best = torch.where(nearer, key, best)
        nearest = torch.where(nearer, labels.view(-1)[index], nearest)
    masks = torch.stack([mask, mask])
    assert torch.equal(ops.contour_expand(masks, labels, 0, 4), nearest)
