"""deformable_aggregation, the feature format, and the function of SparseDrive."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import ops, reference
from torchkiln.reference.deformable.deformable_aggregation import parity
from torchkiln.testing import Inputs

_OP = "deformable_aggregation"


class TestDeformableAggregation(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"sampling_location": 1, "weights": 1}
    failures = (
        Failure(
            "four_dimensions",
            {"features": lambda features: features[0]},
            ValueError,
            rf"^{_OP}: feature_maps must have shape \(bs, N, C\); got \(198, 16\)$",
        ),
        Failure(
            "integers",
            {"features": lambda features: features.int()},
            TypeError,
            rf"^{_OP}: feature_maps must be a floating-point tensor; got int32\. ",
        ),
        Failure(
            "three_coordinates",
            {"sampling_location": lambda at: torch.cat([at, at[..., :1]], -1)},
            ValueError,
            rf"^{_OP}: sampling_location must have shape \(2, 5, 3, 3, 2\); "
            r"got \(2, 5, 3, 3, 3\)$",
        ),
        Failure(
            "other_batch",
            {"sampling_location": lambda at: at[:1]},
            ValueError,
            rf"^{_OP}: sampling_location must have shape \(2, 5, 3, 3, 2\); "
            r"got \(1, 5, 3, 3, 2\)$",
        ),
        Failure(
            "no_images",
            {"features": lambda features: features[:0]},
            ValueError,
            rf"^{_OP}: sampling_location must have shape \(0, 5, 3, 3, 2\); "
            r"got \(2, 5, 3, 3, 2\)$",
        ),
        Failure(
            "other_axes",
            {"weights_order": "mlpg"},
            ValueError,
            rf"^{_OP}: weights must have shape \(2, 5, 3, 2, 3, 2\); got \(2, 5, 3, 3, 2, 2\)$",
        ),
        Failure(
            "no_such_order",
            {"weights_order": "lpmg"},
            ValueError,
            rf'^{_OP}: weights_order must be "pmlg" or "mlpg"; got \'lpmg\'$',
        ),
        Failure(
            "groups_do_not_divide",
            {"weights": lambda weights: weights[..., :1].expand(-1, -1, -1, -1, -1, 3)},
            ValueError,
            rf"^{_OP}: weights must have a number of groups that divides the 16 channels; got 3$",
        ),
        Failure(
            "weights_of_another_dtype",
            {"weights": lambda weights: weights.half()},
            TypeError,
            rf"^{_OP}: weights must have the dtype of feature_maps \(float32\) or float32; "
            "got float16$",
        ),
        Failure(
            "output_in_half",
            {"output_dtype": torch.float16},
            ValueError,
            rf"^{_OP}: output_dtype must be the dtype of feature_maps \(torch.float32\), or "
            "torch.float32 for half types; got torch.float16$",
        ),
        Failure(
            "weights_of_fewer_levels",
            {"form": "contiguous", "weights": lambda weights: weights[..., :1, :]},
            ValueError,
            rf"^{_OP}: weights must have shape \(2, 5, 3, 3, 2, 2\); got \(2, 5, 3, 3, 1, 2\)$",
        ),
        Failure("none", {"weights": None}, TypeError, "weights must be a tensor"),
    )

    def test_weights_in_float32_beside_half_maps(self, device: str) -> None:
        """As under autocast, where softmax gives float32."""
        maps, location, weights = _scene(Inputs(3), device)
        maps = [level.half().requires_grad_() for level in maps]
        weights.requires_grad_()
        output = ops.deformable_aggregation(maps, location, weights)
        assert output.dtype == torch.float16
        grads = torch.autograd.grad(output.float().square().sum(), [*maps, weights])
        expected = [level.detach().float().requires_grad_() for level in maps]
        wide = ops.deformable_aggregation(expected, location, weights)
        wide_grads = torch.autograd.grad(wide.square().sum(), [*expected, weights])
        torch.testing.assert_close(output.float(), wide, rtol=2e-3, atol=2e-3)
        for grad, other in zip(grads, wide_grads, strict=True):
            torch.testing.assert_close(grad.float(), other, rtol=1e-2, atol=2e-2)
        assert [grad.dtype for grad in grads] == [torch.float16, torch.float16, torch.float32]

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_layout_of_gradients(self, channels_last: bool, device: str) -> None:
        maps, location, weights = _scene(Inputs(4), device)
        if channels_last:
            maps = [level.movedim(2, 4).contiguous().movedim(4, 2) for level in maps]
        leaves = [level.requires_grad_() for level in maps]
        output = ops.deformable_aggregation(leaves, location, weights)
        for grad, level in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
            assert grad.stride() == level.stride()

    def test_only_what_is_asked_for(self, device: str) -> None:
        """Frozen maps; and places that are no leaves."""
        maps, location, weights = _scene(Inputs(5), device)
        weights.requires_grad_()
        output = ops.deformable_aggregation(maps, location, weights)
        (grad,) = torch.autograd.grad(output.sum(), weights)
        leaf = maps[0].clone().requires_grad_()
        output = ops.deformable_aggregation([leaf, maps[1]], location, weights.detach())
        (of_leaf,) = torch.autograd.grad(output.sum(), leaf)
        expected = reference.deformable_aggregation([leaf, maps[1]], location, weights, None, None)[
            0
        ]
        wanted = torch.autograd.grad(expected.sum(), [weights, leaf])
        for result, other in zip([grad, of_leaf], wanted, strict=True):
            torch.testing.assert_close(result, other)

    def test_maps_that_share_rows_and_rows_of_no_map(self, device: str) -> None:
        """All cameras read the same rows, and the last rows belong to none."""
        new = Inputs(6)
        features = new.normal(1, 30, 8).float().to(device).requires_grad_()
        shapes = torch.tensor([[[4, 5]], [[2, 3]]], device=device)
        starts = torch.tensor([[0], [3]], device=device)
        location = new.uniform(1, 7, 5, 2, 2).float().to(device)
        weights = new.normal(1, 7, 5, 2, 1, 2).float().to(device)
        expected = reference.deformable_aggregation(features, location, weights, shapes, starts)[0]
        (wanted,) = torch.autograd.grad(expected.square().sum(), features)
        for deterministic in (False, True):
            output = ops.deformable_aggregation(
                features, location, weights, shapes.int(), starts.int(),
                deterministic=deterministic,
            )  # fmt: skip
            torch.testing.assert_close(output, expected)
            (grad,) = torch.autograd.grad(output.square().sum(), features)
            torch.testing.assert_close(grad, wanted)
            assert not grad[0, 20:].any()

    @pytest.mark.parametrize(("size", "start"), [((4, 5), 11), ((7, 7), 0), ((4, 5), -1)])
    def test_maps_beside_the_rows(self, size: tuple[int, int], start: int, device: str) -> None:
        features = torch.ones(1, 30, 4, device=device, requires_grad=True)
        shapes = torch.tensor([[size]], device=device)
        starts = torch.tensor([[start]], device=device)
        location = torch.full((1, 1, 1, 1, 2), 0.5, device=device)
        weights = torch.ones(1, 1, 1, 1, 1, 1, device=device)

        def call() -> Tensor:
            return ops.deformable_aggregation(features, location, weights, shapes, starts)

        if device == "cpu":
            with pytest.raises(IndexError, match=f"{_OP}: spatial_shape and scale_start_index"):
                call()
            return
        output = call()
        (grad,) = torch.autograd.grad(output.sum(), features)
        assert not output.any()
        assert not grad.any()

    @given(seeds)
    def test_softmax_is_torch_softmax(self, seed: int) -> None:
        maps, location, logits = _scene(Inputs(seed))
        logits = 4 * logits
        fused = ops.deformable_aggregation(maps, location, logits, softmax=True)
        weights = logits.flatten(2, 4).softmax(2).reshape(logits.shape)
        torch.testing.assert_close(fused, ops.deformable_aggregation(maps, location, weights))

    @given(st.sampled_from([1, 2, 4]), seeds)
    def test_uniform_weights_of_constant_maps(self, levels: int, seed: int) -> None:
        """Inside, each sample of a constant is that constant; softmax keeps the unseen share."""
        new = Inputs(seed)
        maps = [torch.full((1, 2, 4, 8, 8), 3.0) for _ in range(levels)]
        location = new.uniform(1, 3, 5, 2, 2, low=0.1, high=0.9).float()
        location[:, :, :, 1] += 2
        logits = torch.zeros(1, 3, 5, 2, levels, 1)
        output = ops.deformable_aggregation(maps, location, logits, softmax=True)
        torch.testing.assert_close(output, torch.full_like(output, 1.5))

    @pytest.mark.parametrize("form", ["one", "levels"])
    def test_autocast_of_mixed_dtypes(self, form: str, device: str) -> None:
        """What is around gives each its own dtype; places lose nothing, gradients come back."""
        maps, location, weights = _scene(Inputs(8), device)
        features, *indices = ops.feature_maps_format(maps)
        given = [features] if form == "one" else [maps[0], maps[1].bfloat16()]
        leaves = [*(x.requires_grad_() for x in given), weights.bfloat16().requires_grad_()]

        def call(maps: Any, weights: Tensor) -> Tensor:
            if form == "one":
                return ops.deformable_aggregation(maps[0], location, weights, *indices)
            return ops.deformable_aggregation(maps, location, weights)

        with pytest.raises(TypeError):
            call(leaves[:-1], leaves[-1])
        wide = [x.detach().float().requires_grad_() for x in leaves]
        expected = call(wide[:-1], wide[-1])
        with torch.autocast(device, torch.bfloat16):
            output = call(leaves[:-1], leaves[-1])
        assert torch.equal(output, expected)
        assert output.dtype == torch.float32
        wanted = torch.autograd.grad(expected.sum(), wide)
        for grad, other, leaf in zip(
            torch.autograd.grad(output.sum(), leaves), wanted, leaves, strict=True
        ):
            torch.testing.assert_close(grad, other.to(leaf.dtype))

    def test_autocast_leaves_half_maps_alone(self, device: str) -> None:
        maps, location, weights = _scene(Inputs(8), device)
        maps = [level.half() for level in maps]
        expected = ops.deformable_aggregation(maps, location, weights.bfloat16().float())
        with torch.autocast(device, torch.float16):
            output = ops.deformable_aggregation(maps, location, weights.bfloat16())
        assert torch.equal(output, expected)

    def test_tangents_are_refused(self) -> None:
        """They would be left out without a word."""
        maps, location, weights = _scene(Inputs(9))
        message = rf"^{_OP}: forward-mode differentiation \(jvp\) is not implemented"
        with forward_ad.dual_level():
            expected = ops.deformable_aggregation(maps, location, weights)
            for place in range(2):
                dual = list(maps)
                dual[place] = forward_ad.make_dual(maps[place], torch.ones_like(maps[place]))
                with pytest.raises(NotImplementedError, match=message):
                    ops.deformable_aggregation(dual, location, weights)
            dual_weights = forward_ad.make_dual(weights, torch.ones_like(weights))
            with pytest.raises(NotImplementedError, match=message):
                ops.deformable_aggregation(maps, location, dual_weights)
        assert torch.equal(expected, ops.deformable_aggregation(maps, location, weights))

    def test_float64_has_no_narrower_output(self) -> None:
        maps, location, weights = _scene(Inputs(1))
        double = ([level.double() for level in maps], location, weights.double())
        with pytest.raises(ValueError, match=r"the dtype of feature_maps \(torch.float64\), or"):
            ops.deformable_aggregation(*double, output_dtype=torch.float32)
        output = ops.deformable_aggregation(*double, output_dtype=torch.float64)
        assert output.dtype == torch.float64

    @pytest.mark.parametrize("wrong", [None, 3, ["a"], [None]])
    def test_maps_that_are_no_tensors(self, wrong: Any) -> None:
        _, location, weights = _scene(Inputs(1))
        message = f"^{_OP}: feature_maps must be a tensor or a list of tensors; got"
        with pytest.raises(TypeError, match=message):
            ops.deformable_aggregation(wrong, location, weights)

    def test_groups_of_cameras_are_not_printed(self) -> None:
        maps, location, weights = _scene(Inputs(1))
        message = f"^{_OP}: feature_maps must be a tensor or a list of tensors; got a list of 2$"
        with pytest.raises(TypeError, match=message):
            ops.deformable_aggregation([maps[:2]], location, weights)  # type: ignore[list-item]

    def test_what_is_missing_has_its_public_name(self) -> None:
        maps, location, weights = _scene(Inputs(1))
        nothing: Any = None
        with pytest.raises(TypeError, match=f"^{_OP}: sampling_location must be a tensor; got"):
            ops.deformable_aggregation(maps, nothing, weights)
        with pytest.raises(TypeError, match=f"^{_OP}: weights must be a tensor; got None"):
            ops.deformable_aggregation(maps, location, nothing)
        features, shapes, starts = ops.feature_maps_format(maps)
        points = (location, weights)
        with pytest.raises(TypeError, match=f"^{_OP}: spatial_shape must be a tensor; got None"):
            ops.deformable_aggregation_function(features, nothing, starts, *points)
        with pytest.raises(TypeError, match=f"^{_OP}: scale_start_index must be a tensor; got"):
            ops.deformable_aggregation_function(features, shapes, nothing, *points)

    def test_too_many_levels(self) -> None:
        maps, location, _ = _scene(Inputs(1))
        weights = torch.ones(2, 4, 3, 2, 9, 2)
        with pytest.raises(ValueError, match=f"^{_OP}: feature_maps must have 1 to 8 levels"):
            ops.deformable_aggregation(maps[:1] * 9, location, weights)
        with pytest.raises(ValueError, match=f"^{_OP}: feature_maps must have 1 to 8 levels"):
            ops.deformable_aggregation([], location, weights)
        with pytest.raises(ValueError, match="must be left out beside a list of levels"):
            ops.deformable_aggregation(maps, location, weights, torch.zeros(2, 2, 2).long())
        with pytest.raises(TypeError, match=f"^{_OP}: spatial_shape must be a tensor; got None"):
            ops.deformable_aggregation(maps[0], location, weights)

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32])
    def test_gradients_of_a_real_scene_agree(self, precision: torch.dtype) -> None:
        """Atomics, the fixed order and the CPU, on maps of many blocks."""
        new = Inputs(7)
        sizes = [(64, 176), (32, 88), (16, 44), (8, 22)]
        maps = [new.normal(2, 6, 64, *size).to(precision) for size in sizes]
        location = new.uniform(2, 50, 13, 6, 2, low=-0.2, high=1.2).float()
        weights = new.normal(2, 50, 13, 6, 4, 8).to(precision)

        def both(device: str, deterministic: bool) -> list[Tensor]:
            given = [*maps, location, weights]
            leaves = [x.to(device).requires_grad_() for x in given]
            output = ops.deformable_aggregation(
                leaves[:4], leaves[4], leaves[5], softmax=True, deterministic=deterministic
            )
            grads = torch.autograd.grad(output.float().sum(), leaves)
            return [output.detach().cpu(), *(grad.cpu() for grad in grads)]

        expected = both("cpu", True)
        limit = 1e-4 if precision == torch.float32 else 2e-2
        for deterministic in (False, True):
            for result, other in zip(both("cuda", deterministic), expected, strict=True):
                scale = float(other.abs().max())
                torch.testing.assert_close(result, other, rtol=limit, atol=limit * scale)

    @pytest.mark.gpu
    def test_large_batch(self) -> None:
        """SparseDrive's own numbers samples with 32 bits: from 12 images on it fails."""
        location = torch.rand(16, 100, 300, 6, 2, device="cuda")
        weights = torch.rand(16, 100, 300, 6, 4, 8, device="cuda")
        sizes = [(16, 44), (8, 22), (4, 11), (2, 6)]
        features = torch.rand(16, 6 * sum(h * w for h, w in sizes), 256, device="cuda")
        levels = [torch.empty(1, 6, 1, *size, device="cuda") for size in sizes]
        _, shapes, starts = ops.feature_maps_format(levels)
        output = ops.deformable_aggregation_function(features, shapes, starts, location, weights)
        last = ops.deformable_aggregation_function(
            features[15:], shapes, starts, location[15:], weights[15:]
        )
        assert torch.equal(output[15:], last)


