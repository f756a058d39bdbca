"""multi_scale_deformable_attention, its fused form and its module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from support.op_suite import Failure, OpSuite
from support.strategies import seeds
from torchkiln import backend, nn, ops, reference
from torchkiln.reference.deformable import multi_scale_deformable_attention as module
from torchkiln.testing import FLOATS, Inputs

PLAIN, FUSED = module.parities()
OP = "multi_scale_deformable_attention"

# (height, width) of levels.
pyramids = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=3)


def arguments(new: Inputs, levels: list[tuple[int, int]], **options: Any) -> dict[str, Any]:
    made = module._arguments(new, levels=levels, **options)
    made.pop("deterministic")
    return made


def by_grid_sample(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Torch's own sampler: another proof of the positions and borders."""
    images, queries, heads, _, _, _ = sampling_locations.shape
    channels = value.shape[3]
    total = value.new_zeros(images, queries, heads, channels)
    levels = zip(spatial_shapes.tolist(), level_start_index.tolist(), strict=True)
    for level, ((height, width), start) in enumerate(levels):
        for head in range(heads):
            maps = value[:, start : start + height * width, head].transpose(1, 2)
            sampled = functional.grid_sample(
                maps.reshape(images, channels, height, width),
                sampling_locations[:, :, head, level] * 2 - 1,
                align_corners=False,
            )
            weight = attention_weights[:, None, :, head, level]
            total[:, :, head] += (sampled * weight).sum(-1).transpose(1, 2)
    return total.flatten(2)


