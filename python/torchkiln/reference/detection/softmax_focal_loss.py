"""softmax_focal_loss in plain PyTorch, from Lin et al. 2017, equation 5: a row of odds each."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity

__all__ = ["softmax_focal_loss"]


def _row(x: Tensor, target: int, alpha: float, gamma: float) -> Tensor:
    """-alpha (1 - p)^gamma log p, where p = 1 / (1 + odds) and odds = sum of exp(x_c - x_t)."""
    others = torch.cat([x[:target], x[target + 1 :]])
    # The logarithm of the odds; of a single class they are 0, unless its logit is no number or
    # excludes it, too: NaN.
    odds = torch.logsumexp(others - x[target], 0) + (0 if len(others) else x[target] - x[target])
    return alpha * odds.sigmoid() ** gamma * torch.logaddexp(odds, torch.zeros_like(odds))


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Focal loss of the softmax of logits.

    Args:
        inputs: (N, C).
        targets: (N,) classes; a row of another one costs nothing.
        alpha: factor.
        gamma: exponent of 1 - p.
        reduction: "none", "sum" or "mean".
        weight: (C,) factor of a row by its class.

    Returns:
        (N,) or ().
    """
    losses = [inputs[:0].sum()[None][:0]]
    for x, target in zip(inputs, targets.tolist(), strict=True):
        loss = x[:0].sum()
        if 0 <= target < inputs.shape[1]:
            loss = _row(x, target, alpha, gamma)
            loss = loss if weight is None else loss * weight[target]
        losses.append(loss[None])
    loss = torch.cat(losses)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def parity() -> Parity:
    """What softmax_focal_loss is tried on."""
    return Parity(
        op="softmax_focal_loss",
        tier="A",
        differentiable=("inputs",),
        function="softmax_focal_loss",
        reference=softmax_focal_loss,
        fuzz=_fuzz,
        cases=(
            Case("typical", functools.partial(_problem, 37, 8)),
            Case("sum", functools.partial(_problem, 37, 8, reduction="sum")),
            Case("mean", functools.partial(_problem, 65, 5, reduction="mean")),
            Case("as_many_rows_as_classes", functools.partial(_problem, 8, 8)),
            Case("weighted", functools.partial(_weighted, 33, 6)),
            Case("any_gamma", functools.partial(_problem, 37, 8, gamma=0.5)),
            Case("gamma_0", functools.partial(_problem, 9, 4, gamma=0.0, alpha=1.0)),
            Case("out_of_range", _out_of_range),
            Case("single", functools.partial(_problem, 1, 1), gradient=False),
            Case("no_rows", functools.partial(_problem, 0, 4)),
            Case("no_rows_sum", functools.partial(_problem, 0, 4, reduction="sum")),
            Case("no_classes", _no_classes),
            # From 17 on 1 - p is 0 in float32, and beyond 89 exp overflows.
            Case("saturated", lambda new: _saturated(25.0)),
            Case("far_out", lambda new: _saturated(500.0)),
            Case("excluded", lambda new: _saturated(math.inf), gradient=False),
        ),
    )


def _problem(rows: int, classes: int, new: Inputs, **settings: object) -> dict[str, object]:
    targets = new.integers(rows, high=classes)
    return {"inputs": 3 * new.normal(rows, classes), "targets": targets, **settings}


def _weighted(rows: int, classes: int, new: Inputs) -> dict[str, object]:
    return {**_problem(rows, classes, new), "weight": new.uniform(classes, high=2)}


def _out_of_range(new: Inputs) -> dict[str, object]:
    targets = torch.tensor([-1, 4, 5, 2**40, 0])
    return {"inputs": new.normal(5, 4), "targets": targets, "weight": new.uniform(4)}


def _no_classes(new: Inputs) -> dict[str, object]:
    return {"inputs": new.normal(3, 0), "targets": torch.tensor([0, -1, 7])}


def _saturated(size: float) -> dict[str, object]:
    """Right, wrong, and far from a third class."""
    inputs = torch.tensor([[0, -size, -size], [-1, 0, -size], [0, -size, 1]], dtype=torch.float64)
    return {"inputs": inputs, "targets": torch.tensor([0, 0, 2])}


def _fuzz(draw: Draw) -> dict[str, object]:
    rows, classes = draw.size(), draw.size()
    weight = {"weight": draw.uniform(classes, high=2)} if draw.option("weight", False, True) else {}
    return {
        # Infinity is no logit, nor what a half type rounds to it; its negative excludes a class.
        "inputs": (draw.values(rows, classes) * draw.pick(1, 3, 30)).clamp(max=1e4),
        "targets": draw.labels(rows, classes),
        "alpha": draw.pick(0.25, 1.0, 0.0),
        "gamma": draw.option("gamma", 2.0, 0.0, 1.5),
        "reduction": draw.option("reduction", "none", "mean", "sum"),
        **weight,
    }