def _scene(new: Inputs, device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    maps = [new.normal(2, 2, 8, *size).float().to(device) for size in ((5, 7), (3, 4))]
    location = new.uniform(2, 4, 3, 2, 2, low=-0.2, high=1.2).float().to(device)
    return maps, location, new.normal(2, 4, 3, 2, 2, 2).float().to(device)


def test_reference_by_hand() -> None:
    level = torch.arange(12, dtype=torch.float64).reshape(1, 1, 1, 3, 4)
    location = torch.tensor([[0.5, 0.5], [0.125, 1 / 6], [1.0, 0.5]], dtype=torch.float64)
    weights = torch.tensor([1.0, 10.0, 1000.0], dtype=torch.float64)
    arguments = (location.reshape(1, 1, 3, 1, 2), weights.reshape(1, 1, 3, 1, 1, 1))
    output, _ = reference.deformable_aggregation([level], *arguments, None, None)
    # The middle lies between pixels 5 and 6 of the second row; then the first pixel's centre; then
    # a point on the border, which no camera sees.
    assert output.item() == pytest.approx(5.5 + 10 * 0.0)


# ---- the format ----


def _levels(new: Inputs, cameras: int, *sizes: tuple[int, int]) -> list[Tensor]:
    return [new.normal(2, cameras, 3, *size) for size in sizes]


def test_format_orders_rows_by_camera_level_and_place() -> None:
    levels = _levels(Inputs(), 2, (2, 3), (1, 2))
    features, shapes, starts = ops.feature_maps_format(levels)
    assert features.shape == (2, 16, 3)
    assert features.is_contiguous()
    assert shapes.tolist() == [[[2, 3], [1, 2]]] * 2
    assert starts.tolist() == [[0, 6], [8, 14]]
    for camera in range(2):
        for level, map in enumerate(levels):
            for y in range(map.shape[3]):
                for x in range(map.shape[4]):
                    row = int(starts[camera, level]) + y * map.shape[4] + x
                    assert torch.equal(features[:, row], map[:, camera, :, y, x])


def test_format_makes_its_indices_once() -> None:
    first = ops.feature_maps_format(_levels(Inputs(1), 3, (4, 5)))
    again = ops.feature_maps_format(_levels(Inputs(2), 3, (4, 5)))
    assert first[1] is again[1]
    assert first[2] is again[2]
    with torch.inference_mode():
        _, shapes, _ = ops.feature_maps_format(_levels(Inputs(2), 3, (5, 9)))
    assert not shapes.is_inference()


@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_format_there_and_back(cameras: int, count: int, seed: int) -> None:
    new = Inputs(seed)
    sizes = [(int(new.integers(1, high=6)) + 1, int(new.integers(1, high=6)) + 1)] * count
    levels = _levels(new, cameras, *sizes)
    (back,) = ops.feature_maps_format(ops.feature_maps_format(levels), inverse=True)
    assert len(back) == count
    assert all(torch.equal(a, b) for a, b in zip(levels, back, strict=True))


def test_format_compiles_in_both_directions() -> None:
    """In graphs of their own, and in one."""
    torch._dynamo.reset()
    options: Any = {"fullgraph": True, "backend": "eager"}
    there = torch.compile(ops.feature_maps_format, **options)
    back = torch.compile(lambda x: ops.feature_maps_format(x, inverse=True), **options)
    both = torch.compile(
        lambda x: ops.feature_maps_format(ops.feature_maps_format(x), inverse=True), **options
    )
    for extra in range(2):  # the second is compiled for any size
        groups = [
            _levels(Inputs(1), 2, (3 + extra, 5), (2, 2 + extra)),
            _levels(Inputs(2), 1, (4, 3), (2, 1)),
        ]
        for name, result in {
            "eager to compiled": back(ops.feature_maps_format(groups)),
            "compiled to eager": ops.feature_maps_format(there(groups), inverse=True),
            "one graph": both(groups),
        }.items():
            for run, levels in zip(result, groups, strict=True):
                for part, level in zip(run, levels, strict=True):
                    assert torch.equal(part, level), name


@pytest.mark.parametrize(
    ("given", "inverse", "error", "got"),
    [
        (None, False, TypeError, r"feature_maps must be a list of tensors; got None"),
        (torch.ones(2, 3), False, TypeError, r"must be a list of tensors; got a tensor \(2, 3\)"),
        ([None], False, TypeError, r"feature_maps must be tensors; got None"),
        ([[None]], False, TypeError, r"feature_maps must be tensors; got None"),
        (torch.ones(3, 2), True, TypeError, r"must be a list of tensors; got a tensor \(3, 2\)"),
        ([torch.ones(1, 4, 2)] * 2, True, ValueError, r"with inverse; got 2 items"),
        ([1, 2, 3], True, TypeError, r"features must be a tensor; got int"),
        (
            [torch.ones(1, 4, 2)] * 3,
            True,
            ValueError,
            r"spatial_shape must be integers of shape \(M, L, 2\); got float32 of .* \(1, 4, 2\)",
        ),
    ],
)
def test_format_refuses_other_forms(
    given: Any, inverse: bool, error: type[Exception], got: str
) -> None:
    with pytest.raises(error, match=f"^feature_maps_format: .*{got}$"):
        ops.feature_maps_format(given, inverse)


def test_format_of_groups_of_cameras() -> None:
    """The peer begins to count at 0 again for the second group."""
    new = Inputs(3)
    groups = [_levels(new, 2, (4, 6), (2, 3)), _levels(new, 1, (3, 3), (1, 2))]
    formatted = ops.feature_maps_format(groups)
    assert formatted[2].tolist() == [[0, 24], [30, 54], [60, 69]]
    back = ops.feature_maps_format([x.clone() for x in formatted], inverse=True)
    for group, run in zip(groups, back, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, run, strict=True))
    location, weights = new.uniform(2, 4, 5, 3, 2), new.normal(2, 4, 5, 3, 2, 1)
    whole = ops.deformable_aggregation_function(*formatted, location, weights)
    first = ops.deformable_aggregation(groups[0], location[..., :2, :], weights[:, :, :, :2])
    second = ops.deformable_aggregation(groups[1], location[..., 2:, :], weights[:, :, :, 2:])
    torch.testing.assert_close(whole, first + second)


