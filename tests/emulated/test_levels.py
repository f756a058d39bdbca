"""Levels as strange as a GPU may get them: nobody can refuse them there.

One that does not lie within its tensor has no samples; others share pixels, or have very many.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

from support import emulated
from torchkiln import ops
from torchkiln.testing import Inputs

PIXELS = 20
# Height, width, first pixel. But for the first, nothing lies there.
LEVELS = ((4, 4, 0), (5, 5, 0), (3, 0, 0), (0, 3, 0), (-1, -1, 0), (2, 2, PIXELS - 1))
# All share pixels with others, a row or its end.
SHARING = ((4, 4, 0), (3, 5, 2), (1, 7, 13), (5, 1, 15))
# Few samples for so many pixels, and very many on one.
CROWDED = ((30, 30, 0), (1, 1, 900))
COLUMNS = 5
# More pixels than 16 bits count, and than a block sums at once.
LARGE = ((259, 255, 0),)
# Odd, for accesses before a buffer; even, for those behind it.
SCHEDULES = (1, 0)

Function = Callable[[list[Tensor], Tensor, Tensor, bool], Tensor]
Levels = tuple[tuple[int, int, int], ...]
FITTING: Levels = (LEVELS[0], *((0, 0, 0),) * (len(LEVELS) - 1))


def attend(tensors: list[Tensor], sizes: Tensor, starts: Tensor, deterministic: bool) -> Tensor:
    value, places, weights = tensors
    return ops.multi_scale_deformable_attention(
        value, sizes, starts, places, weights, deterministic=deterministic
    )


def attend_fused(
    tensors: list[Tensor], sizes: Tensor, starts: Tensor, deterministic: bool
) -> Tensor:
    value, places, weights = tensors
    references = places.detach()[:, :, 0, :, 0]
    return ops.multi_scale_deformable_attention_fused(
        value, sizes, starts, references, places, weights, deterministic=deterministic
    )


def aggregate(tensors: list[Tensor], sizes: Tensor, starts: Tensor, deterministic: bool) -> Tensor:
    value, places, weights = tensors
    if not value.is_cuda:  # where the others are refused
        there = sizes.amin(1) > 0
        sizes, starts, weights = sizes[there], starts[there], weights[:, :, :, there]
    # One camera, two heads as groups.
    return ops.deformable_aggregation(
        value.flatten(2),
        places[:, :, 0, :1].transpose(2, 3),
        weights.permute(0, 1, 4, 3, 2)[:, :, :, None],
        sizes[None],
        starts[None],
        deterministic=deterministic,
    )


def results(
    function: Function, tensors: list[Tensor], levels: Tensor, deterministic: bool
) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(leaves, levels[:, :2].contiguous(), levels[:, 2].contiguous(), deterministic)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    gradients = torch.autograd.grad(output, leaves, direction.to(output.device))
    return [output.detach().cpu(), *(gradient.cpu() for gradient in gradients)]


def compare(
    function: Function,
    queries: int,
    deterministic: bool,
    dtype: torch.dtype,
    levels: Levels = LEVELS,
    fitting: Levels = FITTING,
    pixels: int = PIXELS,
    images: int = 2,
) -> None:
    """Raises where the GPU's results differ from the CPU's of levels that lie within the value.

    Deterministic ones must also be the same bits in another order of threads.
    """
    new = Inputs(3)
    samples = (images, queries, 2, len(levels), 3)
    shapes = {"value": (images, pixels, 2, 8), "places": (*samples, 2), "weights": samples}
    tensors = [new.uniform(*shape).to(dtype) for shape in shapes.values()]
    expected = results(function, tensors, torch.tensor(fitting), deterministic)
    repeats = []
    for schedule in SCHEDULES:
        emulated.schedule(schedule)
        on_gpu = [tensor.cuda() for tensor in tensors]
        actual = results(function, on_gpu, torch.tensor(levels).cuda(), deterministic)
        for result, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(result, other)
        repeats.append(actual)
    if deterministic:
        assert all(map(torch.equal, *repeats))


# With as many queries as pixels, the gradient of an attention's value is merged in blocks.
@pytest.mark.parametrize(
    ("function", "queries"),
    [
        (attend, 2),
        (attend, 5),
        (attend, PIXELS),
        (attend_fused, 5),
        (attend_fused, PIXELS),
        (aggregate, 5),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_levels_that_do_not_fit(
    gpu: ProcessPoolExecutor,
    function: Function,
    queries: int,
    deterministic: bool,
    dtype: torch.dtype,
) -> None:
    gpu.submit(compare, function, queries, deterministic, dtype).result()


# With few queries, lanes have several pixels each; with many, those of several add up for one.
@pytest.mark.parametrize("queries", [3, 5, 90])
@pytest.mark.parametrize("deterministic", [False, True])
def test_levels_that_share_pixels(
    gpu: ProcessPoolExecutor, queries: int, deterministic: bool
) -> None:
    float32 = torch.float32
    gpu.submit(compare, attend, queries, deterministic, float32, SHARING, SHARING).result()


# With few queries, pixels gather their samples; with many, these are added up in runs.
@pytest.mark.parametrize("queries", [100, 320])
def test_a_level_of_one_pixel(gpu: ProcessPoolExecutor, queries: int) -> None:
    args = (attend, queries, True, torch.float64, CROWDED, CROWDED, 901)
    gpu.submit(compare, *args).result()


def attend_in_columns(
    tensors: list[Tensor], sizes: Tensor, starts: Tensor, deterministic: bool
) -> Tensor:
    """With a third of the queries in each of three cells; beside the second one is an empty one."""
    value, places, weights = tensors
    queries = places.shape[1]
    cells = torch.tensor([0.2, 1.4, 3.7], dtype=places.dtype).repeat_interleave(queries // 3)
    there = torch.stack([(cells + 0.5) / COLUMNS, torch.full_like(cells, 0.6)], -1)
    places = 0 * places + there[:, None, None, None].to(places.device)
    return attend([value, places, weights], sizes, starts, deterministic)


# Three samples each: runs of 128 end where cells do, just before or behind that, and elsewhere.
@pytest.mark.parametrize("queries_of_cell", [128, 127, 129, 20])
def test_runs_and_cells(gpu: ProcessPoolExecutor, queries_of_cell: int) -> None:
    levels: Levels = ((2, COLUMNS, 0),)
    args = (3 * queries_of_cell, True, torch.float64, levels, levels, 2 * COLUMNS)
    gpu.submit(compare, attend_in_columns, *args).result()


def test_levels_of_many_pixels(gpu: ProcessPoolExecutor) -> None:
    pixels = LARGE[0][0] * LARGE[0][1]
    # What rounding moves in a large level is another test's affair.
    gpu.submit(compare, attend, 20, True, torch.float64, LARGE, LARGE, pixels, images=1).result()
