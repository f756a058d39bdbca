"""Focal loss on logits, for class labels and for targets of the inputs' shape: one schema."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import require_choice

__all__ = ["sigmoid_focal_loss"]

# Values of the schema's `reduction`.
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _fake(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: int = 0,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    loss = inputs.new_empty(() if reduction else inputs.shape)
    return loss, inputs.new_empty(inputs.shape if reduction and with_gradient else (0,))


def _fake_backward(
    grad_output: Tensor,
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    reduction: int,
) -> Tensor:
    return inputs.new_empty(inputs.shape)


def _fake_scale(gradient: Tensor, grad_output: Tensor) -> None:
    """Changes its argument and returns nothing."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, weight, *ctx.settings, with_gradient = inputs
    ctx.save_for_backward(logits, targets, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.gradient = output[1] if with_gradient and ctx.settings[2] else None


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor | None = None) -> Tensor:
    if any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError(
            "sigmoid_focal_loss: targets and weight get no gradient. "
            'Detach them, or use torchkiln.backend("reference")'
        )
    gradient, ctx.gradient = ctx.gradient, None
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    result: Tensor
    if gradient is None or (torch.is_grad_enabled() and not traced):
        # None was left, or an earlier backward used it up, or its own graph is wanted.
        result = _sigmoid_focal_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.settings)
    elif traced:
        result = gradient * grad_loss
    else:
        _sigmoid_focal_loss_scale_(gradient, grad_loss)
        result = gradient
    return result


_sigmoid_focal_loss_backward = operator("_sigmoid_focal_loss_backward", fake=_fake_backward)
_sigmoid_focal_loss_scale_ = operator("_sigmoid_focal_loss_scale_", fake=_fake_scale)
# float32: the sum of a million losses is beyond float16.
_sigmoid_focal_loss = operator(
    "sigmoid_focal_loss",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy of logits that weighs down what is classified well already.

    The dtype of `targets` decides between two forms. int64: labels, one class or background a row
    (mmcv's form). That of `inputs`: a probability for each element (torchvision's form).

    Args:
        inputs: logits, float16, bfloat16, float32 or float64; (N, C) with labels, else any shape.
        targets: (N,) int64 from 0 to C, where C and whatever is out of range mean background: no
            positive class. Or the shape, dtype and device of `inputs`, from 0 to 1.
        alpha: factor of positive elements; negative ones get 1 - alpha. Below 0: both get 1.
        gamma: how strongly easy elements are weighed down, at least 0.
        reduction: "none", "sum" or "mean". The mean is over rows (sum / N) with labels, over
            elements otherwise.
        weight: (C,), dtype of `inputs`; factor of a whole row by its label, 1 for background. With
            labels only.

    Returns:
        Shape of `inputs` for "none", else (); dtype of `inputs`.

    Raises:
        TypeError: for another dtype, or targets and inputs of two floating dtypes.
        ValueError: for another shape or reduction, a negative gamma, two different devices, or a
            weight without labels.

    Differentiable: inputs. Deterministic: yes. Autocast: float32.

    Note:
        Never saturates: the loss of a wrong logit grows with it, where mmcv's stops at 87. Computed
        in float32 for the half types. With "sum" or "mean" the gradient is computed together with
        the loss, in one pass over the logits. Nothing synchronises with the device.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5.

    Example:
        >>> import torch
        >>> from torchkiln.ops import sigmoid_focal_loss
        >>> logits = torch.tensor([[0.0, 2.0], [0.0, -2.0]])
        >>> sigmoid_focal_loss(logits, torch.tensor([1, 2]), reduction="mean")
        tensor(0.1309)
        >>> sigmoid_focal_loss(logits, torch.tensor([[0.0, 1.0], [0.0, 0.0]]), reduction="mean")
        tensor(0.0654)
    """
    require_choice("sigmoid_focal_loss", "reduction", reduction, _REDUCTIONS)
    number = _REDUCTIONS[reduction]
    # Under torch.func the gradient would be an output of its own.
    with_gradient = (
        number > 0
        and getattr(inputs, "requires_grad", False)
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
    )
    loss, _ = _sigmoid_focal_loss(inputs, targets, weight, alpha, gamma, number, with_gradient)
    return loss
