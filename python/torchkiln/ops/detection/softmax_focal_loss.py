"""Focal loss of the softmax of logits."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.ops._arguments import (
    cast_for_autocast,
    dtype_name,
    require_choice,
    require_device,
    require_floating,
    require_number,
    require_pair,
    require_tensor,
    shape,
    widened,
)

__all__ = ["softmax_focal_loss"]

_OP = "softmax_focal_loss"
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _check(
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    reduction: str,
    weight: Tensor | None,
) -> None:
    require_choice(_OP, "reduction", reduction, _REDUCTIONS)
    require_floating(_OP, inputs=inputs)
    require_tensor(_OP, targets=targets)
    if inputs.dim() != 2:
        raise ValueError(f"{_OP}: inputs must have shape (N, C); got {shape(inputs)}")
    if targets.dtype != torch.int64:
        raise TypeError(
            f"{_OP}: targets must be an int64 tensor; got {dtype_name(targets)}. "
            "Convert it with targets.long()"
        )
    if targets.shape != inputs.shape[:1]:
        raise ValueError(
            f"{_OP}: targets must have shape ({inputs.shape[0]},); got {shape(targets)}"
        )
    require_device(_OP, inputs=inputs, targets=targets)
    if weight is not None:
        require_tensor(_OP, weight=weight)
        require_pair(_OP, inputs=inputs, weight=weight)
        if weight.shape != inputs.shape[1:]:
            raise ValueError(
                f"{_OP}: weight must have shape ({inputs.shape[1]},); got {shape(weight)}"
            )
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        require_number(_OP, **{name: value})
        if value < 0:
            raise ValueError(f"{_OP}: {name} must be at least 0; got {value}")


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of logits that weighs down rows that are classified well already.

    Args:
        inputs: (N, C) logits, float16, bfloat16, float32 or float64.
        targets: (N,), int64; the class of each row. A row whose class is not from 0 to C - 1 costs
            nothing.
        alpha: factor of the loss, at least 0.
        gamma: how strongly easy rows are weighed down, at least 0.
        reduction: "none", "sum" or "mean", the sum / N.
        weight: (C,), dtype of `inputs`; factor of a row by its class.

    Returns:
        (N,) for "none", else (); dtype of `inputs`.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or reduction, a negative alpha or gamma, or two different
            devices.

    Differentiable: inputs, weight. Deterministic: yes. Autocast: float32.

    Note:
        Computed in float32 for the half types, what follows the softmax in float64. Never
        saturates: the loss of a wrong row grows with its logits, where mmcv's stops at 87. A logit
        of -inf excludes its class; where all are excluded, and beside NaN or +inf, the loss of the
        row is NaN, as that of a softmax. Nothing synchronises with the device. The mean of no rows
        is NaN, as in `sigmoid_focal_loss`.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5, of a softmax.

    Example:
        >>> import torch
        >>> from torchkiln.ops import softmax_focal_loss
        >>> softmax_focal_loss(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), torch.tensor([1, 1]))
        tensor([0.0005, 0.4125])
    """
    inputs, weight = cast_for_autocast(inputs, weight)
    _check(inputs, targets, alpha, gamma, reduction, weight)
    classes = inputs.shape[1]
    logits = widened(inputs)
    if classes == 0:
        loss = logits.sum(1)
    else:
        has_class = (targets >= 0) & (targets < classes)
        row_class = torch.where(has_class, targets, 0)
        # One number a row from here on: float64 costs nothing and rounds once.
        log_p = logits.log_softmax(1).gather(1, row_class[:, None]).squeeze(1).double()
        # 1 - p, with all digits where p is near 1.
        rest = -torch.expm1(log_p)
        # A power below 1 has an infinite slope at 0, where its factor log_p is 0.
        is_sure = rest == 0
        modulation = torch.where(is_sure, 0.0**gamma, torch.where(is_sure, 1.0, rest) ** gamma)
        loss = -alpha * modulation * log_p
        if weight is not None:
            loss = loss * widened(weight)[row_class]
        loss = torch.where(has_class, loss, 0.0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / inputs.shape[0] if inputs.shape[0] else loss * float("nan")
    return loss.to(inputs.dtype)
