"""Gradients of position-sensitive pooling on the emulated GPU against those of the CPU.

Cut in all ways that a gradient can be: several groups of outputs and of bins, several tiles,
several batches of regions, both layouts of what comes in and of what goes out.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

from torchkiln.testing import Inputs

# Images, outputs, pooled height and width, height, width, regions.
Sizes = tuple[int, int, int, int, int, int, int]
CUTS: dict[str, Sizes] = {
    "bins": (1, 2, 1, 19, 9, 40, 30),
    "outputs": (2, 25, 2, 1, 5, 7, 20),
    "tiles": (1, 3, 1, 2, 45, 39, 12),
    "batches": (1, 2, 1, 1, 6, 5, 700),
    "tall": (1, 5, 3, 1, 70, 1, 9),
}


def gradients(sizes: Sizes, pooling: int, ratio: int, grad_last: bool, last: bool) -> list[Tensor]:
    """Of the CPU and the GPU."""
    n, outputs, bins_y, bins_x, height, width, regions = sizes
    new = Inputs(7)
    extent = torch.tensor([width, height])
    corner = new.uniform(regions, 2, low=-0.2, high=0.9) * extent
    far = corner + new.uniform(regions, 2, high=0.9) * extent
    image = new.integers(regions, 1, high=n)
    boxes = torch.cat([image, corner, far], 1).double().mul(4).round() / 4
    grad = new.normal(regions, outputs, bins_y, bins_x).float()
    grad[0, 0, 0, 0] = torch.inf  # goes where its bin goes, and nowhere else
    if grad_last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    options = (n, outputs * bins_y * bins_x, height, width, 1.0, ratio, pooling, last)
    operator = torch.ops.torchkiln._ps_roi_pool_backward
    return [operator(grad.to(d), boxes.float().to(d), *options).cpu() for d in ("cpu", "cuda")]


@pytest.mark.parametrize("grad_last", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("pooling", "ratio"), [(0, 2), (0, 0), (1, -1)])
@pytest.mark.parametrize("cut", list(CUTS))
def test_equals_cpu(
    gpu: ProcessPoolExecutor, cut: str, pooling: int, ratio: int, last: bool, grad_last: bool
) -> None:
    run = gpu.submit(gradients, CUTS[cut], pooling, ratio, grad_last, last)
    expected, got = run.result()
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
