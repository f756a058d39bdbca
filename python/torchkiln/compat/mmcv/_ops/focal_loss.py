"""`mmcv.ops.focal_loss`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors

__all__ = [
    "SigmoidFocalLoss",
    "SigmoidFocalLossFunction",
    "SoftmaxFocalLoss",
    "SoftmaxFocalLossFunction",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]


def _check(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> None:
    assert target.dtype == torch.int64, f"target must be int64; got {target.dtype}"
    assert input.dim() == 2, f"input must be (N, C); got {tuple(input.shape)}"
    assert target.dim() == 1, f"target must be (N,); got {tuple(target.shape)}"
    assert input.size(0) == target.size(0), "input and target must have equally many rows"
    assert reduction in ("none", "mean", "sum"), f"reduction must not be {reduction!r}"
    if weight is not None:
        assert weight.dim() == 1, f"weight must be (C,); got {tuple(weight.shape)}"
        assert weight.size(0) == input.size(1), "weight must have one number for each class"


@listed_errors
def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torchkiln.ops.sigmoid_focal_loss` for labels, in mmcv's order of arguments.

    Raises:
        AssertionError: for labels that are not (N,) int64, logits that are not (N, C), a weight
            that is not (C,), or another reduction.
    """
    _check(input, target, weight, reduction)
    return ops.sigmoid_focal_loss(input, target, alpha, gamma, reduction, weight=weight)


SigmoidFocalLossFunction = function_class("SigmoidFocalLossFunction", sigmoid_focal_loss)


@listed_errors
def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torchkiln.ops.softmax_focal_loss` in mmcv's order of arguments.

    Raises:
        AssertionError: as `sigmoid_focal_loss`.
    """
    _check(input, target, weight, reduction)
    return ops.softmax_focal_loss(input, target, alpha, gamma, reduction, weight=weight)


SoftmaxFocalLossFunction = function_class("SoftmaxFocalLossFunction", softmax_focal_loss)


class _FocalLoss(nn.Module):
    """What both modules keep."""

    weight: Tensor | None

    def __init__(
        self,
        gamma: float,
        alpha: float,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def extra_repr(self) -> str:
        """The settings."""
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction!r}"


class SigmoidFocalLoss(_FocalLoss):
    """`sigmoid_focal_loss` as a module."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits (N, C) for labels (N,)."""
        return sigmoid_focal_loss(
            input, target, self.gamma, self.alpha, self.weight, self.reduction
        )


class SoftmaxFocalLoss(_FocalLoss):
    """`softmax_focal_loss` as a module."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits (N, C) for classes (N,)."""
        return softmax_focal_loss(
            input, target, self.gamma, self.alpha, self.weight, self.reduction
        )
