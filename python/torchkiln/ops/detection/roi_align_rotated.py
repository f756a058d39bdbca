"""RoIAlign of rotated regions."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops.detection._regions import bins_of
from torchkiln.ops.detection._sampled_roi import ROTATED, fake_rois, gradient

__all__ = ["roi_align_rotated"]


def _fake(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
    deterministic: bool = False,
) -> Tensor:
    return fake_rois(input, boxes, pooled_height, pooled_width)


def _settings(
    height: int,
    width: int,
    scale: float,
    ratio: int,
    aligned: bool,
    clockwise: bool,
    deterministic: bool,
) -> tuple[Any, ...]:
    return scale, ratio, aligned, clockwise, 1, deterministic


_setup_context, _backward = gradient(ROTATED, _settings)
_roi_align_rotated = operator(
    "roi_align_rotated", fake=_fake, setup_context=_setup_context, backward=_backward
)


def roi_align_rotated(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """Pools each rotated region to a grid of bins, each the average of bilinear samples.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            other layouts are copied.
        boxes: (K, 6), any of these dtypes; batch index, centre x, centre y, width, height in image
            pixels, angle in radians.
        output_size: bins, (height, width) or one number for both; 1 to 4096.
        spatial_scale: input pixels per image pixel, above 0.
        sampling_ratio: samples per bin and axis, at most 1024; 0 or less: one per input pixel,
            rounded up.
        aligned: moves positions by half a pixel, so that pixel centres lie at half numbers, and
            lets regions be smaller than a pixel.
        clockwise: whether positive angles turn clockwise as one sees the image, y pointing down;
            else counter-clockwise.
        deterministic: whether the gradient has the same bits every time on CUDA, where it is
            slower; None: as `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (K, C, height, width), dtype and layout of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: input. Deterministic: yes, but for the gradient on CUDA, where `deterministic`
    decides. Autocast: as without.

    Note:
        Positions are computed in float32, in float64 for a float64 input. A sample up to a pixel
        outside takes the border's value, further out 0. A region that is not finite, or with
        aligned one of negative width or height, has no samples and gives 0.

    Source:
        Ma et al., "Arbitrary-Oriented Scene Text Detection via Rotation Proposals", 2018.

    Example:
        >>> import torch
        >>> from torchkiln.ops import roi_align_rotated
        >>> input = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> boxes = torch.tensor([[0.0, 2.0, 2.0, 4.0, 4.0, 0.0]])
        >>> roi_align_rotated(input, boxes, 2, sampling_ratio=2)
        tensor([[[[ 2.5000,  4.5000],
                  [10.5000, 12.5000]]]])
    """
    return _roi_align_rotated(
        input,
        boxes,
        *bins_of("roi_align_rotated", output_size),
        spatial_scale,
        sampling_ratio,
        aligned,
        clockwise,
        deterministic_default(deterministic),
    )
