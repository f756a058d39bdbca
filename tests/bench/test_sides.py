"""Compositions that stand beside our operators compute the same; rows name their forms."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cases, cases_deformable_aggregation, cases_msda, cases_scan, goals
from benchmarks.cases import BOTH, F16, F32, FORWARD, OURS, Case
from benchmarks.harness import Work, copy_of, in_float64, tensors_of

CPU = torch.device("cpu")


def results(work: Work, name: str, is_double: bool = True) -> list[torch.Tensor]:
    """What a side computes from the row's inputs."""
    inputs = in_float64(work.inputs) if is_double else copy_of(work.inputs)
    (side,) = (side for side in work.sides if side.name == name)
    return tensors_of(side.result(side.prepare(inputs)()))


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_the_loop_is_the_scan_and_has_its_gradients(direction: str) -> None:
    work = cases_scan.selective_scan((2, 8, 33, 4), F32, direction, device="cpu").make(CPU)
    found, wanted = results(work, "PyTorch"), results(work, OURS)
    assert len(found) == (1 if direction == FORWARD else 1 + len(cases_scan.NAMES))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_scan_has_no_gradient_beside_those_of_its_result() -> None:
    work = cases_scan.selective_scan((2, 8, 33, 4), F32, BOTH, device="cpu").make(CPU)
    differentiable = [name for name, x in work.inputs.items() if x.requires_grad]
    assert sorted(differentiable) == sorted(cases_scan.NAMES)
    shapes = [x.shape for x in results(work, OURS)]
    leaves = [work.inputs[name].shape for name in cases_scan.NAMES]
    assert shapes == [work.inputs["grad"].shape, *leaves]


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_the_form_that_is_not_fused_is_the_fused_one(direction: str) -> None:
    tiny = {**cases_msda.TINY, "queries": 5}
    row = cases_msda.row(direction, "decoder", F32, cases_msda.FUSED, tiny, device="cpu")
    work = row.make(CPU)
    found, wanted = results(work, cases_msda.UNFUSED), results(work, OURS)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def fields(case: Case, **changed: str) -> tuple[object, ...]:
    """As the rules over rows tell them apart."""
    return goals.fields({**case.described(), **changed})


def test_quick_rows_have_the_rows_that_rules_compare_them_with() -> None:
    quick = cases.gpu_cases(quick=True)
    known = {fields(case) for case in quick}
    scans = [case for case in quick if case.operator == goals.SCAN and "8x768x1024" in case.size]
    assert {"highorder, true time", "mamba, deterministic"} < {case.data for case in scans}
    for case in scans:
        assert fields(case, data="mamba") in known
    halves = [
        case
        for case in quick
        if case.operator == cases_deformable_aggregation.OPERATOR and case.dtype == "float16"
    ]
    assert any("300 points" in case.size for case in halves)
    for case in halves:
        assert fields(case, dtype="float32") in known


def test_the_fixed_order_of_the_scan_is_measured_in_both_types() -> None:
    found = {
        case.dtype
        for case in cases.gpu_cases(quick=True)
        if case.operator == goals.SCAN and case.data == "mamba, deterministic"
    }
    assert found == {cases.name_of(F32), cases.name_of(F16)}
