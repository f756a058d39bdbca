"""`mmcv.ops.riroi_align_rotated`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors

__all__ = ["RiRoIAlignRotated", "RiRoIAlignRotatedFunction", "riroi_align_rotated"]


@listed_errors
def riroi_align_rotated(
    features: Tensor,
    rois: Tensor,
    out_size: int | tuple[int, int],
    spatial_scale: float,
    num_samples: int = 0,
    num_orientations: int = 8,
    clockwise: bool = False,
) -> Tensor:
    """`torchkiln.ops.riroi_align_rotated`, on the CPU too.

    Raises:
        TypeError: for an out_size that is neither a number nor a pair of numbers.
    """
    if isinstance(out_size, int):
        out_size = (out_size, out_size)
    if not (
        isinstance(out_size, tuple)
        and len(out_size) == 2
        and all(isinstance(side, int) for side in out_size)
    ):
        raise TypeError(
            "riroi_align_rotated: out_size must be an integer or a tuple of two integers; "
            f"got {out_size!r}"
        )
    return ops.riroi_align_rotated(
        features, rois, out_size, spatial_scale, num_samples, num_orientations, clockwise
    )


RiRoIAlignRotatedFunction = function_class("RiRoIAlignRotatedFunction", riroi_align_rotated)


class RiRoIAlignRotated(nn.Module):
    """`riroi_align_rotated` as a module."""

    def __init__(
        self,
        out_size: int | tuple[int, int],
        spatial_scale: float,
        num_samples: int = 0,
        num_orientations: int = 8,
        clockwise: bool = False,
    ) -> None:
        super().__init__()
        self.out_size = out_size
        self.spatial_scale = float(spatial_scale)
        self.num_samples = int(num_samples)
        self.num_orientations = int(num_orientations)
        self.clockwise = clockwise

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C * num_orientations, height, width) for regions `rois` (K, 6)."""
        settings = (self.out_size, self.spatial_scale, self.num_samples)
        return riroi_align_rotated(features, rois, *settings, self.num_orientations, self.clockwise)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("out_size", "spatial_scale", "num_samples", "num_orientations", "clockwise")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
