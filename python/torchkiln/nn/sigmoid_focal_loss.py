"""SigmoidFocalLoss, the module around sigmoid_focal_loss."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln.ops import sigmoid_focal_loss

__all__ = ["SigmoidFocalLoss"]


class SigmoidFocalLoss(nn.Module):
    """Binary cross entropy of logits that weighs down what is classified well already.

    Args:
        alpha: factor of positive elements; negative ones get 1 - alpha. Below 0: both get 1.
        gamma: how strongly easy elements are weighed down.
        reduction: "none", "sum" or "mean".
        weight: (C,), kept as a buffer; factor of a row by its label.
    """

    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2,
        reduction: str = "none",
        *,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss; `torchkiln.ops.sigmoid_focal_loss` says which targets it takes."""
        return sigmoid_focal_loss(
            inputs, targets, self.alpha, self.gamma, self.reduction, weight=self.weight
        )

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"
