"""RoIPool, the module around roi_pool."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchkiln.ops import roi_pool

__all__ = ["RoIPool"]


class RoIPool(nn.Module):
    """Pools each region of interest to a fixed grid by the maximum of each bin.

    Args:
        output_size: bins (height, width), or one number for both.
        spatial_scale: cells of the input per pixel of the image.
        rounding: see `torchkiln.ops.roi_pool`.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        *,
        rounding: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.rounding = rounding

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns (K, C, height, width) for regions `boxes` of `input` (N, C, H, W)."""
        return roi_pool(input, boxes, self.output_size, self.spatial_scale, rounding=self.rounding)

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"rounding={self.rounding}"
        )
