"""Long lists of points in few pixels: their sums are split over blocks, their shares merged."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

from support import emulated
from torchkiln import backend, ops
from torchkiln.testing import Inputs

CAMERAS, POINTS, SCHEDULES = 3, 120, (1, 0)


def results(tensors: list[Tensor], softmax: bool, deterministic: bool) -> list[Tensor]:
    """The output and the gradients of maps, places and weights."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    *maps, places, weights = leaves
    output = ops.deformable_aggregation(
        maps, places, weights, softmax=softmax, deterministic=deterministic
    )
    direction = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    gradients = torch.autograd.grad(output, leaves, direction)
    return [output.detach().cpu(), *(gradient.cpu() for gradient in gradients)]


def compare(groups: int, channels: int, dtype: torch.dtype, softmax: bool) -> None:
    """Raises where results differ from the float64 reference, or from one run to the next."""
    new = Inputs(5)
    sizes = ((6, 9), (2, 3))
    maps = [new.uniform(1, CAMERAS, channels, *size) for size in sizes]
    # The points of a query lie in a pixel or two; many of the last camera's are not seen.
    centre = new.uniform(1, 2, 1, CAMERAS, 2).abs() * 0.8
    places = centre + 0.1 * new.uniform(1, 2, POINTS, CAMERAS, 2).abs()
    places[:, :, ::3, -1] += 2
    weights = new.uniform(1, 2, POINTS, CAMERAS, len(sizes), groups)
    tensors = [tensor.to(dtype) for tensor in (*maps, places, weights)]
    tensors[-2] = places.float()
    with backend("reference"):
        expected = results([tensor.double() for tensor in tensors], softmax, False)
    # Half types round what sums are made of nowhere, and each result once.
    bound = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for deterministic in (False, True):
        runs = []
        for schedule in SCHEDULES:
            emulated.schedule(schedule)
            runs.append(results([tensor.cuda() for tensor in tensors], softmax, deterministic))
        for actual, right in zip(runs[0], expected, strict=True):
            torch.testing.assert_close(
                actual.double(), right, rtol=bound, atol=bound * float(right.abs().max())
            )
        kept = range(len(expected)) if deterministic or dtype != torch.float32 else [0]
        assert all(torch.equal(runs[0][i], runs[1][i]) for i in kept)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("groups", "channels", "dtype"),
    [
        (8, 64, torch.float32),
        (8, 64, torch.float16),
        (1, 40, torch.bfloat16),
        (12, 96, torch.float16),  # more groups than a warp takes at once
        (20, 20, torch.float32),
    ],
)
def test_points_that_lie_together(
    gpu: ProcessPoolExecutor, groups: int, channels: int, dtype: torch.dtype, softmax: bool
) -> None:
    gpu.submit(compare, groups, channels, dtype, softmax).result()
