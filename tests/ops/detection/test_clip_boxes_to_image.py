"""clip_boxes_to_image."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import CompositionSuite, Failure
from support.strategies import boxes
from torchkiln.ops import clip_boxes_to_image
from torchkiln.reference.detection.clip_boxes_to_image import parity


class TestClipBoxesToImage(CompositionSuite):
    parity = parity()
    dynamic: ClassVar = {"boxes": 0}
    failures = (
        Failure(
            "columns",
            {"boxes": lambda boxes: boxes[:, :3]},
            ValueError,
            r"^clip_boxes_to_image: boxes must have shape \(\.\.\., 4\); got \(33, 3\)$",
        ),
        Failure(
            "integers",
            {"boxes": lambda boxes: boxes.long()},
            TypeError,
            "boxes must be a floating-point tensor; got int64",
        ),
        Failure(
            "negative_size",
            {"size": (4, -1)},
            ValueError,
            r"size must be \(height, width\), both at least 0; got \(4, -1\)$",
        ),
        Failure("one_number", {"size": 4}, ValueError, r"must be \(height, width\), .* got 4$"),
    )


@given(boxes())
def test_twice_is_once(rows: Tensor) -> None:
    clipped = clip_boxes_to_image(rows, (3, 5))
    assert torch.equal(clip_boxes_to_image(clipped, (3, 5)), clipped)
    assert bool((clipped <= torch.tensor([5, 3, 5, 3])).all())


def test_a_side_beyond_the_dtype_cuts_nothing(device: str) -> None:
    rows = torch.tensor([[-5, 2, 65504, 9]], dtype=torch.float16, device=device)
    assert clip_boxes_to_image(rows, (7, 70_000)).tolist() == [[0, 2, 65504, 7]]


def test_half_boxes_under_autocast_to_the_other_half_type() -> None:
    rows = torch.tensor([[-5.0, 2, 9, 70]], dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        clipped = clip_boxes_to_image(rows, (7, 8))
    assert clipped.dtype == torch.float16
    assert clipped.tolist() == [[0, 2, 8, 7]]


@pytest.mark.parametrize("size", [(48, 64), (30, 40)])
def test_compiles_for_the_size_of_any_image(size: tuple[int, int]) -> None:
    """The sizes are symbolic numbers then."""
    rows, image = torch.tensor([[-1.0, 2, 90, 99]]), torch.zeros(1, 3, *size)
    compiled = torch.compile(
        lambda rows, image: clip_boxes_to_image(rows, image.shape[-2:]),
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    assert torch.equal(compiled(rows, image), clip_boxes_to_image(rows, size))


def test_refuses_words() -> None:
    with pytest.raises(ValueError, match=r"^clip_boxes_to_image: size must be \(height, width\)"):
        clip_boxes_to_image(torch.zeros(1, 4), ("a", "b"))  # type: ignore[arg-type]
