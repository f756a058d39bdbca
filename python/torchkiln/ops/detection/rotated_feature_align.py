"""Adds samples of the map at a rotated box of each pixel."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchkiln._frame import deterministic_default, operator
from torchkiln.ops.detection._regions import like
from torchkiln.ops.detection._sampled_roi import FEATURE, gradient

__all__ = ["rotated_feature_align"]


def _fake(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float = 0.125,
    points: int = 1,
    deterministic: bool = False,
) -> Tensor:
    return like(input, input.shape)


def _settings(scale: float, points: int, deterministic: bool) -> tuple[Any, ...]:
    return scale, points, False, False, 1, deterministic


_setup_context, _backward = gradient(FEATURE, _settings)
_rotated_feature_align = operator(
    "rotated_feature_align", fake=_fake, setup_context=_setup_context, backward=_backward
)


def rotated_feature_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float = 1 / 8,
    points: int = 1,
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """Adds to each pixel samples of the map at the centre, and at the corners, of its box.

    Args:
        input: (N, C, H, W), float16, bfloat16, float32 or float64; contiguous or channels_last,
            other layouts are copied.
        boxes: (N, H, W, 5), any of these dtypes; centre y, centre x, width, height in image pixels,
            angle in radians from x towards y. In this order: y comes first, as in mmcv.
        spatial_scale: input pixels per image pixel, above 0.
        points: 1 for the centre, 5 for the four corners too.
        deterministic: whether the gradient has the same bits every time on CUDA, where it is
            slower; None: as `torch.are_deterministic_algorithms_enabled` says.

    Returns:
        (N, C, H, W), dtype and layout of `input`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device or option.

    Differentiable: input. Deterministic: yes, but for the gradient on CUDA, where `deterministic`
    decides. Autocast: as without.

    Note:
        A sample up to a pixel outside takes the border's value; further out, or at a place that is
        not a number, it is 0. Positions are computed in float32, in float64 for a float64 input.

    Source:
        Yang et al., "R3Det: Refined Single-Stage Detector with Feature Refinement for Rotating
        Object", 2021, section 3.3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import rotated_feature_align
        >>> input = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> boxes = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.0]).expand(1, 2, 2, 5)
        >>> rotated_feature_align(input, boxes, spatial_scale=1.0)
        tensor([[[[2., 3.],
                  [4., 5.]]]])
    """
    return _rotated_feature_align(
        input, boxes, spatial_scale, points, deterministic_default(deterministic)
    )