def test_format_is_differentiable_both_ways() -> None:
    levels = [level.requires_grad_() for level in _levels(Inputs(4), 2, (2, 3), (1, 2))]
    (back,) = ops.feature_maps_format(ops.feature_maps_format(levels), inverse=True)
    grads = torch.autograd.grad([2 * x for x in back], levels, [torch.ones_like(x) for x in back])
    assert all(torch.equal(grad, torch.full_like(grad, 2)) for grad in grads)


def test_format_is_compiled_in_one_graph() -> None:
    compiled = torch.compile(ops.feature_maps_format, fullgraph=True, backend="aot_eager")
    levels = _levels(Inputs(5), 2, (2, 3), (1, 2))
    for a, b in zip(compiled(levels), ops.feature_maps_format(levels), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("argument", "error", "match"),
    [
        ([], ValueError, "at least one level; got"),
        ([torch.ones(2, 3, 4, 5)], ValueError, r"must have shape \(bs, M, C, H, W\); got"),
        ([torch.ones(1, 2, 3, 4, 5), torch.ones(1, 2, 4, 4, 5)], ValueError, "the same images"),
        ([torch.ones(1, 2, 3, 4, 5), 3], TypeError, "must be tensors; got 3"),
        ([[torch.ones(1, 2, 3, 4, 5)], []], ValueError, "the same number of levels"),
    ],
)
def test_format_refuses(argument: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"^feature_maps_format: feature_maps.*{match}"):
        ops.feature_maps_format(argument)


