"""The parity core finds what is wrong, and only that."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchkiln import ops, testing
from torchkiln._backend import choice
from torchkiln.testing import Case, Parity, compare
from torchkiln.testing._parity import check


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("actual", "expected", "ok"),
    [
        (tensor(1.0, 2.0), tensor(1.0, 2.0), True),
        (tensor(1.0, 2.0), tensor(1.0, 2.00001), True),
        (tensor(1.0, 2.0), tensor(1.0, 2.0001), False),
        (tensor(math.nan), tensor(math.nan), True),
        (tensor(math.nan), tensor(0.0), False),
        (tensor(0.0), tensor(math.nan), False),
        (tensor(math.inf), tensor(math.inf), True),
        (tensor(math.inf), tensor(-math.inf), False),
        (tensor(1.0), tensor(1.0, 2.0), False),
        (tensor(), tensor(), True),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        # Beyond float16's range, so infinite in it.
        (tensor(math.inf, dtype=torch.float16), tensor(1e6), True),
        (tensor(1.0, dtype=torch.float16), tensor(1e6), False),
    ],
)
def test_compare(actual: Tensor, expected: Tensor, ok: bool) -> None:
    if expected.is_floating_point():
        expected = expected.double()
    assert compare(actual, expected, "A").ok is ok


def test_relative_rule() -> None:
    expected = tensor(1.0, 100.0).double()
    plain = tensor(1.0, 101.0, dtype=torch.float16)
    assert compare(tensor(1.0, 102.0, dtype=torch.float16), expected, "C", plain).ok
    assert not compare(tensor(1.0, 103.0, dtype=torch.float16), expected, "C", plain).ok


def test_another_tier_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="another tier needs a reason"):
        Case("loose", lambda new: {}, tier="C")


def test_verify_passes_and_covers() -> None:
    results = testing.verify(["generalized_box_iou"], "cpu", ["float32"])
    assert all(result.ok for result in results)
    assert {result.op for result in results} == {"generalized_box_iou"}
    assert {result.direction for result in results} >= {"forward", "gradient boxes1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["box_io"]}, "ops must be among .*box_iou.*; got box_io"),
        ({"dtypes": ["int32"]}, "dtypes must be floating-point dtypes; got int32"),
        ({"dtypes": ["float31"]}, "dtypes must be floating-point dtypes; got float31"),
    ],
)
def test_verify_refuses(arguments: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        testing.verify(**arguments)


def test_verify_reports_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.box_iou

    def wrong(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        return right(boxes1, boxes2) + (0.0 if choice.reference else 1e-3)

    monkeypatch.setattr(ops, "box_iou", wrong)
    results = testing.verify(["box_iou"], "cpu", ["float64"])
    assert "error 0.001 beyond" in next(r.message for r in results if r.case == "typical")


def test_verify_reports_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(boxes1: Tensor, boxes2: Tensor, **options: object) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(ops, "box_iou", broken)
    results = testing.verify(["box_iou"], "cpu", ["float32"])
    messages = {result.message for result in results if result.op == "box_iou"}
    assert messages == {"MemoryError: no room"}


@pytest.mark.parametrize(("number", "is_right"), [(6.0, True), (6.001, False)])
def test_golden_numbers_are_compared(number: float, is_right: bool) -> None:
    golden = {"forward": (torch.tensor([number], dtype=torch.float64), 1e-9)}
    case = Case("three", lambda new: {"x": torch.tensor([3.0]).double()}, golden=golden)
    parity = Parity(
        op="twice",
        tier="A",
        cases=(case,),
        function=lambda x: 2 * x,
        reference=lambda x: x + x,
        label=lambda arguments: f"of {arguments['x'].item()}",
    )
    results = {r.direction: r for r in check(parity, "twice", case, torch.float32, "cpu")}
    assert results["forward"].ok
    assert results["golden forward"].ok is is_right
    assert {result.label for result in results.values()} == {"of 3.0"}
    half = check(parity, "twice", case, torch.float16, "cpu")
    assert [result.direction for result in half] == ["forward"]
