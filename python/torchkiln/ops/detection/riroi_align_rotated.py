"""Rotation-invariant RoIAlign of rotated regions: orientations of channels are turned as well."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops.detection._regions import bins_of
from torchkiln.ops.detection._sampled_roi import ORIENTED, fake_rois, gradient

__all__ = ["riroi_align_rotated"]


def _fake(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    num_orientations: int = 8,
    clockwise: bool = False,
    deterministic: bool = False,
) -> Tensor:
    return fake_rois(input, boxes, pooled_height, pooled_width)


def _settings(
    height: int,
    width: int,
    scale: float,
    ratio: int,
    orientations: int,
    clockwise: bool,
    deterministic: bool,
) -> tuple[Any, ...]:
    return scale, ratio, False, clockwise, orientations, deterministic


_setup_context, _backward = gradient(ORIENTED, _settings)
_riroi_align_rotated = operator(
    "riroi_align_rotated", fake=_fake, setup_context=_setup_context, backward=_backward
)


def riroi_align_rotated(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    num_orientations: int = 8,
    clockwise: bool = False,
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """Pools each rotated region, and turns the orientations of its channels by its angle.

    Args:
        input: (N, C * num_orientations, H, W), the orientation running fastest; float16, bfloat16,
            float32 or float64; contiguous or channels_last, other layouts are copied.
        boxes: (K, 6), any of these dtypes; batch index, centre x, centre y, width, height in image
            pixels, angle in radians.
        output_size: bins, (height, width) or one number for both; 1 to 4096.
        spatial_scale: input pixels per image pixel, above 0.
        sampling_ratio: samples per bin and axis, at most 1024; 0 or less: one per input pixel,
            rounded up.
        num_orientations: orientations of a channel, from 1.
        clockwise: the sense in which regions are turned, as in `roi_align_rotated`; orientations
            are turned by the angle as it is.
        deterministic: whether the gradient has the same bits every time on CUDA, where it is
            slower; None: as `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (K, C * num_orientations, height, width), dtype and layout of `input`. With the angle f
        orientations wide and k = floor(f), orientation o is (1 - (f - k)) times the pooled
        orientation o - k plus f - k times the one after it.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option, or channels that do not divide.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: input. Deterministic: yes, but for the gradient on CUDA, where `deterministic`
    decides. Autocast: as without.

    Note:
        Regions are at least a pixel wide and high, and pixel centres lie at whole numbers. Angles
        of any size are right, where mmcv's must be less than a turn.

    Source:
        Han et al., "ReDet: A Rotation-equivariant Detector for Aerial Object Detection", 2021.

    Example:
        >>> import math
        >>> import torch
        >>> from torchkiln.ops import riroi_align_rotated
        >>> input = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1).expand(1, 4, 5, 5)
        >>> boxes = torch.tensor([[0.0, 2.0, 2.0, 2.0, 2.0, 0.5 * math.pi]])
        >>> riroi_align_rotated(input, boxes, 1, 1.0, 2, num_orientations=4).flatten().round()
        tensor([4., 1., 2., 3.])
    """
    return _riroi_align_rotated(
        input,
        boxes,
        *bins_of("riroi_align_rotated", output_size),
        spatial_scale,
        sampling_ratio,
        num_orientations,
        clockwise,
        deterministic_default(deterministic),
    )
