"""mmcv.ops.multi_scale_deform_attn, and the names of Deformable DETR's extension."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import importlib.util
import math
import sys

import pytest
import torch

from torchkiln import nn
from torchkiln import ops as native
from torchkiln.compat import deformable_detr
from torchkiln.compat.mmcv import ops
from torchkiln.compat.mmcv._ops import multi_scale_deform_attn as peer
from torchkiln.reference.deformable.multi_scale_deformable_attention import _arguments, levels_of
from torchkiln.testing import Inputs

LEVELS = ((4, 5), (2, 3))
PIXELS = 26


def call(seed=0, **options):
    made = _arguments(Inputs(seed), **options)
    made.pop("deterministic")
    return list(made.values())


def layer_inputs(seed=0, dims=32, numbers=2):
    new = Inputs(seed)
    query = new.normal(2, 6, dims).float()
    references = new.uniform(2, 6, 2, numbers, low=0.2, high=0.8).float()
    value = new.normal(2, PIXELS, dims).float()
    mask = new.uniform(2, PIXELS) < 0.3
    return query, references, value, levels_of(LEVELS), mask


def copied(to, layer):
    """The same parameters, so also the same names of them."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    to.load_state_dict(layer.state_dict())
    return to


@pytest.mark.parametrize(
    "function", [peer.MultiScaleDeformableAttnFunction, deformable_detr.MSDeformAttnFunction]
)
def test_quirk_multi_scale_deformable_attention_any_batch(function):
    arguments = call()
    leaves = [arguments[i].requires_grad_() for i in (0, 3, 4)]
    expected = native.multi_scale_deformable_attention(*arguments)
    # Of two images, with a step that does not divide them: it has no effect.
    for step in (64, 1, 3):
        assert torch.equal(function.apply(*arguments, step), expected)
    grads = torch.autograd.grad(function.apply(*arguments, 64).sum(), leaves)
    others = torch.autograd.grad(expected.sum(), leaves)
    assert all(map(torch.equal, grads, others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_composition(dtype):
    arguments = call()
    arguments = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    value, shapes, _, locations, weights = arguments
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    expected = native.multi_scale_deformable_attention(*arguments)
    functions = (
        peer.multi_scale_deformable_attn_pytorch,
        deformable_detr.ms_deform_attn_core_pytorch,
    )
    for function in functions:
        for levels in (shapes, [tuple(row) for row in shapes.tolist()]):
            output = function(value, levels, locations, weights)
            torch.testing.assert_close(output, expected)
            direction = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
            grads = torch.autograd.grad(output, leaves, direction)
            others = torch.autograd.grad(expected, leaves, direction, retain_graph=True)
            torch.testing.assert_close(grads, others)


@pytest.mark.parametrize(
    ("dtype", "absolute", "relative"), [(torch.float64, 1e-18, 1e-15), (torch.float32, 1e-9, 1e-6)]
)
def test_last_place(dtype, absolute, relative, device):
    """The test of mmcv itself: about one unit in the last place of values near 0.005."""
    shapes = torch.tensor([(6, 4), (3, 2)])
    starts = torch.tensor([0, 24])
    torch.manual_seed(3)
    value, locations = torch.rand(1, 30, 2, 2) * 0.01, torch.rand(1, 2, 2, 2, 2, 2)
    weights = torch.rand(1, 2, 2, 2, 2) + 1e-5
    weights /= weights.sum((3, 4), keepdim=True)
    value, locations, weights = (x.to(dtype) for x in (value, locations, weights))
    expected = peer.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    given = (x.to(device) for x in (value, shapes, starts, locations, weights))
    result = peer.MultiScaleDeformableAttnFunction.apply(*given, 2).cpu()
    error = (result - expected).abs()
    assert error.max() < absolute
    assert (error / expected.abs()).max() < relative


@pytest.mark.parametrize("channels", [4, 30, 71, 1025])
def test_gradients_of_any_number_of_channels(channels):
    arguments = call(images=1, levels=((6, 4), (3, 2)), queries=2, heads=1, channels=channels)
    leaves = [arguments[i].requires_grad_() for i in (0, 3, 4)]
    value, shapes, starts, *rest = arguments

    def function(value, locations, weights):
        apply = peer.MultiScaleDeformableAttnFunction.apply
        return apply(value, shapes, starts, locations, weights, 2)

    assert torch.autograd.gradcheck(function, (value, *rest), fast_mode=True)
    assert all(leaf.requires_grad for leaf in leaves)


def test_quirk_multi_scale_deformable_attention_casts():
    """Mmcv casts places to the value's dtype; those of float32 beside half types stay."""
    value, shapes, starts, locations, weights = call()
    locations, weights = locations.float(), weights.float()
    apply = peer.MultiScaleDeformableAttnFunction.apply
    half = apply(value.half(), shapes, starts, locations, weights, 64)
    expected = native.multi_scale_deformable_attention(
        value.half(), shapes, starts, locations, weights
    )
    assert torch.equal(half, expected)
    wide = apply(value, shapes, starts, locations, weights, 64)
    assert wide.dtype == torch.float64
    mixed = apply(value.half(), shapes, starts, locations, weights.half(), 64)
    torch.testing.assert_close(mixed, half, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("numbers", [2, 4])
def test_layer_of_mmcv(batch_first, numbers):
    query, references, value, levels, mask = layer_inputs(numbers=numbers)
    plain = nn.MultiScaleDeformableAttention(32, 4, 2, 3)
    layer = copied(
        ops.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=batch_first, dropout=0.0), plain
    )
    position = torch.ones_like(query)
    attended = plain(query + position, references, value, **levels, padding_mask=mask)
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    options = {**levels, "reference_points": references, "key_padding_mask": mask}
    output = layer(turn(query), None, turn(value), query_pos=turn(position), **options)
    torch.testing.assert_close(turn(output), attended + query)
    identity = torch.zeros_like(turn(query))
    output = layer(turn(query), value=turn(value), identity=identity, **options)
    torch.testing.assert_close(
        turn(output), plain(query, references, value, **levels, padding_mask=mask)
    )
    with pytest.warns(DeprecationWarning, match="residual is deprecated; use identity"):
        again = layer(turn(query), value=turn(value), residual=identity, **options)
    assert torch.equal(again, output)


@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("numbers", [2, 4])
def test_layers_take_one_reference_for_all(numbers, shared):
    """Images, queries or levels: the peers add offsets to it, which repeats it."""
    query, references, value, levels, mask = layer_inputs(numbers=numbers)
    plain = nn.MultiScaleDeformableAttention(32, 4, 2, 3)
    of_mmcv = copied(ops.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True), plain).eval()
    of_detr = copied(deformable_detr.MSDeformAttn(32, 2, 4, 3), plain)
    one = references
    for dim in shared:
        one = one.narrow(dim, 0, 1)
    one = one.detach().requires_grad_()
    every = one.detach().expand(references.shape).contiguous().requires_grad_()
    results = []
    for given in (one, every):
        options = {**levels, "reference_points": given, "key_padding_mask": mask}
        outputs = (
            of_mmcv(query, value=value, identity=torch.zeros_like(query), **options),
            of_detr(query, given, value, *levels.values(), mask),
            plain(query, given, value, **levels, padding_mask=mask),
        )
        results.append(
            (outputs, torch.autograd.grad(sum(o.square().sum() for o in outputs), given))
        )
    for output, expected in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(output, expected)
    torch.testing.assert_close(results[0][1][0], results[1][1][0].sum(shared, keepdim=True))


def test_layer_of_mmcv_attends_to_itself():
    _, _, value, levels, _ = layer_inputs()
    references = torch.full((2, PIXELS, 2, 2), 0.5)
    layer = ops.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True).eval()
    assert layer(value, reference_points=references, **levels).shape == value.shape


