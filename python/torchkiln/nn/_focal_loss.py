"""What the modules around focal losses have in common."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn


class FocalLoss(nn.Module):
    """Keeps the arguments of a focal loss; a subclass calls it."""

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

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"