def test_format_refuses_rows_of_other_sizes() -> None:
    _, shapes, starts = ops.feature_maps_format(_levels(Inputs(), 2, (2, 3)))
    with pytest.raises(ValueError, match=r"^feature_maps_format: features must have shape"):
        ops.feature_maps_format([torch.ones(2, 11, 3), shapes, starts], inverse=True)


def test_format_refuses_negative_sizes() -> None:
    """Two of them have an area."""
    shapes, starts = torch.tensor([[[-2, -3]]]), torch.tensor([[0]])
    with pytest.raises(ValueError, match=r"^feature_maps_format: spatial_shape must have no size"):
        ops.feature_maps_format([torch.ones(2, 6, 3), shapes, starts], inverse=True)


# ---- the function of SparseDrive ----


def test_function_rounds_no_index() -> None:
    features, shapes, starts = ops.feature_maps_format(_levels(Inputs(), 2, (2, 3)))
    points = torch.zeros(2, 1, 1, 2, 2), torch.zeros(2, 1, 1, 2, 1, 1)
    with pytest.raises(TypeError, match=r"scale_start_index must be an int32 or int64 tensor; got"):
        ops.deformable_aggregation_function(features.float(), shapes, starts + 0.7, *points)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_function_gives_float32(dtype: torch.dtype) -> None:
    new = Inputs(8)
    formatted = ops.feature_maps_format([x.to(dtype) for x in _levels(new, 2, (4, 5), (2, 3))])
    location, weights = new.uniform(2, 3, 4, 2, 2).to(dtype), new.normal(2, 3, 4, 2, 2, 3).half()
    leaves = [formatted[0].requires_grad_(), location.requires_grad_(), weights.requires_grad_()]
    output = ops.deformable_aggregation_function(leaves[0], *formatted[1:], leaves[1], leaves[2])
    assert output.dtype == (dtype if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad(output.sum(), leaves)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    expected, _ = reference.deformable_aggregation(
        leaves[0].double(), location.double(), weights.double(), *formatted[1:]
    )
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
