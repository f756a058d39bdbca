"""`mmcv.ops.roi_align`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors, pair, renamed

__all__ = ["RoIAlign", "RoIAlignFunction", "roi_align"]


@listed_errors
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
        With `pool_mode="max"` a region without samples gives the lowest float32, as mmcv on CUDA,
        and a greatest sample at y = -1 exactly has no gradient, as mmcv on both.
    """
    assert pool_mode in ("max", "avg"), f"pool_mode must be 'max' or 'avg'; got {pool_mode!r}"
    assert rois.size(1) == 5, "RoI must be (idx, x1, y1, x2, y2)!"
    if aligned and not rois.is_cuda:
        # Raises a RuntimeError, in a compiled graph too.
        torch._assert_async(
            ~(rois[:, 3:] < rois[:, 1:3]).any(),
            "roi_align: each region in ROIAlign must have a non-negative size",
        )
    size = pair(output_size)
    options = (spatial_scale, sampling_ratio, aligned)
    if pool_mode == "avg":
        return ops.roi_align(input, rois, size, *options)
    if input.requires_grad and torch.is_grad_enabled():
        output: Tensor = _Maximum.apply(input, rois, size, *options)  # type: ignore[no-untyped-call]
    else:
        output = ops.roi_align(input, rois, size, *options, pool_mode="max")
    if aligned and sampling_ratio <= 0:
        output = output.masked_fill(_without_samples(rois, spatial_scale), _lowest(output.dtype))
    return output


class _Maximum(Function):
    """mmcv notes the y of the greatest sample, and -1 where there is none."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rois: Tensor, size: tuple[int, int], *options: Any
    ) -> Tensor:
        ctx.save_for_backward(input, rois)
        ctx.size, ctx.options = size, options
        return ops.roi_align(input, rois, size, *options, pool_mode="max")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, rois = ctx.saved_tensors
        wide = input.to(grad.dtype)  # another one under autocast
        native, channels_last = torch.ops.torchkiln, torch.channels_last
        winner = native._roi_align_max(wide, rois, *ctx.size, *ctx.options)[1]
        y = _winners_y(winner, rois, ctx.size, *ctx.options)
        winner = winner.masked_fill(y == -1, -1)
        is_last = not wide.is_contiguous() and wide.is_contiguous(memory_format=channels_last)
        grad_input = native._roi_align_backward(
            grad, rois, winner, *wide.shape, *ctx.options, is_last
        )
        return (grad_input.to(input.dtype), *[None] * 5)


def _winners_y(
    winner: Tensor,
    rois: Tensor,
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Where the samples of these numbers (K, C, height, width) lie; bins go row by row."""
    corners = rois[:, 1:].to(torch.promote_types(rois.dtype, torch.float32)) * spatial_scale
    corners = corners - 0.5 if aligned else corners
    sides = corners[:, 2:] - corners[:, :2]
    sides = sides if aligned else sides.clamp(min=1)
    bins = sides / sides.new_tensor([size[1], size[0]])
    counts = bins.ceil().nan_to_num(1).clamp(1, 32768)
    if sampling_ratio > 0:
        counts = torch.full_like(bins, sampling_ratio)
    (_, start), (_, bin), (across, down) = (
        pairs[:, :, None, None, None].unbind(1) for pairs in (corners[:, :2], bins, counts)
    )
    row = torch.arange(size[0], device=rois.device)[:, None]
    number = torch.div(winner, across, rounding_mode="floor")
    return start + row * bin + (number + 0.5) * bin / down


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
