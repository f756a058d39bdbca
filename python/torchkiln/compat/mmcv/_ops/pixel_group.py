"""`mmcv.ops.pixel_group`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import listed_errors

__all__ = ["pixel_group"]

_Array = Tensor | numpy.ndarray


@listed_errors
def pixel_group(
    score: _Array,
    mask: _Array,
    embedding: _Array,
    kernel_label: _Array,
    kernel_contour: _Array,
    kernel_region_num: int,
    distance_threshold: float,
) -> list[list[float]]:
    """`torchkiln.ops.pixel_group` as lists of pixels.

    Args:
        score: (h, w) float32, tensor or array, as all that follow.
        mask: (h, w) bool.
        embedding: (h, w, c) float32.
        kernel_label: (h, w) int32.
        kernel_contour: (h, w) uint8.
        kernel_region_num: number of kernels with background; labels are below it.
        distance_threshold: of embeddings.

    Returns:
        One list for each label: mean score, number of pixels, x and y of each of them, row by row.
        That of background is [0, 0].

    Raises:
        AssertionError: for arguments of other types.
    """
    arrays = {
        "score": score,
        "mask": mask,
        "embedding": embedding,
        "kernel_label": kernel_label,
        "kernel_contour": kernel_contour,
    }
    for name, value in arrays.items():
        assert isinstance(value, (Tensor, numpy.ndarray)), f"{name} must be a tensor or array"
    assert isinstance(kernel_region_num, int), "kernel_region_num must be an int"
    assert isinstance(distance_threshold, float), "distance_threshold must be a float"
    scores, masks, embeddings, labels, contour = map(torch.as_tensor, arrays.values())
    groups, means, counts = ops.pixel_group(
        scores, masks, embeddings, labels, contour, kernel_region_num - 1, distance_threshold
    )
    y, x = (groups > 0).nonzero(as_tuple=True)
    order = groups[y, x].argsort(stable=True)
    points = torch.stack([x[order], y[order]], 1).double().cpu().split(counts.tolist())
    heads = torch.stack([means.double(), counts.double()], 1).tolist()
    return [[*head, *rows.flatten().tolist()] for head, rows in zip(heads, points, strict=True)]
