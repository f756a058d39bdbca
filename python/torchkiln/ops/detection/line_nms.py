"""Non-maximum suppression of lanes."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import require_count
from torchkiln.ops.detection._nms_fakes import fake_groups, fake_padded, fake_sized

__all__ = ["line_nms", "line_nms_groups", "line_nms_padded"]


def _fake_line_nms(
    boxes: Tensor, scores: Tensor, distance: float, labels: Tensor | None = None
) -> Tensor:
    return fake_sized(boxes, scores, distance)


def _fake_line_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    distance: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return fake_padded(boxes, scores, distance, max_output)


def _fake_line_nms_groups(
    boxes: Tensor, scores: Tensor, distance: float
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_groups(boxes, scores, distance)


_line_nms = operator("line_nms", fake=_fake_line_nms, autocast=torch.float32)
_line_nms_padded = operator("line_nms_padded", fake=_fake_line_nms_padded, autocast=torch.float32)
_line_nms_groups = operator("line_nms_groups", fake=_fake_line_nms_groups, autocast=torch.float32)


def line_nms_groups(
    boxes: Tensor, scores: Tensor, distance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept lane that each lane goes with, in tensors of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 5 + S), float16, bfloat16, float32 or float64; lanes as in `line_nms`.
        scores: (N,), dtype and device of `boxes`.
        distance: a lane goes when its mean distance from a kept one is less.

    Returns:
        rows: (N,), int64; all rows by descending score, the lower row first among equals.
        groups: (N,), int64; for each of `rows` the number, by descending score, of the best kept
            lane that is close to it; its own for a kept one.
        count: (), int64, on the device of `boxes`; how many lanes are kept.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, or a distance that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Lanes, scores and ties as in `line_nms`.

    Source:
        Tabelini et al., "Keep your Eyes on the Lane", 2021, section 3.5.

    Example:
        >>> import torch
        >>> from torchkiln.ops import line_nms_groups
        >>> lanes = torch.tensor([[0.0, 0, 0, 0, 2, 9, 9], [0, 0, 0, 0, 2, 8, 8]])
        >>> line_nms_groups(lanes, torch.tensor([0.7, 0.9]), 5.0)
        (tensor([1, 0]), tensor([0, 0]), tensor(1))
    """
    return _line_nms_groups(boxes, scores, distance)


@overload
def line_nms(
    boxes: Tensor,
    scores: Tensor,
    distance: float,
    top_k: int | None = None,
    *,
    labels: Tensor | None = None,
    return_parents: Literal[False] = False,
) -> Tensor: ...


@overload
def line_nms(
    boxes: Tensor,
    scores: Tensor,
    distance: float,
    top_k: int | None = None,
    *,
    labels: Tensor | None = None,
    return_parents: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def line_nms(
    boxes: Tensor,
    scores: Tensor,
    distance: float,
    top_k: int | None = None,
    *,
    labels: Tensor | None = None,
    return_parents: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Keeps the best lanes: each suppresses the lower ones that run close to it.

    Args:
        boxes: (N, 5 + S), float16, bfloat16, float32 or float64; lanes on S heights of an image.
            Columns 0, 1 and 3 are not looked at. Column 2: the height where the lane starts, from 0
            to 1. Column 4: on how many heights it runs. Then its x at each height.
        scores: (N,), dtype and device of `boxes`.
        distance: a lane goes when its mean distance from a kept one, over the heights that both
            run on, is less.
        top_k: the most lanes to keep, at least 0. None: all.
        labels: (N,), uint8 or signed integers; lanes of different labels do not meet. None: all do.
        return_parents: whether to tell the kept lane that each one goes with; without `labels`.

    Returns:
        (K,), int64; rows of the kept lanes by descending score, the lower row first among equals.
        With `return_parents` also (N,), int64; for each lane the place, in that list, of the best
        kept lane that is close to it (its own for a kept one), or -1 beyond `top_k`.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a distance that is NaN, a negative
            `top_k`, or parents with labels.
        CaptureError: while a CUDA graph is captured; `line_nms_padded` can be.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 (float64 for float64), with the rules of the operator in onedl-mmcv:
        starts are rounded to the nearest height, halves up, lengths are cut off. Two lanes that
        both start outside do not meet; a lane shorter than 1 meets no other, and so does one whose
        x is NaN where they meet. A NaN score sorts last, is kept and suppresses nothing. On CUDA
        the call waits for the size of its result.

    Source:
        Tabelini et al., "Keep your Eyes on the Lane", 2021, section 3.5.

    Example:
        >>> import torch
        >>> from torchkiln.ops import line_nms
        >>> head = torch.tensor([0.0, 0, 0, 0, 3])
        >>> lanes = torch.stack([torch.cat([head, torch.full((3,), x)]) for x in (9.0, 10, 50)])
        >>> line_nms(lanes, torch.tensor([0.7, 0.9, 0.8]), 5.0)
        tensor([1, 2])
    """
    require_count("line_nms", top_k=top_k)
    if not return_parents:
        return _line_nms(boxes, scores, distance, labels)[:top_k]
    if labels is not None:
        raise ValueError("line_nms: labels must be None with return_parents; got a tensor")
    rows, groups, _ = line_nms_groups(boxes, scores, distance)
    is_kept = torch.ones_like(groups, dtype=torch.bool)
    is_kept[1:] = groups[1:] > groups.cummax(0).values[:-1]
    parents = torch.empty_like(groups).index_copy_(0, rows, groups)
    if top_k is not None:
        parents = torch.where(parents < top_k, parents, -1)
    return rows[is_kept][:top_k], parents


def line_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    distance: float,
    max_output: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`line_nms` into a result of fixed size.

    Nothing waits for the GPU, and the call can be captured into a CUDA graph.

    Args:
        boxes: (N, 5 + S), float16, bfloat16, float32 or float64; lanes as in `line_nms`.
        scores: (N,), dtype and device of `boxes`.
        distance: a lane goes when its mean distance from a kept one is less.
        max_output: length of the result, 0 to 2^30; the best lanes fill it.
        labels: (N,), uint8 or signed integers; lanes of different labels do not meet. None: all do.

    Returns:
        indices: (max_output,), int64; rows of the kept lanes by descending score, then -1.
        count: (), int64, on the device of `boxes`; how many rows there are before the first -1.

    Raises:
        TypeError: for another dtype, or two different ones.
        ValueError: for another shape, two different devices, a negative `max_output`, or a distance
            that is NaN.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Lanes, scores and ties as in `line_nms`.

    Source:
        Tabelini et al., "Keep your Eyes on the Lane", 2021, section 3.5.

    Example:
        >>> import torch
        >>> from torchkiln.ops import line_nms_padded
        >>> lanes = torch.tensor([[0.0, 0, 0, 0, 2, 9, 9], [0, 0, 0, 0, 2, 8, 8]])
        >>> line_nms_padded(lanes, torch.tensor([0.7, 0.9]), 5.0, 2)
        (tensor([ 1, -1]), tensor(1))
    """
    return _line_nms_padded(boxes, scores, distance, max_output, labels)
