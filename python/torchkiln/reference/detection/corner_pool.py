"""corner_pool in plain PyTorch: cumulative maxima of a flipped map."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["corner_pool"]


def corner_pool(input: Tensor, mode: int, with_maxima: bool = False) -> tuple[Tensor, Tensor]:
    """The largest value from each cell on in one direction.

    Args:
        input: (N, C, H, W).
        mode: 0 top, 1 bottom, 2 left, 3 right.
        with_maxima: whether the operator keeps maxima for its gradient; not needed here.

    Returns:
        (N, C, H, W); an empty tensor.
    """
    dim = 2 if mode in (0, 1) else 3
    if mode in (1, 3):
        pooled = torch.cummax(input, dim).values
    else:
        pooled = torch.cummax(input.flip(dim), dim).values.flip(dim)
    return pooled, input.new_empty(0, dtype=torch.int32)


def parity() -> Parity:
    """What corner_pool is tried on."""
    return Parity(
        op="corner_pool",
        tier="X",
        fuzz=_fuzz,
        differentiable=("input",),
        cases=(
            Case("typical", functools.partial(_normal, "top", (2, 3, 9, 12))),
            Case("bottom", functools.partial(_normal, "bottom", (2, 3, 9, 12))),
            Case("left", functools.partial(_normal, "left", (2, 3, 5, 16))),
            Case("right", functools.partial(_normal, "right", (2, 3, 5, 13))),
            # More than one tile of the GPU's scans, which end in the middle of one.
            Case("tall", functools.partial(_normal, "bottom", (1, 1, 301, 6))),
            Case("wide", functools.partial(_normal, "left", (1, 1, 3, 1111))),
            # More columns than a span of the CPU's loop.
            Case("many_columns", functools.partial(_normal, "top", (1, 1, 4, 523))),
            Case("ties", functools.partial(_ties, "top")),
            Case("ties_left", functools.partial(_ties, "left")),
            Case("single", functools.partial(_normal, "right", (1, 1, 1, 1))),
            Case("empty", functools.partial(_normal, "left", (2, 3, 4, 0))),
            Case("not_finite", functools.partial(_not_finite, "right")),
            Case("not_finite_top", functools.partial(_not_finite, "top")),
        ),
        workloads=tuple(
            # CornerNet's heads on an image of 511 x 511.
            Workload(
                mode,
                {"images": 2, "channels": 256, "height": 128, "width": 128},
                functools.partial(_map, mode),
                layouts=("contiguous", "channels_last"),
            )
            for mode in ("top", "left")
        ),
    )


def _map(mode: str, sizes: Sizes) -> dict[str, object]:
    shape = sizes["images"], sizes["channels"], sizes["height"], sizes["width"]
    return {"input": scenes.normal(shape, scenes.SEED), "mode": mode}


def _normal(mode: str, shape: tuple[int, ...], new: Inputs) -> dict[str, object]:
    return {"input": new.normal(*shape), "mode": mode}


def _ties(mode: str, new: Inputs) -> dict[str, object]:
    return {"input": new.integers(2, 2, 17, 40, high=4).double(), "mode": mode}


def _not_finite(mode: str, new: Inputs) -> dict[str, object]:
    input = new.normal(1, 2, 8, 40)
    input[0, 0, 2, 5] = input[0, 0, 5, 5] = input[0, 0, 2, 30] = math.nan
    input[0, 1, :, 3:7], input[0, 1, 3, 20] = -math.inf, math.inf
    return {"input": input, "mode": mode}


def _fuzz(draw: Draw) -> dict[str, object]:
    input = draw.values(draw.size(3), draw.size(5), draw.size(), draw.size(20))
    return {"input": input, "mode": draw.option("mode", "top", "bottom", "left", "right")}
