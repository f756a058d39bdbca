"""SoftmaxFocalLoss, the module around softmax_focal_loss."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln.nn._focal_loss import FocalLoss
from torchkiln.ops import softmax_focal_loss

__all__ = ["SoftmaxFocalLoss"]


class SoftmaxFocalLoss(FocalLoss):
    """Cross entropy of logits that weighs down rows that are classified well already.

    Args:
        alpha: factor of the loss.
        gamma: how strongly easy rows are weighed down.
        reduction: "none", "sum" or "mean".
        weight: (C,), kept as a buffer; factor of a row by its class.
    """

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of (N, C) logits and (N,) classes."""
        return softmax_focal_loss(
            inputs, targets, self.alpha, self.gamma, self.reduction, weight=self.weight
        )