def test_layer_of_mmcv_as_it_begins():
    layer = ops.MultiScaleDeformableAttention(32, 8, 2, 3, value_proj_ratio=0.5)
    assert layer.value_proj.weight.shape == (16, 32)
    assert layer.output_proj.weight.shape == (32, 16)
    names = (layer.embed_dims, layer.num_heads, layer.num_levels, layer.num_points)
    assert (*names, layer.im2col_step, layer.batch_first) == (32, 8, 2, 3, 64, False)
    angles = [2 * math.pi * i / 8 for i in range(8)]
    bias = layer.sampling_offsets.bias.view(8, 2, 3, 2)
    for head, angle in enumerate(angles):
        x, y = math.cos(angle), math.sin(angle)
        for point in range(3):
            step = (point + 1) / max(abs(x), abs(y))
            expected = torch.tensor([x * step, y * step]).expand(2, 2)
            torch.testing.assert_close(bias[head, :, point], expected, atol=1e-5, rtol=0)
    assert not layer.sampling_offsets.weight.any()
    torch.nn.init.ones_(layer.attention_weights.bias)
    layer.init_weights()
    assert not layer.attention_weights.bias.any()


def test_layer_of_mmcv_refuses():
    with pytest.raises(ValueError, match="embed_dims must be divisible by num_heads; got 32 and 5"):
        ops.MultiScaleDeformableAttention(32, 5)
    with pytest.warns(UserWarning, match="heads of a power of 2 of channels are faster; got 6"):
        ops.MultiScaleDeformableAttention(24, 4)
    query, _, value, levels, _ = layer_inputs()
    layer = ops.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True)
    with pytest.raises(ValueError, match="must be 2 or 4; got 3"):
        layer(query, value=value, reference_points=torch.rand(2, 6, 2, 3), **levels)


