"""RoIAlign over a feature pyramid: each region is pooled on the level that suits its size."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops.detection._regions import as_rows, bins_of, is_channels_last, like

__all__ = ["multi_scale_roi_align"]


def _fake(
    inputs: Sequence[Tensor],
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scales: Sequence[float],
    level_sides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return like(inputs[0], (boxes.shape[0], inputs[0].shape[1], pooled_height, pooled_width))


def _fake_backward(
    grad_output: Tensor,
    boxes: Tensor,
    n: int,
    c: int,
    sizes: Sequence[int],
    spatial_scales: Sequence[float],
    level_sides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> list[Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty(
            (n, c, h, w), dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
        )
        for h, w in zip(sizes[::2], sizes[1::2], strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, boxes, _, _, *ctx.options = inputs
    ctx.shape, ctx.channels_last = maps[0].shape[:2], is_channels_last(maps[0])
    ctx.sizes = [size for level in maps for size in level.shape[2:]]
    ctx.save_for_backward(boxes)


def _backward(ctx: Any, grad_output: Tensor) -> list[Tensor]:
    (boxes,) = ctx.saved_tensors
    return _multi_scale_roi_align_backward(
        grad_output, boxes, *ctx.shape, ctx.sizes, *ctx.options, ctx.channels_last
    )


_multi_scale_roi_align_backward = operator("_multi_scale_roi_align_backward", fake=_fake_backward)
_multi_scale_roi_align = operator(
    "multi_scale_roi_align", fake=_fake, setup_context=_setup_context, backward=_backward
)


def multi_scale_roi_align(
    inputs: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[float],
    level_sides: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pools each region with `roi_align`, on the level of a pyramid that its size belongs to.

    All levels are pooled at once, and so are their gradients; the levels of regions are found on
    the device, so the host waits for nothing and the call can be captured in a CUDA graph.

    Args:
        inputs: 1 to 8 levels, finest first: (N, C, H, W), float16, bfloat16, float32 or float64,
            contiguous or channels_last as the first one is; others are copied. N and C are the
            same on all levels.
        boxes: (K, 5), any of these dtypes; batch index, x1, y1, x2, y2 in image pixels. Or one
            (L, 4) tensor for each image.
        output_size: bins, (height, width) or one number for both; 1 to 4096.
        spatial_scales: of each level, its pixels per image pixel; above 0.
        level_sides: one number for each level but the first, ascending: a box whose area is at
            least that of a square of this side, in image pixels, belongs to this level or above.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
        aligned: moves positions by half a pixel; see `roi_align`.

    Returns:
        (K, C, height, width), dtype and layout of the first level.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, device, number or option.
        IndexError: for a batch index out of range, on the CPU. On CUDA such a region gives 0.

    Differentiable: inputs. Deterministic: yes, gradients too.
    Autocast: as without.

    Note:
        `torchkiln.nn.MultiScaleRoIAlign` and `torchkiln.nn.SingleRoIExtractor` have the sides that
        torchvision and mmdet use. A region that is not finite belongs to the first level, and
        gives 0 there. So do regions of a level without pixels.

    Source:
        Lin et al., "Feature Pyramid Networks for Object Detection", 2017, section 4.2.

    Example:
        >>> import torch
        >>> from torchkiln.ops import multi_scale_roi_align
        >>> inputs = [torch.ones(1, 1, 16, 16), 2 * torch.ones(1, 1, 8, 8)]
        >>> boxes = torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 0.0, 32.0, 32.0]])
        >>> multi_scale_roi_align(inputs, boxes, 1, [0.5, 0.25], [16.0]).flatten()
        tensor([1., 2.])
    """
    height, width = bins_of("multi_scale_roi_align", output_size)
    rows = as_rows("multi_scale_roi_align", boxes)
    return _multi_scale_roi_align(
        _listed("inputs", inputs),
        rows,
        height,
        width,
        _listed("spatial_scales", spatial_scales),
        _listed("level_sides", level_sides),
        sampling_ratio,
        aligned,
    )


def _listed(name: str, values: Iterable[Any]) -> list[Any]:
    if not isinstance(values, Iterable):
        raise TypeError(
            f"multi_scale_roi_align: {name} must be a list; got {type(values).__name__}"
        )
    return list(values)
