"""Peers as sides of the benchmark, with modules in place of theirs; and what a report says of them.

The modules below have the parameters of the C++ functions, in their order.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cases, goals, peer_sides, report
from benchmarks.cases import MAMBA, MMCV, Baseline, Target
from benchmarks.rows import Row

from torchkiln import ops
from torchkiln.testing import Inputs


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What is found is found anew in each test."""
    yield
    for found in (peer_sides.module, peer_sides.can_import, peer_sides.has_deformops_kernels):
        found.cache_clear()


def put(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Lets a module be imported."""
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad)


# ---- whether a peer is there ----


def test_a_module_that_is_missing_or_broken_is_no_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not peer_sides.can_import("broken_peer")
    assert not peer_sides.can_import("nowhere.to.be.found")
    put(monkeypatch, "here")
    assert peer_sides.can_import("here")


# ---- the calls ----


def scan(*tensors: Tensor, delta_softplus: bool) -> Tensor:
    out = ops.selective_scan(*tensors, delta_softplus)
    assert isinstance(out, Tensor)
    return out


def test_selective_scan_is_called_as_its_interface_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fwd(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D_: Tensor, z_: Tensor,
        delta_bias_: Tensor, delta_softplus: bool,
    ) -> list[Tensor]:  # fmt: skip
        out_z = scan(u, delta, A, B, C, D_, z_, delta_bias_, delta_softplus=delta_softplus)
        return [out_z + 1, u.new_full((1,), 7.0), out_z]

    def bwd(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D_: Tensor, z_: Tensor,
        delta_bias_: Tensor, dout: Tensor, x_: Tensor, out_: Tensor, dz_: None,
        delta_softplus: bool, recompute_out_z: bool,
    ) -> list[Tensor]:  # fmt: skip
        assert x_.item() == 7
        assert dz_ is None
        assert recompute_out_z is False
        assert dout.stride(-1) == 1
        leaves = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D_, z_, delta_bias_)]
        with torch.enable_grad():
            out = scan(*leaves, delta_softplus=delta_softplus)
        torch.testing.assert_close(out_, out.detach() + 1)
        du, ddelta, dA, dB, dC, dD, dz, ddelta_bias = gradients(out, leaves, dout)
        return [du, ddelta, dA, dB, dC, dD, ddelta_bias, dz]

    put(monkeypatch, peer_sides.SCAN_MODULE, fwd=fwd, bwd=bwd)
    new = Inputs()
    shape = (2, 4, 9)
    leaves = [
        new.normal(*shape), new.uniform(*shape), -new.uniform(4, 3), new.normal(2, 2, 3, 9),
        new.normal(2, 2, 3, 9), new.normal(4), new.normal(*shape), new.uniform(4),
    ]  # fmt: skip
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, expected = peer_sides.selective_scan(*leaves, True), scan(*leaves, delta_softplus=True)
    torch.testing.assert_close(out, expected)
    found = gradients(out.sum(), leaves, torch.ones(()).double())
    for grad, exact in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(grad, exact)


def test_causal_conv1d_is_called_as_its_interface_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def causal_conv1d_fwd(
        x: Tensor, weight: Tensor, bias_: Tensor, seq_idx_: None, initial_states_: None,
        out: Tensor, final_states_out_: None, silu_activation: bool,
    ) -> None:  # fmt: skip
        assert seq_idx_ is initial_states_ is final_states_out_ is None
        assert silu_activation is True
        out.copy_(ops.causal_conv1d_fn(x, weight, bias_, activation="silu"))

    def causal_conv1d_bwd(
        x: Tensor, weight: Tensor, bias_: Tensor, dout: Tensor, seq_idx_: None,
        initial_states_: None, dfinal_states_: None, dx: Tensor, dweight: Tensor, dbias_: Tensor,
        dinitial_states_: None, silu_activation: bool,
    ) -> None:  # fmt: skip
        assert seq_idx_ is initial_states_ is dfinal_states_ is dinitial_states_ is None
        assert silu_activation is True
        assert dweight.dtype == dbias_.dtype == torch.float32
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias_)]
        with torch.enable_grad():
            out = ops.causal_conv1d_fn(*leaves, activation="silu")
        assert isinstance(out, Tensor)
        of_x, of_weight, of_bias = gradients(out, leaves, dout)
        dx.copy_(of_x)
        # Sums are added to.
        dweight += of_weight
        dbias_ += of_bias

    def causal_conv1d_update(
        x: Tensor, conv_state: Tensor, weight: Tensor, bias_: Tensor, out: Tensor,
        silu_activation: bool, cache_seqlens_: None, conv_state_indices_: None,
    ) -> None:  # fmt: skip
        assert cache_seqlens_ is conv_state_indices_ is None
        assert silu_activation is True
        out.copy_(ops.causal_conv1d_update(x, conv_state, weight, bias_, "silu"))

    put(
        monkeypatch,
        peer_sides.CONV_MODULE,
        causal_conv1d_fwd=causal_conv1d_fwd,
        causal_conv1d_bwd=causal_conv1d_bwd,
        causal_conv1d_update=causal_conv1d_update,
    )
    new = Inputs()
    leaves = [x.float().requires_grad_() for x in (new.normal(2, 8, 5), new.normal(8, 4))]
    leaves.append(new.normal(8).float().requires_grad_())
    out = peer_sides.causal_conv1d(*leaves)
    expected = ops.causal_conv1d_fn(*leaves, activation="silu")
    torch.testing.assert_close(out, expected)
    grad = new.normal(2, 8, 5).float()
    for ours, exact in zip(
        gradients(out, leaves, grad), gradients(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, exact)
    state = new.normal(2, 8, 4).float()
    other = state.clone()
    weight, bias = (leaf.detach() for leaf in leaves[1:])
    x = new.normal(2, 8).float()
    torch.testing.assert_close(
        peer_sides.causal_conv1d_update(x, state, weight, bias),
        ops.causal_conv1d_update(x, other, weight, bias, "silu"),
    )
    assert torch.equal(state, other)


def test_deformable_aggregation_is_called_as_its_function_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def deformable_aggregation_forward(
        _mc_ms_feat: Tensor, _spatial_shape: Tensor, _scale_start_index: Tensor,
        _sampling_location: Tensor, _weights: Tensor,
    ) -> Tensor:  # fmt: skip
        assert _spatial_shape.dtype == _scale_start_index.dtype == torch.int32
        return ops.deformable_aggregation(
            _mc_ms_feat, _sampling_location, _weights, _spatial_shape, _scale_start_index
        )

    def deformable_aggregation_backward(
        _mc_ms_feat: Tensor, _spatial_shape: Tensor, _scale_start_index: Tensor,
        _sampling_location: Tensor, _weights: Tensor, _grad_output: Tensor,
        _grad_mc_ms_feat: Tensor, _grad_sampling_location: Tensor, _grad_weights: Tensor,
    ) -> None:  # fmt: skip
        assert _grad_output.is_contiguous()
        leaves = [x.detach().requires_grad_() for x in (_mc_ms_feat, _sampling_location, _weights)]
        with torch.enable_grad():
            out = ops.deformable_aggregation(*leaves, _spatial_shape, _scale_start_index)
        written = (_grad_mc_ms_feat, _grad_sampling_location, _grad_weights)
        for to, grad in zip(written, gradients(out, leaves, _grad_output), strict=True):
            to += grad

    put(
        monkeypatch,
        peer_sides.AGGREGATION_MODULE,
        deformable_aggregation_forward=deformable_aggregation_forward,
        deformable_aggregation_backward=deformable_aggregation_backward,
    )
    new = Inputs()
    maps = [new.normal(2, 3, 8, *size).float() for size in ((6, 5), (3, 4))]
    features, shapes, starts = ops.feature_maps_format(maps)
    location = new.uniform(2, 4, 5, 3, 2).float()
    weights = new.normal(2, 4, 5, 3, 2, 2).float()
    leaves = [x.detach().requires_grad_() for x in (features, location, weights)]
    out = peer_sides.deformable_aggregation(leaves[0], shapes, starts, *leaves[1:])
    expected = ops.deformable_aggregation(*leaves, shapes, starts)
    torch.testing.assert_close(out, expected)
    grad = new.normal(*out.shape).float()
    for ours, exact in zip(
        gradients(out, leaves, grad), gradients(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("with_kernels", [False, True])
def test_deformops_chooses_its_backend_unless_its_kernels_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, with_kernels: bool
) -> None:
    seen: list[tuple[Any, ...]] = []

    class Msda:
        def __call__(
            self,
            *tensors: Tensor,
            method: str | None = None,
            chunk_step: int = 128,
            backend: Any = None,
        ) -> Tensor:
            seen.append((len(tensors), method, backend))
            return tensors[0]

        def load(self, backend: str) -> None:
            if not with_kernels:
                raise RuntimeError(f"no library for {backend}")

    backends = SimpleNamespace(CUDA="cuda", TRITON="triton")
    put(monkeypatch, "deformops")
    put(monkeypatch, peer_sides.DEFORMOPS_MODULE, msda=Msda(), Backend=backends)
    assert peer_sides.has_deformops_kernels() == with_kernels
    peer_sides.deformops_attention(with_kernels)(*[torch.ones(1)] * 5)
    assert seen == [(5, "linear", "cuda" if with_kernels else None)]


# ---- what is reported ----


def row(sides: dict[str, float], baselines: tuple[Baseline, ...] = ()) -> Row:
    case = cases.Case(
        "scan", "1x2", "float32", "forward", lambda _: None,  # type: ignore[arg-type,return-value]
        targets=(Target("baseline", 1.2, 2, MAMBA),), baselines=baselines,
    )  # fmt: skip
    numbers = {
        name: {"cold_us": {"median": us, "p10": us, "p90": us}} for name, us in sides.items()
    }
    return Row(case.key, {**case.described(), "sides": numbers}, {})


def test_a_baseline_stands_under_its_own_peer() -> None:
    found = row({"torchkiln": 100.0}, (Baseline(MAMBA, 229.0), Baseline(MMCV, 300.0)))
    assert found.elsewhere() == {MAMBA: (229.0, False), MMCV: (300.0, False)}
    assert goals.goal_of(found, found.data["targets"][0]).reached == pytest.approx(2.29)
    table = report.times_table([found])
    assert "| mamba-ssm elsewhere, µs | mmcv elsewhere, µs |" in table
    assert "| 229, *unscaled* | 300, *unscaled* |" in table
    assert "1.2x mamba-ssm, aim 2x" in report.targets_table([found])


def test_a_peer_that_ran_needs_no_baseline() -> None:
    found = row({"torchkiln": 100.0, MAMBA: 150.0}, (Baseline(MAMBA, 229.0),))
    assert found.elsewhere() == {}
    assert goals.goal_of(found, found.data["targets"][0]).reached == pytest.approx(1.5)


def test_the_best_side_of_a_peer_counts() -> None:
    found = row({"torchkiln": 100.0, MAMBA: 150.0, f"{MAMBA}, CUDA": 130.0, f"{MAMBA}2": 1.0})
    assert found.peer_us(MAMBA) == 130


def test_a_baseline_is_scaled_by_the_side_beside_it() -> None:
    sides = {"torchkiln": 100.0, "grid_sample": 50.0}
    found = row(sides, (Baseline(MAMBA, 229.0, 100.0, "grid_sample"),))
    assert found.elsewhere() == {MAMBA: (114.5, True)}


def test_every_target_has_a_peer_or_a_baseline_of_its_name() -> None:
    for case in cases.gpu_cases(quick=False):
        named = {baseline.peer for baseline in case.baselines}
        wanted = {target.peer for target in case.targets if target.kind == "baseline"}
        assert wanted <= named, case.key
        assert all(target.kind != "mmcv" for target in case.targets)
