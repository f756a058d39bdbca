"""mmcv's rules of rotated overlaps on the emulated GPU: no parity declares these kernels' forms."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

from support import emulated
from torchkiln.compat.mmcv._ops import box_iou_quadri, iou3d
from torchkiln.reference.detection.box_iou_rotated import corners, rectangles, uprights
from torchkiln.testing import Inputs


def quads(new: Inputs, count: int) -> Tensor:
    return corners(rectangles(new, count)).flatten(1)


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (box_iou_quadri.box_iou_quadri, quads),
        (iou3d.boxes_overlap_bev, uprights),
        (iou3d.boxes_iou3d, uprights),
    ],
)
def test_equals_the_cpu(
    gpu: ProcessPoolExecutor,
    function: Callable[[Tensor, Tensor], Tensor],
    rows: Callable[[Inputs, int], Tensor],
) -> None:
    # Some far apart, some on top of each other; more than a tile of both.
    a, b = rows(Inputs(8), 37).float(), rows(Inputs(9), 70).float()
    a[:9, :2] += 1000
    b[:5] = a[20:25]
    actual = gpu.submit(emulated.on_gpu, function, a.tolist(), b.tolist()).result()
    torch.testing.assert_close(torch.tensor(actual), function(a, b), atol=1e-4, rtol=1e-4)
