"""`mmcv.ops.bezier_align`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors, pair

__all__ = ["BezierAlign", "BezierAlignFunction", "bezier_align"]


@listed_errors
def bezier_align(
    input: Tensor,
    beziers: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """`torchkiln.ops.bezier_align`."""
    size = pair(output_size)
    return ops.bezier_align(input, beziers, size, spatial_scale, sampling_ratio, aligned)


BezierAlignFunction = function_class("BezierAlignFunction", bezier_align)


class BezierAlign(nn.Module):
    """`bezier_align` as a module."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = pair(output_size)
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio)
        self.aligned = aligned

    def forward(self, input: Tensor, beziers: Tensor) -> Tensor:
        """Returns (K, C, height, width) for `beziers` (K, 17) of `input`."""
        settings = (self.output_size, self.spatial_scale, self.sampling_ratio)
        return bezier_align(input, beziers, *settings, self.aligned)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("output_size", "spatial_scale", "sampling_ratio", "aligned")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
