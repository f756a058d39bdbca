"""Position-sensitive pooling as modules."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchkiln.ops.detection.ps_roi_pool import ps_roi_align, ps_roi_pool

__all__ = ["PSRoIAlign", "PSRoIPool"]


class PSRoIAlign(nn.Module):
    """Samples of each bin of each region; see `torchkiln.ops.ps_roi_align`.

    Args:
        output_size: bins, (height, width) or one number for both.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
    """

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns (K, C / bins, height, width) for regions `rois` of `input`."""
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        )


class PSRoIPool(nn.Module):
    """Cells of each bin of each region; see `torchkiln.ops.ps_roi_pool`.

    Args:
        output_size: bins, (height, width) or one number for both.
        spatial_scale: input cells per image pixel.
    """

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns (K, C / bins, height, width) for regions `rois` of `input`."""
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        """The settings."""
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
