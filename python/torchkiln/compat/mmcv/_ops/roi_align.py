"""`mmcv.ops.roi_align`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, pair, renamed

__all__ = ["RoIAlign", "RoIAlignFunction", "roi_align"]


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor:
    """`torchkiln.ops.roi_align` with mmcv's defaults.

    Raises:
        AssertionError: for rois that are not (K, 5), or another pool_mode.
        RuntimeError: on the CPU with `aligned`, for a region of negative size, as mmcv.

    Note:
        With `pool_mode="max"` a region without samples gives the lowest float32, as mmcv on CUDA.
    """
    assert pool_mode in ("max", "avg"), f"pool_mode must be 'max' or 'avg'; got {pool_mode!r}"
    assert rois.size(1) == 5, "RoI must be (idx, x1, y1, x2, y2)!"
    if aligned and not rois.is_cuda and bool((rois[:, 3:] < rois[:, 1:3]).any()):
        raise RuntimeError("roi_align: each region in ROIAlign must have a non-negative size")
    size = pair(output_size)
    output = ops.roi_align(
        input, rois, size, spatial_scale, sampling_ratio, aligned, pool_mode=pool_mode
    )
    if pool_mode == "max" and aligned and sampling_ratio <= 0:
        output = output.masked_fill(_without_samples(rois, spatial_scale), _lowest(output.dtype))
    return output


def _without_samples(rois: Tensor, spatial_scale: float) -> Tensor:
    corners = rois[:, 1:].to(torch.promote_types(rois.dtype, torch.float32)) * spatial_scale - 0.5
    return (corners[:, 2:] <= corners[:, :2]).any(1)[:, None, None, None]


def _lowest(dtype: torch.dtype) -> float:
    limit = torch.finfo(torch.float32).min
    return -torch.inf if limit < torch.finfo(dtype).min else limit


RoIAlignFunction = function_class("RoIAlignFunction", roi_align)


class RoIAlign(nn.Module):
    """`roi_align` as a module; `use_torchvision` is kept, and gives torchvision's average."""

    @renamed(out_size="output_size", sample_num="sampling_ratio")
    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
        use_torchvision: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = pair(output_size)
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio)
        self.pool_mode = pool_mode
        self.aligned = aligned
        self.use_torchvision = use_torchvision

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Returns (K, C, height, width) for regions `rois` of `input`."""
        settings = (self.output_size, self.spatial_scale, self.sampling_ratio)
        if self.use_torchvision:
            return ops.roi_align(input, rois, *settings, self.aligned)
        return roi_align(input, rois, *settings, self.pool_mode, self.aligned)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("output_size", "spatial_scale", "sampling_ratio", "pool_mode", "aligned")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "use_torchvision"))
