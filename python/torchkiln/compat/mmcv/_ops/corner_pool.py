"""`mmcv.ops.corner_pool`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln import ops

__all__ = ["CornerPool"]


class CornerPool(nn.Module):
    """`torchkiln.ops.corner_pool` as a module, for maps of integers too.

    Args:
        mode: "top", "bottom", "left" or "right"; another one is an AssertionError.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        modes = ("bottom", "left", "right", "top")
        assert mode in modes, f"mode must be one of {', '.join(modes)}; got {mode!r}"
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """Returns the running maxima of a map (N, C, H, W)."""
        if x.is_floating_point():
            return ops.corner_pool(x, self.mode)
        axis = 2 if self.mode in ("top", "bottom") else 3
        if self.mode in ("bottom", "right"):
            return x.cummax(axis).values
        return x.flip(axis).cummax(axis).values.flip(axis)
