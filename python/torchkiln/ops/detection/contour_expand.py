"""Labelled regions that grow through masks of growing size."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator

__all__ = ["contour_expand"]


def _fake(masks: Tensor, labels: Tensor, min_area: int, num_labels: int) -> Tensor:
    return torch.empty(labels.shape, dtype=labels.dtype, device=labels.device)


_contour_expand = operator("contour_expand", fake=_fake)


def contour_expand(masks: Tensor, labels: Tensor, min_area: int, num_labels: int) -> Tensor:
    """Lets labelled kernels of text grow through masks, from the smallest to the largest.

    In each round all labelled pixels grow at the same time, by their four neighbours, into the
    pixels of that round's mask that have no label yet.

    Args:
        masks: (K, H, W), bool or uint8; not 0 where regions may grow. The rounds use the masks
            K - 2, K - 3, ..., 0; the last one is what `labels` were made of, and is not looked at.
        labels: (H, W) int32; 1 to `num_labels` in the kernels, else 0 or less.
        min_area: kernels with fewer pixels are dropped.
        num_labels: the largest label.

    Returns:
        (H, W) int32.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, a `num_labels` out of range, or two different devices.
        IndexError: for a label above `num_labels`, on the CPU; on CUDA it counts as 0.

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Note:
        Every pixel gets the label of the nearest pixel that was labelled at the beginning of its
        round, by steps through the mask; of several equally near the first one in row-major order.
        That is the order of a queue, whatever the device. mmcv looks at mask 0 in every round.
        Nothing synchronises with the device.

    Source:
        Wang et al., "Shape Robust Text Detection with Progressive Scale Expansion Network", 2019,
        algorithm 1.

    Example:
        >>> import torch
        >>> from torchkiln.ops import contour_expand
        >>> masks = torch.ones(2, 1, 6, dtype=torch.uint8)
        >>> labels = torch.tensor([[1, 0, 0, 0, 0, 2]], dtype=torch.int32)
        >>> contour_expand(masks, labels, 0, 2)
        tensor([[1, 1, 1, 2, 2, 2]], dtype=torch.int32)
    """
    return _contour_expand(masks, labels, min_area, num_labels)
