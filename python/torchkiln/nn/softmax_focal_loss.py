"""SoftmaxFocalLoss, the module around softmax_focal_loss."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn

from torchkiln.ops import softmax_focal_loss

__all__ = ["SoftmaxFocalLoss"]


class SoftmaxFocalLoss(nn.Module):
    """Cross entropy of logits that weighs down rows that are classified well already.

    Args:
        alpha: factor of the loss.
        gamma: how strongly easy rows are weighed down.
        reduction: "none", "sum" or "mean".
        weight: (C,), kept as a buffer; factor of a row by its class.
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
        """Returns the loss of (N, C) logits and (N,) classes."""
        return softmax_focal_loss(
            inputs, targets, self.alpha, self.gamma, self.reduction, weight=self.weight
        )

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"
