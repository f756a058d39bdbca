"""Polygons, corner pooling and segmentation through the drop-in for mmcv.ops."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from torchkiln.compat.mmcv import ops


@pytest.mark.parametrize(
    ("mode", "shape", "expected", "grad"),
    [
        ("top", (1, 1, 5, 1), [3, 3, 3, 3, 1], [0, 0, 7, 8, 16]),
        ("bottom", (1, 1, 5, 1), [2, 2, 3, 3, 3], [3, 0, 4, 24, 0]),
        ("left", (1, 1, 1, 5), [3, 3, 3, 3, 1], [0, 0, 7, 8, 16]),
        ("right", (1, 1, 1, 5), [2, 2, 3, 3, 3], [3, 0, 4, 24, 0]),
    ],
)
def test_corner_pool(mode, shape, expected, grad):
    """Of two equal maxima the one further on in the pool's direction gets the gradient."""
    line = torch.tensor([2.0, 0, 3, 3, 1], requires_grad=True)
    module = ops.CornerPool(mode)
    assert module.mode == mode
    pooled = module(line.reshape(shape))
    assert pooled.flatten().tolist() == expected
    pooled.flatten().backward(torch.tensor([1.0, 2, 4, 8, 16]))
    assert line.grad.tolist() == grad


def test_corner_pool_refuses_other_modes():
    with pytest.raises(AssertionError, match="mode must be one of"):
        ops.CornerPool("corner")
