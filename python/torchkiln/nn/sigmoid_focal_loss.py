"""SigmoidFocalLoss, the module around sigmoid_focal_loss."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from torchkiln.nn._focal_loss import FocalLoss
from torchkiln.ops import sigmoid_focal_loss

__all__ = ["SigmoidFocalLoss"]


class SigmoidFocalLoss(FocalLoss):
    """Binary cross entropy of logits that weighs down what is classified well already.

    Args:
        alpha: factor of positive elements; negative ones get 1 - alpha. Below 0: both get 1.
        gamma: how strongly easy elements are weighed down.
        reduction: "none", "sum" or "mean".
        weight: (C,), kept as a buffer; factor of a row by its label.
    """

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss; `torchkiln.ops.sigmoid_focal_loss` says which targets it takes."""
        return sigmoid_focal_loss(
            inputs, targets, self.alpha, self.gamma, self.reduction, weight=self.weight
        )
