"""RiRoIAlignRotated, the module around riroi_align_rotated."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln.ops.detection.riroi_align_rotated import riroi_align_rotated

__all__ = ["RiRoIAlignRotated"]


class RiRoIAlignRotated(nn.Module):
    """Pools rotated regions and turns their channels; see `torchkiln.ops.riroi_align_rotated`.

    Args:
        output_size: bins, (height, width) or one number for both.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
        num_orientations: orientations of a channel.
        clockwise: sense in which regions are turned.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        num_orientations: int = 8,
        clockwise: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.num_orientations = num_orientations
        self.clockwise = clockwise

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C, height, width) for regions `rois` (K, 6) of `input`."""
        return riroi_align_rotated(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.num_orientations,
            self.clockwise,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, num_orientations={self.num_orientations}, "
            f"clockwise={self.clockwise}"
        )
