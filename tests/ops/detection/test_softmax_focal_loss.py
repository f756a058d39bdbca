"""softmax_focal_loss: saturation, classes out of range, the module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.op_suite import CompositionSuite, Failure
from support.strategies import seeds
from torchkiln import nn, ops, reference
from torchkiln.reference.detection.softmax_focal_loss import parity
from torchkiln.testing import Inputs, _fuzz


class TestSoftmaxFocalLoss(CompositionSuite):
    parity = parity()
    autocast = torch.float32
    dynamic: ClassVar = {"inputs": 0, "targets": 0}
    failures = (
        Failure(
            "integer_inputs",
            {"inputs": lambda x: x.long()},
            TypeError,
            "^softmax_focal_loss: inputs must be a floating-point tensor; got int64",
        ),
        Failure(
            "dimensions",
            {"inputs": lambda x: x[0]},
            ValueError,
            r"inputs must have shape \(N, C\); got \(8,\)$",
        ),
        Failure(
            "floating_targets",
            {"targets": lambda t: t.float()},
            TypeError,
            r"targets must be an int64 tensor; got float32\. Convert it with targets\.long\(\)$",
        ),
        Failure(
            "label_count",
            {"targets": lambda t: t[:3]},
            ValueError,
            r"targets must have shape \(37,\); got \(3,\)$",
        ),
        Failure(
            "two_devices",
            {"targets": lambda t: t.to("meta")},
            ValueError,
            "targets must be on the device of inputs",
        ),
        Failure(
            "weight_shape",
            {"weight": torch.ones(9)},
            ValueError,
            r"weight must have shape \(8,\); got \(9,\)$",
        ),
        Failure(
            "weight_dtype",
            {"weight": torch.ones(8, dtype=torch.float64)},
            TypeError,
            r"weight must have the dtype of inputs \(float32\); got float64$",
        ),
        Failure(
            "reduction",
            {"reduction": "average"},
            ValueError,
            'reduction must be "none", "mean" or "sum"; got \'average\'$',
        ),
        Failure("gamma", {"gamma": -1.0}, ValueError, r"gamma must be at least 0; got -1\.0$"),
        Failure("alpha", {"alpha": math.nan}, ValueError, "alpha must be a number; got nan$"),
        Failure("word", {"gamma": "x"}, TypeError, "gamma must be a number; got 'x'$"),
    )

    def sized(self, new: Inputs, size: int) -> Mapping[str, Any]:
        return {"inputs": new.normal(size, 8), "targets": new.integers(size, high=9)}


@pytest.mark.parametrize("space", [ops, reference])
def test_by_hand(space: Any) -> None:
    """Two classes of equal logits: 0.25 * 0.5^2 * log 2."""
    loss = space.softmax_focal_loss(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1]))
    torch.testing.assert_close(loss.item(), 0.25 * 0.25 * math.log(2))


def test_a_wrong_row_is_not_saturated(device: str) -> None:
    logits = torch.tensor([[0.0, 200.0]], device=device, requires_grad=True)
    loss = ops.softmax_focal_loss(logits, torch.tensor([0], device=device), 1.0, reduction="sum")
    torch.testing.assert_close(loss.item(), 200.0)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 1.0]], device=device))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_a_sure_row_has_a_finite_gradient(gamma: float, device: str) -> None:
    logits = torch.tensor([[0.0, -300.0, -math.inf]], device=device, requires_grad=True)
    loss = ops.softmax_focal_loss(logits, torch.tensor([0], device=device), gamma=gamma)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.item() == 0
    assert not grad.any()


def test_weight_has_a_gradient(device: str) -> None:
    weight = torch.ones(3, device=device, requires_grad=True)
    targets = torch.tensor([1, 1, 7], device=device)
    loss = ops.softmax_focal_loss(torch.zeros(3, 3, device=device), targets, weight=weight)
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    torch.testing.assert_close(grad, torch.tensor([0, 2, 0], device=device) * loss[0])


def test_empty_mean_is_nan(device: str) -> None:
    targets = torch.zeros(0, device=device).long()
    loss = ops.softmax_focal_loss(torch.zeros(0, 3, device=device), targets, reduction="mean")
    assert loss.isnan()


def test_module_is_the_function(device: str) -> None:
    new = Inputs()
    logits = new.normal(9, 4).to(device)
    targets, weight = new.integers(9, high=4).to(device), new.uniform(4).to(device)
    module = nn.SoftmaxFocalLoss(0.5, 1.5, "mean", weight=weight).to(device)
    expected = ops.softmax_focal_loss(logits, targets, 0.5, 1.5, "mean", weight=weight)
    assert torch.equal(module(logits, targets), expected)
    assert list(module.state_dict()) == ["weight"]
    assert repr(module) == "SoftmaxFocalLoss(alpha=0.5, gamma=1.5, reduction='mean')"


@given(st.tuples(seeds, st.integers(1, 40), st.integers(1, 9)))
def test_without_alpha_and_gamma_it_is_the_cross_entropy(size: tuple[int, int, int]) -> None:
    new = Inputs(size[0])
    logits, targets = 4 * new.normal(*size[1:]), new.integers(size[1], high=size[2])
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(ops.softmax_focal_loss(logits, targets, 1, 0, "mean"), expected)


@pytest.mark.parametrize("space", [ops, reference])
@pytest.mark.parametrize("row", [[-math.inf], [math.nan], [-math.inf, -math.inf], [0.0, math.nan]])
def test_a_row_without_a_softmax_is_nan(row: list[float], space: Any, device: str) -> None:
    target = torch.zeros(1, device=device).long()
    for gamma in (0.0, 2.0):
        loss = space.softmax_focal_loss(torch.tensor([row], device=device), target, 0.25, gamma)
        assert loss.isnan().all()


def test_random_logits_are_below_infinity_in_every_dtype() -> None:
    calls = [_fuzz.draw_call(parity(), 0, number) for number in range(1000)]
    usual = [call for call in calls if call.draw.kind != "beyond" and not call.is_spoiled]
    assert not any(call.arguments["inputs"].isposinf().any() for call in usual)
    assert any(call.arguments["inputs"].isneginf().any() for call in usual)


def test_autocast_takes_two_dtypes(device: str) -> None:
    logits, targets = Inputs().normal(5, 4).to(device), torch.tensor([0, 3, 2, 1, 0], device=device)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.softmax_focal_loss(logits.bfloat16(), targets, weight=weight)
    expected = ops.softmax_focal_loss(logits.bfloat16().float(), targets, weight=weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
