"""Samples of pooling operators keep their digits far from the map's first pixel.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchkiln import ops

FAR = 3000.3
# A stripe of 1 on every other column: what a sample is off by is what the value is off by.
STRIPES = (torch.arange(4096) % 2).float().expand(1, 1, 12, 4096).contiguous()


def aligned(input: Tensor) -> Tensor:
    box = torch.tensor([[0, 4 * FAR, 8.4, 4 * FAR + 21.7, 37.3]])
    return ops.roi_align(input, box.to(input), 7, 0.25, 2, aligned=True)


def rotated(input: Tensor) -> Tensor:
    box = torch.tensor([[0, 4 * FAR, 22.9, 21.7, 13.3, 0.3]])
    return ops.roi_align_rotated(input, box.to(input), 7, 0.25, 2)


def curved(input: Tensor) -> Tensor:
    upper = torch.tensor([[0, 12], [9, 8.3], [19, 8.1], [28, 13.7]])
    both = torch.cat([upper, upper.flip(0) + torch.tensor([1.1, 15.2])])
    both[:, 0] += 4 * FAR
    line = torch.cat([torch.zeros(1), both.flatten()])[None]
    return ops.bezier_align(input, line.to(input), 5, 0.25, 1)


@pytest.mark.parametrize("pool", [aligned, rotated, curved])
def test_far_samples_keep_their_digits(pool: Callable[[Tensor], Tensor], device: str) -> None:
    """A position there, as one number, would be off by 1e-4; the box itself is the same."""
    expected = pool(STRIPES.double())
    assert 0.1 < expected.mean() < 0.9
    error = (pool(STRIPES.to(device)).cpu().double() - expected).abs().max()
    assert error < 5e-6
