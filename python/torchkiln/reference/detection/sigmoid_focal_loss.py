"""sigmoid_focal_loss in plain PyTorch, from Lin et al. 2017, equation 5."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["sigmoid_focal_loss"]


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """(N, C): 1 at the label; a row of zeros for every label outside [0, C)."""
    classes = torch.arange(like.shape[1], device=like.device)
    return (labels[:, None] == classes).to(like.dtype)


def _elements(x: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t), where a cross entropy lets t be soft."""
    p, q = x.sigmoid(), (-x).sigmoid()
    # Where t takes no part of a logarithm, an infinite one must not give NaN.
    of_p = torch.where(t == 0, 0.0, t * logsigmoid(x))
    of_q = torch.where(t == 1, 0.0, (1 - t) * logsigmoid(-x))
    modulation = (p * (1 - t) + q * t) ** gamma
    alpha_t = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0
    return -alpha_t * modulation * (of_p + of_q)


def _loss(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    reduction: int,
) -> Tensor:
    by_label = not targets.is_floating_point()
    t = _one_hot(targets, inputs) if by_label else targets
    loss = _elements(inputs, t, alpha, gamma)
    if weight is not None:
        # Background stands at the end of the table, with weight 1.
        table = torch.cat([weight, weight.new_ones(1)])
        count = weight.shape[0]
        is_class = (targets >= 0) & (targets < count)
        loss = loss * table[torch.where(is_class, targets, count)][:, None]
    if reduction == 0:
        return loss
    if reduction == 2:
        return loss.sum()
    count = inputs.shape[0] if by_label else inputs.numel()
    return loss.sum() / count if count else loss.sum() * math.nan


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: int = 0,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Focal loss on logits.

    Args:
        inputs: (N, C), or any shape when targets are floating.
        targets: (N,) labels, or the shape of inputs, from 0 to 1.
        weight: (C,) of a row by its label.
        alpha: factor of positive elements; below 0: 1 for all.
        gamma: exponent of 1 - p_t.
        reduction: 0 none, 1 mean, 2 sum.
        with_gradient: whether a reduced loss comes with its gradient.

    Returns:
        The loss; its gradient with respect to the inputs, or an empty tensor.
    """
    loss = _loss(inputs, targets, weight, alpha, gamma, reduction)
    if not (reduction and with_gradient):
        return loss, inputs.new_empty(0)
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        fixed = None if weight is None else weight.detach()
        value = _loss(leaf, targets.detach(), fixed, alpha, gamma, reduction)
        (gradient,) = torch.autograd.grad(value, leaf)
    return loss, gradient


def parity() -> Parity:
    """What sigmoid_focal_loss is tried on."""
    return Parity(
        op="sigmoid_focal_loss",
        tier="A",
        differentiable=("inputs",),
        fuzz=_fuzz,
        cases=(
            Case("typical", lambda new: _labels(new, 37, 8, reduction="sum")),
            Case("labels_none", lambda new: _labels(new, 37, 8)),
            Case("labels_mean", lambda new: _labels(new, 65, 5, reduction="mean")),
            Case("weighted", lambda new: _weighted(new, 33, 16, reduction="sum")),
            Case("weighted_none", lambda new: _weighted(new, 33, 3)),
            Case("any_gamma", lambda new: _labels(new, 37, 8, gamma=1.5, reduction="sum")),
            Case("gamma_0", lambda new: _labels(new, 9, 4, gamma=0.0)),
            Case("no_alpha", lambda new: _labels(new, 9, 4, alpha=-1.0, reduction="mean")),
            Case("out_of_range", _out_of_range),
            Case("soft_none", lambda new: _soft(new, 6, 5, 7)),
            Case("soft_mean", lambda new: _soft(new, 64, 16, reduction="mean")),
            Case("soft_sum", lambda new: _soft(new, 6, 5, 7, gamma=3.0, reduction="sum")),
            Case("soft_scalar", lambda new: _soft(new)),
            Case("hard", lambda new: _hard(new, 12, 8)),
            # More than a block and a piece of the CPU's sum.
            Case("many_rows", lambda new: _labels(new, 513, 80, reduction="mean")),
            Case("single", lambda new: _labels(new, 1, 1, reduction="mean")),
            Case("no_rows", lambda new: _labels(new, 0, 4)),
            Case("no_rows_sum", lambda new: _labels(new, 0, 4, reduction="sum")),
            Case("no_classes", lambda new: _labels(new, 3, 0, reduction="sum")),
            # Beyond 17, 1 - sigmoid is 0 in float32; beyond 89, exp overflows.
            Case("saturated", lambda new: _saturated(25.0)),
            Case("far_out", lambda new: _saturated(1000.0)),
            Case("not_finite", lambda new: _saturated(math.inf), gradient=False),
        ),
        workloads=(
            # RetinaNet's logits of one image; torchvision's form of the targets; both as losses of
            # each element.
            Workload("labels", _RETINANET, lambda sizes: _logits(sizes, "sum", soft=False)),
            Workload("soft", _RETINANET, lambda sizes: _logits(sizes, "sum", soft=True)),
            Workload("labels_none", _RETINANET, lambda sizes: _logits(sizes, "none", soft=False)),
            Workload("soft_none", _RETINANET, lambda sizes: _logits(sizes, "none", soft=True)),
        ),
    )


_RETINANET = {"rows": 200_000, "classes": 80, "gamma": 2}


def _logits(sizes: Sizes, reduction: str, soft: bool) -> dict[str, object]:
    shape = sizes["rows"], sizes["classes"]
    return {
        "inputs": scenes.detector_logits(*shape),
        "targets": scenes.detector_targets(*shape, soft),
        "gamma": sizes["gamma"],
        "reduction": reduction,
    }


def _labels(new: Inputs, rows: int, classes: int, **settings: object) -> dict[str, object]:
    targets = new.integers(rows, high=classes + 1)
    return {"inputs": 3 * new.normal(rows, classes), "targets": targets, **settings}


def _weighted(new: Inputs, rows: int, classes: int, **settings: object) -> dict[str, object]:
    return {"weight": new.uniform(classes, high=2), **_labels(new, rows, classes, **settings)}


def _out_of_range(new: Inputs) -> dict[str, object]:
    """Negative everywhere, with weight 1."""
    targets = torch.tensor([-1, 4, 5, 2**40, 0])
    return {"inputs": new.normal(5, 4), "targets": targets, "weight": new.uniform(4)}


def _soft(new: Inputs, *shape: int, **settings: object) -> dict[str, object]:
    return {"inputs": 3 * new.normal(*shape), "targets": new.uniform(*shape), **settings}


def _hard(new: Inputs, *shape: int) -> dict[str, object]:
    return {"inputs": 3 * new.normal(*shape), "targets": new.uniform(*shape).round()}


def _saturated(size: float) -> dict[str, object]:
    inputs = torch.tensor([[size, -size], [-size, size], [size, size]], dtype=torch.float64)
    return {"inputs": inputs, "targets": torch.tensor([0, 0, 2])}


def _fuzz(draw: Draw) -> dict[str, object]:
    rows, classes = draw.size(40), draw.size(20)
    arguments: dict[str, object] = {"inputs": draw.values(rows, classes) * draw.pick(1, 3, 30)}
    if draw.option("targets", "labels", "soft") == "soft":
        targets = draw.uniform(rows, classes)
        arguments["targets"] = targets.round() if draw.chance(0.5) else targets
    else:
        arguments["targets"] = draw.labels(rows, classes)
        if draw.option("weight", False, True):
            arguments["weight"] = draw.uniform(classes, high=2)
    return {
        **arguments,
        "alpha": draw.pick(0.25, 1.0, 0.0, -1.0),
        "gamma": draw.option("gamma", 2.0, 0.0, 1.5),
        "reduction": draw.option("reduction", "none", "mean", "sum"),
    }
