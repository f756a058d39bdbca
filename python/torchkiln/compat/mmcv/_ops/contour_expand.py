"""`mmcv.ops.contour_expand`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import listed_errors

__all__ = ["contour_expand"]


@listed_errors
def contour_expand(
    kernel_mask: Tensor | numpy.ndarray,
    internal_kernel_label: Tensor | numpy.ndarray,
    min_kernel_area: int,
    kernel_num: int,
) -> list[list[int]]:
    """Lets labelled kernels flood mask 0, as mmcv does; without a second mask they stay.

    `torchkiln.ops.contour_expand` goes through the masks one after the other.

    Args:
        kernel_mask: (K, h, w) uint8, tensor or array.
        internal_kernel_label: (h, w) int32, alike.
        min_kernel_area: smaller kernels are dropped.
        kernel_num: at least the largest label.

    Returns:
        The labels, h lists of w.

    Raises:
        AssertionError: for arguments of other types.
    """
    assert isinstance(kernel_mask, (Tensor, numpy.ndarray)), "kernel_mask must be a tensor or array"
    assert isinstance(internal_kernel_label, (Tensor, numpy.ndarray)), (
        "internal_kernel_label must be a tensor or array"
    )
    assert isinstance(min_kernel_area, int), "min_kernel_area must be an int"
    assert isinstance(kernel_num, int), "kernel_num must be an int"
    masks, labels = torch.as_tensor(kernel_mask), torch.as_tensor(internal_kernel_label)
    flooded = masks[[0, 0]] if masks.shape[0] > 1 else masks
    rows: list[list[int]] = ops.contour_expand(
        flooded, labels, min_kernel_area, kernel_num
    ).tolist()
    return rows