class TestMultiScaleDeformableAttention(OpSuite):
    parity = PLAIN
    dynamic: ClassVar = {"sampling_locations": 1, "attention_weights": 1}
    failures = (
        Failure(
            "value_of_three_dimensions",
            {"value": lambda value: value.flatten(2)},
            ValueError,
            rf"^{OP}: value must have shape \(B, S, M, D\); got \(2, 89, 24\)$",
        ),
        Failure(
            "integers",
            {"value": lambda value: value.int()},
            TypeError,
            rf"^{OP}: value must be a floating-point tensor; got int32\. ",
        ),
        Failure(
            "shapes_of_int32",
            {"spatial_shapes": lambda shapes: shapes.int()},
            TypeError,
            rf"^{OP}: spatial_shapes must be an int64 tensor; got int32\. ",
        ),
        Failure(
            "shapes_of_three_columns",
            {"spatial_shapes": lambda shapes: torch.cat([shapes, shapes[:, :1]], 1)},
            ValueError,
            rf"^{OP}: spatial_shapes must have shape \(L, 2\); got \(3, 3\)$",
        ),
        Failure(
            "two_starts",
            {"level_start_index": lambda starts: starts[:2]},
            ValueError,
            rf"^{OP}: level_start_index must have shape \(3,\); got \(2,\)$",
        ),
        Failure(
            "other_points",
            {"attention_weights": lambda weights: weights[..., :1]},
            ValueError,
            rf"^{OP}: attention_weights must have shape \(2, 7, 3, 3, 2\); got \(2, 7, 3, 3, 1\)$",
        ),
        Failure(
            "other_heads",
            {"sampling_locations": lambda locations: locations[:, :, :2]},
            ValueError,
            rf"^{OP}: sampling_locations must have shape \(2, 7, 3, 3, 2, 2\); got",
        ),
        Failure(
            "one_coordinate",
            {"sampling_locations": lambda locations: locations[..., 0]},
            ValueError,
            rf"^{OP}: sampling_locations must have shape \(B, Q, M, L, P, 2\); got",
        ),
        Failure(
            "weights_of_another_dtype",
            {"attention_weights": lambda weights: weights.double()},
            TypeError,
            rf"^{OP}: attention_weights must have the dtype of sampling_locations \(float32\); "
            "got float64$",
        ),
        Failure(
            "places_narrower_than_the_value",
            {"sampling_locations": lambda locations: locations.half()},
            TypeError,
            rf"^{OP}: sampling_locations must have the dtype of value \(float32\); got float16$",
        ),
        Failure(
            "mask_of_bytes",
            {"padding_mask": torch.zeros(2, 89, dtype=torch.uint8)},
            TypeError,
            rf"^{OP}: padding_mask must be a bool tensor; got uint8$",
        ),
        Failure(
            "mask_of_another_size",
            {"padding_mask": torch.zeros(2, 88, dtype=torch.bool)},
            ValueError,
            rf"^{OP}: padding_mask must have shape \(2, 89\); got \(2, 88\)$",
        ),
        Failure("none", {"value": None}, TypeError, "value must be a tensor"),
    )

    @given(pyramids, seeds)
    def test_equals_grid_sample(self, levels: list[tuple[int, int]], seed: int) -> None:
        made = arguments(Inputs(seed), levels)
        output = ops.multi_scale_deformable_attention(**made)
        torch.testing.assert_close(output, by_grid_sample(**made))

    @given(pyramids, seeds)
    def test_gradient_of_the_value_keeps_the_sum(
        self, levels: list[tuple[int, int]], seed: int
    ) -> None:
        """Of points inside, whose weights add up to 1."""
        made = arguments(Inputs(seed), levels, images=1)
        # At least half a pixel from every border.
        sides = made["spatial_shapes"].flip(1)[:, None]
        inside = made["sampling_locations"].clamp(0, 1)
        made["sampling_locations"] = (inside * (sides - 1) + 0.5) / sides
        value = made["value"].requires_grad_()
        output = ops.multi_scale_deformable_attention(**made)
        direction = Inputs(seed + 1).normal(*output.shape)
        (grad,) = torch.autograd.grad(output, value, direction)
        expected = direction.view(1, 7, *value.shape[2:]).sum(1)
        torch.testing.assert_close(grad.sum(1), expected)

    @given(seeds)
    def test_levels_need_not_follow_each_other(self, seed: int) -> None:
        """A level may stand anywhere among the pixels, and share them with another one."""
        made = arguments(Inputs(seed), [(3, 4), (2, 5)], queries=5)
        made["level_start_index"] = torch.tensor([8, 0])
        leaf = made["value"].requires_grad_()
        arrays = tuple(made.values())
        output = ops.multi_scale_deformable_attention(*arrays)
        expected = reference.multi_scale_deformable_attention(*arrays)
        torch.testing.assert_close(output, expected)
        ones = torch.ones_like(output)
        grads = (torch.autograd.grad(x, leaf, ones)[0] for x in (output, expected))
        torch.testing.assert_close(*grads)

    def test_levels_without_starts_follow_each_other(self, device: str) -> None:
        made = {k: v.to(device) for k, v in arguments(Inputs(), [(3, 4), (2, 5)]).items()}
        expected = ops.multi_scale_deformable_attention(**made)
        made["level_start_index"] = None
        assert torch.equal(ops.multi_scale_deformable_attention(**made), expected)

    def test_levels_beyond_the_value(self, device: str) -> None:
        """Sizes on a GPU are not read by the host."""
        made = {k: v.to(device) for k, v in arguments(Inputs(), [(3, 4), (2, 5)]).items()}
        half = {**made, "attention_weights": made["attention_weights"].clone()}
        half["attention_weights"][:, :, :, 1] = 0
        made["spatial_shapes"] = torch.tensor([[3, 4], [2, 6]], device=device)
        if device == "cpu":
            sentence = "spatial_shapes must describe levels within the 22 pixels of value; got 2 by"
            with pytest.raises(ValueError, match=sentence):
                ops.multi_scale_deformable_attention(**made)
            return
        made["value"].requires_grad_()
        output = ops.multi_scale_deformable_attention(**made)
        torch.testing.assert_close(output, ops.multi_scale_deformable_attention(**half))
        (grad,) = torch.autograd.grad(output.sum(), made["value"])
        assert not grad[:, 12:].any()

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
    def test_places_in_float32_beside_a_half_type(self, half: torch.dtype, device: str) -> None:
        new = Inputs(2)
        made = {k: v.to(device) for k, v in arguments(new, [(40, 50), (9, 9)]).items()}
        names = ("value", "sampling_locations", "attention_weights")
        wide = {**made, **{name: made[name].float() for name in names}}
        wide["value"] = wide["value"].to(half).float().requires_grad_()
        places = [wide[name].requires_grad_() for name in names[1:]]
        expected = ops.multi_scale_deformable_attention(**wide)
        value = wide["value"].detach().to(half).requires_grad_()
        output = ops.multi_scale_deformable_attention(**{**wide, "value": value})
        assert output.dtype == half
        limit = 4 * torch.finfo(half).eps
        torch.testing.assert_close(output.float(), expected, rtol=limit, atol=limit)
        direction = Inputs(3).normal(*output.shape).to(device, half)
        grads = torch.autograd.grad(output, [value, *places], direction)
        others = torch.autograd.grad(expected, [wide["value"], *places], direction.float())
        for grad, other, dtype in zip(
            grads, others, (half, torch.float32, torch.float32), strict=True
        ):
            assert grad.dtype == dtype
            size = float(other.abs().max())
            torch.testing.assert_close(grad.float() / size, other / size, rtol=limit, atol=limit)

    @pytest.mark.parametrize("wide", ["value", "sampling_locations", "attention_weights"])
    def test_autocast_of_mixed_dtypes(self, wide: str, device: str) -> None:
        """One of the three in float32: places are never rounded to a half type."""
        made = {k: v.to(device) for k, v in arguments(Inputs(2), [(9, 8), (4, 4)]).items()}
        names = ("value", "sampling_locations", "attention_weights")
        for name in names:
            made[name] = made[name].to(torch.float32 if name == wide else torch.bfloat16)
            made[name].requires_grad_()
        with pytest.raises(TypeError):
            ops.multi_scale_deformable_attention(**made)
        expected_of = {**made, **{name: made[name].float() for name in names[1:]}}
        expected = ops.multi_scale_deformable_attention(**expected_of)
        with torch.autocast(device, torch.bfloat16):
            output = ops.multi_scale_deformable_attention(**made)
        assert output.dtype == made["value"].dtype
        assert torch.equal(output, expected)
        leaves = [made[name] for name in names]
        grads = torch.autograd.grad(output.float().sum(), leaves)
        others = torch.autograd.grad(expected.float().sum(), leaves)
        torch.testing.assert_close(grads, others)

    def test_nan_reaches_its_samples_only(self, device: str) -> None:
        """A pixel that is not a number, and points that are none."""
        made = arguments(Inputs(), [(4, 4)], images=1, heads=1)
        made = {name: tensor.to(device) for name, tensor in made.items()}
        made["value"][0, 0] = math.nan
        # Pixel (0, 0) has its centre at 1/8.
        locations = torch.full_like(made["sampling_locations"], 0.7)
        locations[0, 2] = 0.15
        locations[0, 3] = math.nan
        output = ops.multi_scale_deformable_attention(**{**made, "sampling_locations": locations})
        assert output[0].isnan().all(1).tolist() == [i == 2 for i in range(7)]
        assert not output[0, 3].any()

    def test_masked_pixels_are_not_read(self, device: str) -> None:
        made = module._masked(Inputs())
        made.pop("deterministic")
        made = {name: tensor.to(device) for name, tensor in made.items()}
        expected = ops.multi_scale_deformable_attention(**made)
        made["value"][made["padding_mask"]] = math.nan
        assert torch.equal(ops.multi_scale_deformable_attention(**made), expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", FLOATS)
    def test_both_gradients_agree(self, precision: torch.dtype) -> None:
        """That of atomics and the one that pixels gather, of few queries."""
        dtype = precision
        sizes = {**module.DECODER, "shrink": 2, "queries": 50}
        made = {
            name: value.to("cuda", dtype if value.is_floating_point() else None)
            for name, value in module.decoder(sizes).items()
        }
        value = made["value"].requires_grad_()
        grads = []
        for deterministic in (False, True):
            output = ops.multi_scale_deformable_attention(**made, deterministic=deterministic)
            direction = torch.linspace(-1, 1, output.numel(), device="cuda").to(dtype)
            grads += torch.autograd.grad(output, value, direction.view_as(output))
        limit = 1e-2 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(*grads, rtol=limit, atol=limit)


class TestMultiScaleDeformableAttentionFused(OpSuite):
    parity = FUSED
    dynamic: ClassVar = {"sampling_offsets": 1, "attention_logits": 1, "reference_points": 1}
    failures = (
        Failure(
            "references_of_three_numbers",
            {"reference_points": lambda points: torch.cat([points, points[..., :1]], -1)},
            ValueError,
            rf"^{OP}_fused: reference_points must have shape \(B, Q, L, 2\) or \(B, Q, L, 4\); got",
        ),
        Failure(
            "references_of_two_levels",
            {"reference_points": lambda points: points[:, :, :2]},
            ValueError,
            rf"^{OP}_fused: reference_points must have shape \(2, 7, 3, 2\); got \(2, 7, 2, 2\)$",
        ),
        Failure(
            "references_of_another_dtype",
            {"reference_points": lambda points: points.half()},
            TypeError,
            rf"^{OP}_fused: reference_points must have the dtype of sampling_offsets \(float32\)",
        ),
        Failure(
            "other_logits",
            {"attention_logits": lambda logits: logits[:, :6]},
            ValueError,
            rf"^{OP}_fused: attention_logits must have shape \(2, 7, 3, 3, 2\); got",
        ),
        Failure("none", {"attention_logits": None}, TypeError, "attention_logits must be a tensor"),
    )

    @pytest.mark.parametrize("numbers", [2, 4])
    def test_equals_the_plain_form(self, numbers: int, device: str) -> None:
        """Values and all gradients, the references' too, through torch's own operations."""
        new = Inputs(4)
        plain = arguments(new, [(5, 6), (3, 4)], queries=12)
        made = {k: v.to(device) for k, v in module._fused(plain, numbers).items()}
        references = made["reference_points"]
        references += new.uniform(*references.shape, low=-0.1, high=0.1).to(device)
        names = ("value", "reference_points", "sampling_offsets", "attention_logits")
        leaves = [made[name].requires_grad_() for name in names]
        output = ops.multi_scale_deformable_attention_fused(**made)
        sides = made["spatial_shapes"].flip(1)[:, None]
        center = references[:, :, None, :, None]
        offsets = made["sampling_offsets"]
        if numbers == 2:
            locations = center + offsets / sides
        else:
            locations = center[..., :2] + offsets / 2 * center[..., 2:] * 0.5
        weights = made["attention_logits"].flatten(3).softmax(-1).view(offsets.shape[:-1])
        levels = (made["spatial_shapes"], made["level_start_index"])
        expected = ops.multi_scale_deformable_attention(made["value"], *levels, locations, weights)
        torch.testing.assert_close(output, expected)
        direction = new.normal(*output.shape).to(device)
        grads = torch.autograd.grad(output, leaves, direction)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, direction))
        # Nobody asks for those of the references.
        made["reference_points"] = references.detach()
        again = ops.multi_scale_deformable_attention_fused(**made)
        others = torch.autograd.grad(again, [leaves[0], *leaves[2:]], direction)
        torch.testing.assert_close(others, (grads[0], *grads[2:]))

    def test_logits_may_be_flat(self) -> None:
        made = module._fused(module._arguments(Inputs()))
        expected = ops.multi_scale_deformable_attention_fused(**made)
        made["attention_logits"] = made["attention_logits"].flatten(3)
        assert torch.equal(ops.multi_scale_deformable_attention_fused(**made), expected)

    def test_flat_logits_of_another_number(self) -> None:
        made = module._fused(module._arguments(Inputs()))
        made["attention_logits"] = made["attention_logits"].flatten(3)[..., 1:]
        sentence = (
            rf"^{OP}_fused: attention_logits must have shape \(2, 7, 3, 3, 2\) or "
            r"\(2, 7, 3, 6\); got \(2, 7, 3, 5\)$"
        )
        with pytest.raises(ValueError, match=sentence):
            ops.multi_scale_deformable_attention_fused(**made)

    @pytest.mark.parametrize("wide", ["value", "reference_points", "attention_logits"])
    def test_autocast_of_mixed_dtypes(self, wide: str, device: str) -> None:
        plain = arguments(Inputs(2), [(9, 8), (4, 4)])
        made = {k: v.to(device) for k, v in module._fused(plain).items()}
        names = ("value", "reference_points", "sampling_offsets", "attention_logits")
        for name in names:
            made[name] = made[name].to(torch.float32 if name == wide else torch.bfloat16)
        with pytest.raises(TypeError):
            ops.multi_scale_deformable_attention_fused(**made)
        expected = ops.multi_scale_deformable_attention_fused(
            **{**made, **{name: made[name].float() for name in names[1:]}}
        )
        with torch.autocast(device, torch.bfloat16):
            output = ops.multi_scale_deformable_attention_fused(**made)
        assert output.dtype == made["value"].dtype
        assert torch.equal(output, expected)

    def test_large_logits(self, device: str) -> None:
        """The greatest one takes all; none overflows."""
        made = {k: v.to(device) for k, v in module._fused(arguments(Inputs(), [(4, 4)])).items()}
        logits = torch.full_like(made["attention_logits"], 1000.0)
        logits[..., 1] = 2000
        output = ops.multi_scale_deformable_attention_fused(**{**made, "attention_logits": logits})
        made["sampling_offsets"] = made["sampling_offsets"][..., 1:, :]
        expected = ops.multi_scale_deformable_attention_fused(
            **{**made, "attention_logits": logits[..., 1:]}
        )
        torch.testing.assert_close(output, expected)


