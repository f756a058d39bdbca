"""CornerPool, the module around corner_pool."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln.ops import corner_pool

__all__ = ["CornerPool"]


class CornerPool(nn.Module):
    """The largest value from each cell on in one direction, to the border of the map.

    Args:
        mode: "top", "bottom", "left" or "right"; see `torchkiln.ops.corner_pool`.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        """Returns (N, C, H, W) for `input` of that shape."""
        return corner_pool(input, self.mode)

    def extra_repr(self) -> str:
        """Shows the argument."""
        return f"mode={self.mode!r}"
