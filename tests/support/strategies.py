"""Hypothesis strategies for the inputs of operators."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from torchkiln.testing import Inputs

seeds = st.integers(0, 2**31)
counts = st.integers(0, 40)


@st.composite
def boxes(draw: st.DrawFn, min_count: int = 0, max_count: int = 40) -> Tensor:
    """(N, 4) float64 on a coarse grid, so that ties and touching borders are common."""
    count = draw(st.integers(min_count, max_count))
    new = Inputs(draw(seeds))
    corner = new.integers(count, 2, high=12)
    return torch.cat([corner, corner + new.integers(count, 2, high=9)], dim=1).double() / 2


@st.composite
def tensors(draw: st.DrawFn, *dims: st.SearchStrategy[int]) -> Tensor:
    """Normal float64 values; one strategy for each size."""
    return Inputs(draw(seeds)).normal(*(draw(size) for size in dims))


@st.composite
def clouds(draw: st.DrawFn, min_count: int = 1, max_count: int = 200) -> Tensor:
    """(N, 3) float64 points in a unit cube, some of them equal."""
    new = Inputs(draw(seeds))
    points = new.uniform(draw(st.integers(min_count, max_count)), 3)
    copies = draw(st.integers(0, points.shape[0] // 4))
    points[:copies] = points[points.shape[0] - copies :]
    return points
