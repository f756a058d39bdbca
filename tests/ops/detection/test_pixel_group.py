"""pixel_group: who joins whom."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from support.op_suite import Failure, OpSuite
from support.threads import threads
from torchkiln import ops, reference
from torchkiln.reference.detection.pixel_group import _problem, parity
from torchkiln.testing import Inputs
from torchkiln.testing._cases import prepare


class TestPixelGroup(OpSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"scores": 0, "mask": 0, "embeddings": 0, "labels": 0, "contour": 0}
    failures = (
        Failure(
            "float_mask",
            {"mask": lambda mask: mask.float()},
            TypeError,
            r"^pixel_group: mask must be a bool or uint8 tensor; got float32",
        ),
        Failure(
            "integer_scores",
            {"scores": lambda scores: scores.int()},
            TypeError,
            r"^pixel_group: scores must be a floating-point tensor; got int32",
        ),
        Failure(
            "two_dtypes",
            {"embeddings": lambda embeddings: embeddings.half()},
            TypeError,
            r"^pixel_group: embeddings must have the dtype of scores \(float32\); got float16",
        ),
        Failure(
            "another_size",
            {"contour": lambda contour: contour[1:]},
            ValueError,
            r"^pixel_group: contour must have shape \(23, 31\); got \(22, 31\)",
        ),
        Failure(
            "threshold",
            {"threshold": float("nan")},
            ValueError,
            r"^pixel_group: threshold must be a number; got nan",
        ),
    )

    def sized(self, new: Inputs, n: int) -> Mapping[str, Any]:
        return _problem(n, 7, 3, new)


def test_reference_by_hand() -> None:
    """The pixels of 5 are nearer to the 1, which may not have them, and block its way."""
    problem = {case.name: case for case in parity().cases}["passes_by"].make(Inputs())
    groups, _, counts = reference.pixel_group(**problem)
    assert groups.tolist() == [[1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2]]
    assert counts.tolist() == [0, 7, 7, 0]


def test_confidence_and_counts(device: str) -> None:
    case = next(case for case in parity().cases if case.name == "typical")
    tensors = prepare(case, torch.float32, device)
    groups, confidence, counts = ops.pixel_group(**tensors)
    for label in range(1, 7):
        inside = groups == label
        assert counts[label] == inside.sum()
        if inside.any():
            torch.testing.assert_close(confidence[label], tensors["scores"][inside].mean())
    assert confidence[0] == counts[0] == 0


def test_label_out_of_range() -> None:
    problem = prepare(parity().cases[0], torch.float32, "cpu")
    with pytest.raises(IndexError, match="labels must be at most 2; got"):
        ops.pixel_group(**(problem | {"num_labels": 2}))


def test_on_several_threads() -> None:
    """Enough pixels at one distance for all of them."""
    problem: dict[str, Any] = _problem(301, 211, 4, Inputs(5))
    problem["scores"] = problem["scores"].to(problem["embeddings"].dtype)
    alone = ops.pixel_group(**problem)
    with threads(4):
        shared = ops.pixel_group(**problem)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(alone[0], reference.pixel_group(**problem)[0])
