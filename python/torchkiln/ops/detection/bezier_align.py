"""Pooling of regions between two Bezier curves, as text on a curve is."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops.detection._regions import bins_of
from torchkiln.ops.detection._sampled_roi import BEZIER, fake_rois, gradient

__all__ = ["bezier_align"]


def _fake(
    input: Tensor,
    beziers: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    deterministic: bool = False,
) -> Tensor:
    return fake_rois(input, beziers, pooled_height, pooled_width)


def _settings(
    height: int, width: int, scale: float, ratio: int, aligned: bool, deterministic: bool
) -> tuple[Any, ...]:
    return scale, ratio, aligned, False, 1, deterministic


_setup_context, _backward = gradient(BEZIER, _settings)
_bezier_align = operator(
    "bezier_align", fake=_fake, setup_context=_setup_context, backward=_backward
)


def bezier_align(
    input: Tensor,
    beziers: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """Pools each region between two cubic Bezier curves to a grid of bins.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            other layouts are copied.
        beziers: (K, 17), any of these dtypes; batch index, then x, y in image pixels of the 4
            points of the upper curve from the left, and of the 4 of the lower one from the right.
        output_size: bins, (height, width) or one number for both; 1 to 4096.
        spatial_scale: input pixels per image pixel, above 0.
        sampling_ratio: samples per bin and axis, at most 1024; 0 or less: one per input pixel,
            rounded up.
        aligned: moves positions by half a pixel, so that pixel centres lie at half numbers, and
            lets regions be smaller than a pixel.
        deterministic: whether the gradient has the same bits every time on CUDA, where it is
            slower; None: as `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (K, C, height, width), dtype and layout of `input`. Bin (i, j) is the average of samples in
        a box around the point i / height of the way from the upper to the lower curve, both at
        j / width; the box has the greater distance of the curves' ends over the number of bins.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: input. Deterministic: yes, but for the gradient on CUDA, where `deterministic`
    decides. Autocast: as without.

    Note:
        Positions are computed in float32, in float64 for a float64 input. A sample up to a pixel
        outside takes the border's value, further out 0. A region that is not finite has no
        samples and gives 0.

    Source:
        Liu et al., "ABCNet: Real-time Scene Text Spotting with Adaptive Bezier-Curve Network",
        2020, section 2.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import bezier_align
        >>> input = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> upper, lower = [[0.0, 0], [1, 0], [2, 0], [3, 0]], [[3.0, 3], [2, 3], [1, 3], [0, 3]]
        >>> beziers = torch.tensor([0.0, *sum(upper + lower, [])])[None]
        >>> bezier_align(input, beziers, (1, 3), sampling_ratio=1, aligned=False).round()
        tensor([[[[0., 1., 2.]]]])
    """
    return _bezier_align(
        input,
        beziers,
        *bins_of("bezier_align", output_size),
        spatial_scale,
        sampling_ratio,
        aligned,
        deterministic_default(deterministic),
    )
