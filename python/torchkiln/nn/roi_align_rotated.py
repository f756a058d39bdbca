"""RoIAlignRotated, the module around roi_align_rotated."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln.ops.detection.roi_align_rotated import roi_align_rotated

__all__ = ["RoIAlignRotated"]


class RoIAlignRotated(nn.Module):
    """Pools each rotated region to a grid of bins; see `torchkiln.ops.roi_align_rotated`.

    Args:
        output_size: bins, (height, width) or one number for both.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
        aligned: moves positions by half a pixel.
        clockwise: sense of the angles.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        aligned: bool = True,
        clockwise: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.clockwise = clockwise

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C, height, width) for regions `rois` (K, 6) of `input`."""
        return roi_align_rotated(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            self.clockwise,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, "
            f"clockwise={self.clockwise}"
        )
