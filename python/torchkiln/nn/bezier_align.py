"""BezierAlign, the module around bezier_align."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln.ops.detection.bezier_align import bezier_align

__all__ = ["BezierAlign"]


class BezierAlign(nn.Module):
    """Pools regions between two Bezier curves; see `torchkiln.ops.bezier_align`.

    Args:
        output_size: bins, (height, width) or one number for both.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
        aligned: moves positions by half a pixel.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, beziers: Tensor) -> Tensor:
        """Returns (K, C, height, width) for `beziers` (K, 17) of `input`."""
        return bezier_align(
            input,
            beziers,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
