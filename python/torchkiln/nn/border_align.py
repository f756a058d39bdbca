"""BorderAlign, the module around border_align."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln.ops.detection.border_align import border_align

__all__ = ["BorderAlign"]


class BorderAlign(nn.Module):
    """Takes the greatest of samples along each border; see `torchkiln.ops.border_align`.

    Args:
        pool_size: parts of a border.
    """

    def __init__(self, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size

    def forward(self, input: Tensor, boxes: Tensor) -> Tensor:
        """Returns (N, C, B, 4) for `input` (N, 4 * C, H, W) and `boxes` (N, B, 4)."""
        return border_align(input, boxes, self.pool_size)

    def extra_repr(self) -> str:
        """The settings."""
        return f"pool_size={self.pool_size}"
