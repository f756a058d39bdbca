"""`mmcv.ops.roi_align_rotated`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors, pair, renamed

__all__ = ["RoIAlignRotated", "RoIAlignRotatedFunction", "roi_align_rotated"]


@listed_errors
def roi_align_rotated(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
) -> Tensor:
    """`torchkiln.ops.roi_align_rotated`.

    Raises:
        RuntimeError: on the CPU with `aligned`, for a region of negative size, as mmcv.
    """
    if aligned and not rois.is_cuda and rois.dim() == 2:
        # Raises a RuntimeError, in a compiled graph too.
        torch._assert_async(
            ~(rois[:, 3:5] < 0).any(),
            "roi_align_rotated: each region in ROIAlignRotated must have a non-negative size",
        )
    return ops.roi_align_rotated(
        input, rois, pair(output_size), spatial_scale, sampling_ratio, aligned, clockwise
    )


RoIAlignRotatedFunction = function_class("RoIAlignRotatedFunction", roi_align_rotated)


class RoIAlignRotated(nn.Module):
    """`roi_align_rotated` as a module."""

    @renamed(out_size="output_size", sample_num="sampling_ratio")
    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        aligned: bool = True,
        clockwise: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = pair(output_size)
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio)
        self.aligned = aligned
        self.clockwise = clockwise

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C, height, width) for regions `rois` (K, 6) of `input`."""
        settings = (self.output_size, self.spatial_scale, self.sampling_ratio)
        return roi_align_rotated(input, rois, *settings, self.aligned, self.clockwise)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("output_size", "spatial_scale", "sampling_ratio", "aligned", "clockwise")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