class TestModule:
    def inputs(self, layer: nn.MultiScaleDeformableAttention) -> dict[str, Tensor]:
        new = Inputs(5)
        levels = module.levels_of(((4, 5), (2, 3)))
        return {
            "query": new.normal(2, 6, layer.embed_dims).float(),
            "reference_points": new.uniform(2, 6, 2, 2).float(),
            "value": new.normal(2, 26, layer.embed_dims).float(),
            "spatial_shapes": levels["spatial_shapes"],
        }

    def test_new_points_lie_around_the_reference(self) -> None:
        layer = nn.MultiScaleDeformableAttention(32, 8, 2, 3)
        bias = layer.sampling_offsets.bias.view(8, 2, 3, 2)
        # The first head looks to the right, the third one down; each point a pixel further.
        torch.testing.assert_close(bias[0, 1], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
        torch.testing.assert_close(bias[2, 0, 1], torch.tensor([0.0, 2]), atol=1e-6, rtol=0)
        torch.testing.assert_close(bias[1, 0, 2], torch.tensor([3.0, 3]))
        assert not layer.attention_weights.weight.any()

    def test_equals_its_parts(self) -> None:
        layer = nn.MultiScaleDeformableAttention(32, 4, 2, 3, value_dims=64)
        made = self.inputs(layer)
        mask = torch.zeros(2, 26, dtype=torch.bool)
        mask[:, 5:9] = True
        output = layer(**made, padding_mask=mask)
        value = layer.value_proj(made["value"]).masked_fill(mask[..., None], 0).view(2, 26, 4, 16)
        offsets = layer.sampling_offsets(made["query"]).view(2, 6, 4, 2, 3, 2)
        sides = made["spatial_shapes"].flip(1)[:, None]
        locations = made["reference_points"][:, :, None, :, None] + offsets / sides
        weights = layer.attention_weights(made["query"]).view(2, 6, 4, 6).softmax(-1)
        attended = ops.multi_scale_deformable_attention(
            value, made["spatial_shapes"], None, locations, weights.view(2, 6, 4, 2, 3)
        )
        torch.testing.assert_close(output, layer.output_proj(attended))
        assert repr(layer).startswith("MultiScaleDeformableAttention(\n  embed_dims=32, num_heads")

    def test_autocast(self) -> None:
        """Reference points keep their precision."""
        layer = nn.MultiScaleDeformableAttention(32, 4, 2, 3)
        made = self.inputs(layer)
        expected = layer(**made)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(**made)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)

    def test_heads_divide_the_channels(self) -> None:
        with pytest.raises(ValueError, match=r"must be a multiple of num_heads \(5\); got"):
            nn.MultiScaleDeformableAttention(32, 5)
        with pytest.raises(ValueError, match=r"must be a multiple of num_heads \(0\); got"):
            nn.MultiScaleDeformableAttention(32, 0)

    @pytest.mark.parametrize("name", ["query", "value"])
    def test_other_channels(self, name: str) -> None:
        layer = nn.MultiScaleDeformableAttention(32, 4, 2, 3)
        made = self.inputs(layer)
        made[name] = made[name][..., 1:]
        sentence = (
            rf"^MultiScaleDeformableAttention: {name} must have shape \(B, ., 32\); got \(2, "
        )
        with pytest.raises(ValueError, match=sentence):
            layer(**made)