def test_quirk_multi_scale_deformable_attention_sizes():
    """The sum of the levels is that of the value; of sizes on a GPU nobody asks."""
    query, references, value, levels, _ = layer_inputs()
    layer = ops.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True)
    with pytest.raises(AssertionError):
        layer(query, value=value[:, 1:], reference_points=references, **levels)


def test_layer_is_a_module_of_mmengine():
    engine = pytest.importorskip("mmengine.model")
    layer = ops.MultiScaleDeformableAttention(32, 4)
    assert isinstance(layer, engine.BaseModule)
    assert layer.init_cfg is None


def test_layer_of_deformable_detr():
    query, references, value, levels, mask = layer_inputs()
    plain = nn.MultiScaleDeformableAttention(32, 4, 2, 3)
    layer = copied(deformable_detr.MSDeformAttn(32, 2, 4, 3), plain)
    output = layer(query, references, value, *levels.values(), mask)
    expected = plain(query, references, value, **levels, padding_mask=mask)
    torch.testing.assert_close(output, expected)
    assert (layer.d_model, layer.n_levels, layer.n_heads, layer.n_points) == (32, 2, 4, 3)
    with pytest.raises(ValueError, match="d_model must be divisible by n_heads; got 32 and 5"):
        deformable_detr.MSDeformAttn(32, n_heads=5)
    with pytest.raises(ValueError, match="must be 2 or 4; got 3"):
        layer(query, torch.rand(2, 6, 2, 3), value, *levels.values())


def test_extension_of_deformable_detr():
    name = "MultiScaleDeformableAttention"
    assert name not in sys.modules
    module = deformable_detr.install()
    try:
        assert importlib.import_module(name) is module
        assert importlib.util.find_spec(name).name == name
        deformable_detr.install()
        extension = importlib.import_module(name)
        arguments = call()
        output = extension.ms_deform_attn_forward(*arguments, 64)
        expected = native.multi_scale_deformable_attention(*arguments)
        assert torch.equal(output, expected)
        direction = torch.linspace(-1, 1, output.numel()).double().view_as(output)
        grads = extension.ms_deform_attn_backward(*arguments, direction, 64)
        leaves = [arguments[i].requires_grad_() for i in (0, 3, 4)]
        expected = native.multi_scale_deformable_attention(*arguments)
        assert all(map(torch.equal, grads, torch.autograd.grad(expected, leaves, direction)))
    finally:
        deformable_detr.uninstall()
    assert name not in sys.modules
    sys.modules[name] = sys
    try:
        with pytest.raises(RuntimeError, match="must not be imported yet"):
            deformable_detr.install()
    finally:
        del sys.modules[name]
