"""Pixels that join the kernel whose embedding is like theirs."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._frame import operator

__all__ = ["pixel_group"]


def _fake(
    scores: Tensor,
    mask: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    contour: Tensor,
    num_labels: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = torch.empty(labels.shape, dtype=labels.dtype, device=labels.device)
    return (
        groups,
        scores.new_empty((num_labels + 1,)),
        labels.new_empty((num_labels + 1,), dtype=torch.int64),
    )


# float32: scores and embeddings may come in two dtypes.
_pixel_group = operator("pixel_group", fake=_fake, autocast=torch.float32)


def pixel_group(
    scores: Tensor,
    mask: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    contour: Tensor,
    num_labels: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lets kernels of text grow over the pixels whose embedding is near to the kernel's mean.

    All kernels grow at the same time from their contours, by their four neighbours, into pixels of
    the mask that have no label yet and that are near enough.

    Args:
        scores: (H, W), float16, bfloat16, float32 or float64.
        mask: (H, W), bool or uint8; not 0 where kernels may grow.
        embeddings: (H, W, C), dtype of `scores`.
        labels: (H, W) int32; 1 to `num_labels` in the kernels, else 0 or less.
        contour: (H, W), bool or uint8; the pixels of kernels that growing begins at.
        num_labels: the largest label.
        threshold: distance of embeddings from which on a pixel does not join.

    Returns:
        The grown labels, (H, W) int32; the mean score of each label, (num_labels + 1,), dtype of
        `scores`; its number of pixels, (num_labels + 1,) int64. Both are 0 for background and for
        labels without pixels.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, a `num_labels` out of range, a threshold that is NaN, or two
            different devices.
        IndexError: for a label above `num_labels`, on the CPU; on CUDA it counts as 0.

    Differentiable: no. Deterministic: yes. Autocast: float32.

    Note:
        Every pixel gets the label of the source with the shortest way to it; of several the first
        one in row-major order. That is the order of a queue, whatever the device. Means are sums in
        float64, distances in float32 (float64 for float64). Nothing synchronises with the device.

    Source:
        Wang et al., "Efficient and Accurate Arbitrary-Shaped Text Detection with Pixel Aggregation
        Network", 2019, section 3.3.

    Example:
        >>> import torch
        >>> from torchkiln.ops import pixel_group
        >>> labels = torch.tensor([[1, 0, 0, 0]], dtype=torch.int32)
        >>> embeddings = torch.tensor([0.0, 0.5, 3.0, 0.0]).reshape(1, 4, 1)
        >>> ones = torch.ones(1, 4)
        >>> groups, scores, counts = pixel_group(
        ...     ones, ones.bool(), embeddings, labels, labels.bool(), 1, 1.0
        ... )
        >>> groups, counts
        (tensor([[1, 1, 0, 0]], dtype=torch.int32), tensor([0, 2]))
    """
    return _pixel_group(scores, mask, embeddings, labels, contour, num_labels, threshold)
