"""sigmoid_focal_loss: both target forms, saturation, what a second backward gives, properties."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import reference
from torchkiln.ops import sigmoid_focal_loss
from torchkiln.reference.detection.sigmoid_focal_loss import parity
from torchkiln.testing import Inputs

floats = torch.float32


class TestSigmoidFocalLoss(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"inputs": 0, "targets": 0}
    autocast = torch.float32
    failures = (
        Failure(
            "integer_inputs",
            {"inputs": lambda x: x.long()},
            TypeError,
            r"inputs must be a floating-point tensor; got int64",
        ),
        Failure(
            "labels_need_two_dimensions",
            {"inputs": lambda x: x[0]},
            ValueError,
            r"inputs must have shape \(N, C\) when targets are labels; got \(8,\)",
        ),
        Failure(
            "label_count",
            {"targets": lambda t: t[:3]},
            ValueError,
            r"targets must have shape \(37,\); got \(3,\)",
        ),
        Failure(
            "targets_dtype",
            {"targets": lambda t: t.int()},
            TypeError,
            r"targets must be int64 labels or have the dtype of inputs \(float32\); got int32",
        ),
        Failure(
            "soft_shape",
            {"targets": torch.zeros(37)},
            ValueError,
            r"targets must have the shape of inputs \(37, 8\); got \(37,\)",
        ),
        Failure(
            "soft_weight",
            {"targets": torch.zeros(37, 8), "weight": torch.ones(8)},
            ValueError,
            r"weight must be None unless targets are labels; got a tensor of shape \(8,\)",
        ),
        Failure(
            "weight_shape",
            {"weight": torch.ones(9)},
            ValueError,
            r"weight must have shape \(8,\); got \(9,\)",
        ),
        Failure(
            "weight_dtype",
            {"weight": torch.ones(8, dtype=torch.float64)},
            TypeError,
            r"weight must have the dtype of inputs \(float32\); got float64",
        ),
        Failure(
            "reduction",
            {"reduction": "average"},
            ValueError,
            r"reduction must be \"none\", \"mean\" or \"sum\"; got 'average'",
        ),
        Failure("gamma", {"gamma": -1.0}, ValueError, r"gamma must be at least 0; got -1"),
        Failure("alpha", {"alpha": math.nan}, ValueError, r"alpha must be a number; got nan"),
    )

    def sized(self, new: Inputs, n: int) -> Mapping[str, Any]:
        return {"inputs": new.normal(n, 8), "targets": new.integers(n, high=9), "reduction": "sum"}


def test_reference_by_hand() -> None:
    """A probability of 0.5 at a logit of 0, so that the loss is alpha_t * 0.25 * log 2."""
    logits = torch.zeros(1, 2, dtype=torch.float64)
    loss, _ = reference.sigmoid_focal_loss(logits, torch.tensor([1]))
    expected = [[0.75 * 0.25 * math.log(2), 0.25 * 0.25 * math.log(2)]]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("logit", "expected"), [(17.0, 12.75), (25.0, 18.75)])
def test_a_wrong_logit_is_not_saturated(logit: float, expected: float, device: str) -> None:
    logits = torch.full((1, 1), logit, device=device)
    loss = sigmoid_focal_loss(logits, torch.tensor([1], device=device))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-6, atol=0)


def test_an_excluded_logit_costs_nothing(device: str) -> None:
    """Logits of masked classes are often -infinity."""
    logits = torch.full((4, 3), -math.inf, device=device, requires_grad=True)
    background = torch.full((4,), 3, device=device)
    for targets in (background, torch.zeros(4, 3, device=device)):
        for gamma in (0.0, 1.5, 2.0):
            loss = sigmoid_focal_loss(logits, targets, gamma=gamma, reduction="sum")
            (grad,) = torch.autograd.grad(loss, logits)
            assert loss == 0
            assert not grad.any()


def test_nan_stays_in_its_element(device: str) -> None:
    logits = torch.zeros(3, 4, device=device)
    logits[1, 2] = math.nan
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 1, 2], device=device))
    assert loss.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_retained_graph_gives_both_gradients(reduction: str, device: str) -> None:
    """The first backward works in place on what forward left; the second must not see that."""
    logits = Inputs().normal(9, 4).to(device, floats).requires_grad_()
    targets = Inputs().integers(9, high=5).to(device)
    loss = sigmoid_focal_loss(logits, targets, reduction=reduction)
    (first,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(3 * second, first)


def test_second_derivatives_are_refused(device: str) -> None:
    logits = torch.zeros(2, 3, device=device, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(2, device=device).long(), reduction="sum")
    (grad,) = torch.autograd.grad(2 * loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_gradient_is_not_computed_unless_needed(device: str) -> None:
    logits, targets = torch.zeros(2, 3, device=device), torch.zeros(2, device=device).long()
    _, gradient = torch.ops.torchkiln.sigmoid_focal_loss(logits, targets, None, 0.25, 2.0, 2, False)
    assert gradient.numel() == 0


def test_soft_targets_refuse_a_gradient(device: str) -> None:
    logits = torch.zeros(2, 3, device=device, requires_grad=True)
    targets = torch.full((2, 3), 0.5, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="targets and weight get no gradient"):
        sigmoid_focal_loss(logits, targets).sum().backward()


def test_scale_checks_its_arguments(device: str) -> None:
    scale = torch.ops.torchkiln._sigmoid_focal_loss_scale_
    gradient = torch.ones(3, 4, device=device)
    with pytest.raises(RuntimeError, match="gradient must be contiguous"):
        scale(gradient.t(), torch.ones((), device=device))
    with pytest.raises(RuntimeError, match=r"grad_output must have shape \(\); got \(2,\)"):
        scale(gradient, torch.ones(2, device=device))
    scale(gradient, torch.tensor(2.0, device=device))
    assert (gradient == 2).all()


def test_empty_mean_is_nan(device: str) -> None:
    targets = torch.zeros(0, device=device).long()
    loss = sigmoid_focal_loss(torch.zeros(0, 3, device=device), targets, reduction="mean")
    assert loss.isnan()


def _problem(seed: int, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    new = Inputs(seed)
    return 4 * new.normal(rows, classes), new.integers(rows, high=classes + 1)


sizes = st.tuples(seeds, st.integers(1, 70), st.integers(1, 20))


@given(sizes)
def test_labels_equal_their_one_hot_targets(size: tuple[int, int, int]) -> None:
    logits, labels = _problem(*size)
    one_hot = torch.nn.functional.one_hot(labels, size[2] + 1)[:, :-1].double()
    actual = sigmoid_focal_loss(logits, labels, 0.3, 1.7, "sum")
    torch.testing.assert_close(actual, sigmoid_focal_loss(logits, one_hot, 0.3, 1.7, "sum"))


@given(sizes)
def test_without_alpha_and_gamma_it_is_the_cross_entropy(size: tuple[int, int, int]) -> None:
    logits, _ = _problem(*size)
    targets = Inputs(size[0]).uniform(*logits.shape)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, -1, 0, "mean"), expected)


@given(sizes)
def test_exchanging_the_classes_negates_the_logits(size: tuple[int, int, int]) -> None:
    logits, _ = _problem(*size)
    targets = Inputs(size[0]).uniform(*logits.shape)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, 0.3), sigmoid_focal_loss(-logits, 1 - targets, 0.7)
    )
