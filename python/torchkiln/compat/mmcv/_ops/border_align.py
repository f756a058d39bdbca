"""`mmcv.ops.border_align`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors

__all__ = ["BorderAlign", "BorderAlignFunction", "border_align"]


@listed_errors
def border_align(input: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
    """`torchkiln.ops.border_align`, on the CPU too.

    Raises:
        AssertionError: for boxes that are not (N, B, 4), or channels that 4 does not divide.
    """
    assert boxes.dim() == 3, "boxes must be with shape [B, H*W, 4]"
    assert boxes.size(2) == 4, "the last dimension of boxes must be (x1, y1, x2, y2)"
    assert input.size(1) % 4 == 0, "the number of channels must be divisible by factor 4"
    return ops.border_align(input, boxes, pool_size)


BorderAlignFunction = function_class("BorderAlignFunction", border_align)


class BorderAlign(nn.Module):
    """`border_align` as a module."""

    def __init__(self, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size

    def forward(self, input: Tensor, boxes: Tensor) -> Tensor:
        """Returns (N, C, B, 4) for `input` (N, 4 * C, H, W) and `boxes` (N, B, 4)."""
        return border_align(input, boxes, self.pool_size)

    def extra_repr(self) -> str:
        """The setting."""
        return f"pool_size={self.pool_size}"
