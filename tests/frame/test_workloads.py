"""Workloads: each operator has some, and they run, forward and backward."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools

import pytest
import torch

from torchkiln import testing
from torchkiln.testing import Run, Workload
from torchkiln.testing._workloads import FORMATS

# Ours: other tests of the process may have declared operators of their own.
PARITIES = {name: parity for name, parity in testing.find().items() if parity.function is None}
# Every size at most this: what is realistic is too much for a test on a CPU.
SMALL = 8


def small(run: Run) -> Run:
    sizes = {name: min(value, SMALL) for name, value in run.sizes.items()}
    return Run(run.parity, run.workload, run.function, sizes, run.dtype, run.layout)


@pytest.mark.parametrize("op", PARITIES)
def test_every_function_has_a_workload_and_every_gradient_too(op: str) -> None:
    parity = PARITIES[op]
    runs = testing.runs([parity])
    assert {run.function for run in runs} == set(parity.functions)
    assert {run.dtype for run in runs} == set(parity.dtypes)
    names = [workload.name for workload in parity.workloads]
    assert len(set(names)) == len(names)
    has_backward = any("forward+backward" in run.directions for run in runs)
    assert has_backward == bool(parity.differentiable)


@pytest.mark.parametrize(
    "run", testing.runs(PARITIES.values(), [torch.float32, torch.float16]), ids=str
)
def test_workloads_run(run: Run, device: str) -> None:
    calls = small(run).calls(device)
    assert set(calls) == run.directions
    assert calls["forward"]() is not None
    if "forward+backward" in calls:
        arguments = run.workload.arguments(small(run).sizes, run.dtype, run.layout, device)
        grads = calls["forward+backward"]()
        assert isinstance(grads, tuple)
        for name, grad in zip(run.parity.differentiable, grads, strict=True):
            assert grad.shape == arguments[name].shape
            assert grad.dtype == run.dtype


@pytest.mark.parametrize("op", PARITIES)
def test_arguments_are_the_same_every_time_and_as_asked(op: str) -> None:
    for workload in PARITIES[op].workloads:
        sizes = {name: min(value, SMALL) for name, value in workload.sizes.items()}
        for layout in workload.layouts:
            first = workload.arguments(sizes, torch.float64, layout, "cpu")
            again = workload.arguments(sizes, torch.float64, layout, "cpu")
            assert list(first) == list(again)
            for name, value in first.items():
                if not isinstance(value, torch.Tensor):
                    assert value == again[name]
                    continue
                assert torch.equal(value, again[name])
                assert value is not again[name]
                # What was asked for, wherever numbers are real; masks and labels keep their type.
                assert value.dtype == torch.float64 or not value.is_floating_point()
                if value.dim() == 4:
                    assert value.is_contiguous(memory_format=FORMATS[layout])


def test_sizes_choose_workloads() -> None:
    parity = PARITIES["nms"]
    runs = testing.runs([parity], [torch.float32], {"classes": 3})
    assert {run.workload.name for run in runs} == {"detections", "many"}
    assert [dict(run.sizes) for run in runs] == [
        {"boxes": 10_000, "classes": 3},
        {"boxes": 100_000, "classes": 3},
    ]
    with pytest.raises(ValueError, match="sizes must be among boxes, classes, most; got rows"):
        testing.runs([parity], None, {"rows": 2})


def test_runs_have_names_of_their_own() -> None:
    runs = testing.runs(PARITIES.values())
    names = [str(run) for run in runs]
    assert len(set(names)) == len(names)
    assert "roi_align pyramid float16 channels_last" in names
    assert "nms level float32" in names


def test_a_workload_has_a_maker_of_its_own_sizes() -> None:
    def make(sizes: testing.Sizes) -> dict[str, torch.Tensor]:
        return {"x": torch.arange(sizes["n"]).float(), "rows": torch.arange(3)}

    workload = Workload("line", {"n": 4}, make)
    for dtype, n in itertools.product(testing.FLOATS, (2, 4)):
        arguments = workload.arguments({"n": n}, dtype, "contiguous", "cpu")
        assert arguments["x"].dtype == dtype
        assert arguments["rows"].dtype == torch.int64
        assert len(arguments["x"]) == n
