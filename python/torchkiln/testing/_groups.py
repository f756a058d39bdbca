"""Groups of boxes as a fixed number of tensors: for comparisons."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def matched(**arguments: Any) -> tuple[Tensor, Tensor]:
    """`nms_match`, in one."""
    from torchkiln import ops

    return in_one(ops.nms_match(**arguments))


def in_one(groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of all groups, and how many each has: as many tensors whatever is found."""
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
    return torch.cat(groups) if groups else sizes, sizes