@pytest.mark.parametrize("fused", [False, True])
def test_the_reference_of_half_types_sums_widely(fused: bool) -> None:
    """Places too: 16 bits do not tell pixels of a large level apart."""
    new = Inputs()
    value, shapes = new.normal(1, 1200, 2, 4).half(), torch.tensor([[2, 600]])
    at = [new.uniform(1, 5, 1, 2)] * fused + [new.uniform(1, 5, 2, 1, 9, 2)]
    given = [x.half() for x in (*at, new.uniform(1, 5, 2, 1, 9))]
    function = (
        ops.multi_scale_deformable_attention_fused
        if fused
        else ops.multi_scale_deformable_attention
    )
    expected = function(value.double(), shapes, None, *(x.double() for x in given))
    with backend("reference"):
        result = function(value, shapes, None, *given)
    torch.testing.assert_close(result, expected.half(), rtol=2e-3, atol=2e-3)


def test_reference_by_hand() -> None:
    value = torch.tensor([1.0, 2, 4, 8], dtype=torch.float64).view(1, 4, 1, 1)
    levels = module.levels_of(((2, 2),))
    # The middle, a centre, half a pixel beyond the corner, a pixel beyond it.
    points = [[0.5, 0.5], [0.75, 0.25], [1.0, 1.0], [1.25, 1.25]]
    locations = torch.tensor(points, dtype=torch.float64).view(1, 4, 1, 1, 1, 2)
    weights = torch.tensor([1.0, 10, 1, 1], dtype=torch.float64).view(1, 4, 1, 1, 1)
    output = reference.multi_scale_deformable_attention(value, *levels.values(), locations, weights)
    assert output.flatten().tolist() == [3.75, 20, 2, 0]
    mask = torch.tensor([[False, False, False, True]])
    output = reference.multi_scale_deformable_attention(
        value, *levels.values(), locations, weights, mask
    )
    assert output.flatten().tolist() == [1.75, 20, 0, 0]
