"""`mmcv.ops.conv2d_gradfix`: torch's own convolutions have gradients of any order."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["conv2d", "conv_transpose2d"]

_Size = int | tuple[int, int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    dilation: _Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`."""
    return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`."""
    return functional.conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )
