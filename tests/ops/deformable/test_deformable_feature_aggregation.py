"""nn.DeformableFeatureAggregation and its key points, against sums written out by hand."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchkiln import backend, nn, ops
from torchkiln.testing import Inputs

_SCALES = [[0, 0, 0], [0.45, 0, 0], [-0.45, 0, 0], [0, 0.45, 0], [0, -0.45, 0], [0, 0, 0.45]]
_SCALES += [[0, 0, -0.45]]
_BOXES = {"type": "SparseBox3DKeyPointsGenerator", "num_learnable_pts": 6, "fix_scale": _SCALES}
_LINES = {
    "type": "SparsePoint3DKeyPointsGenerator",
    "num_sample": 20,
    "num_learnable_pts": 3,
    "fix_height": (0, 0.5, -0.5, 1, -1),
    "ground_height": -1.84023,
}
_SIZES = [(8, 12), (4, 6)]


def _module(**options: Any) -> nn.DeformableFeatureAggregation:
    torch.manual_seed(0)
    own = {"embed_dims": 32, "num_groups": 4, "num_levels": 2, "num_cams": 2}
    module = nn.DeformableFeatureAggregation(**{**own, "kps_generator": _BOXES, **options})
    # Weights that are all the same would hide an axis in the wrong place.
    torch.nn.init.normal_(module.weights_fc.weight, std=0.3)
    torch.nn.init.normal_(module.weights_fc.bias, std=0.3)
    return module


def _inputs(anchor_columns: int = 11, queries: int = 5) -> dict[str, Any]:
    new = Inputs(2)
    anchor = new.normal(2, queries, anchor_columns).float()
    # Two cameras that look along x and against it; x and y of the image from 0 to 24 and 16.
    forward = torch.tensor([[12.0, -10, 0, 0], [8, 0, -10, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    back = forward * torch.tensor([[-1.0, -1, 1, 1]])
    return {
        "instance_feature": new.normal(2, queries, 32).float(),
        "anchor": anchor,
        "anchor_embed": new.normal(2, queries, 32).float(),
        "feature_maps": [new.normal(2, 2, 32, *size).float() for size in _SIZES],
        "metas": {
            "projection_mat": torch.stack([forward, back]).expand(2, -1, -1, -1),
            "image_wh": torch.tensor([24.0, 16.0]).expand(2, 2, 2),
        },
    }


def _by_hand(module: nn.DeformableFeatureAggregation, given: dict[str, Any]) -> Tensor:
    """Everything in the peers' order of axes, one camera and level at a time."""
    feature, metas = given["instance_feature"], given["metas"]
    points = module.kps_generator(given["anchor"], feature)
    embedded = feature + given["anchor_embed"]
    if module.camera_encoder is not None:
        camera = module.camera_encoder(metas["projection_mat"][:, :, :3].flatten(2))
        embedded = embedded[:, :, None] + camera[:, None]
    batch, queries = feature.shape[:2]
    weights = module.weights_fc(embedded).reshape(batch, queries, -1, module.num_groups).softmax(2)
    weights = weights.reshape(batch, queries, 2, 2, module.num_pts, module.num_groups)
    total = torch.zeros(batch, queries, 32)
    for camera in range(2):
        matrix = metas["projection_mat"][:, camera]
        extended = torch.cat([points, torch.ones_like(points[..., :1])], -1)
        u, v, depth, _ = torch.einsum("bij,bqpj->bqpi", matrix, extended).unbind(-1)
        depth = depth.clamp(min=1e-5)
        place = torch.stack([u / depth / 24, v / depth / 16], -1)
        seen = ((place > 0) & (place < 1)).all(-1)
        for level, maps in enumerate(given["feature_maps"]):
            sampled = F.grid_sample(maps[:, camera], 2 * place - 1, align_corners=False)
            groups = (sampled * seen[:, None]).movedim(1, 3).unflatten(3, (module.num_groups, -1))
            total += (groups * weights[:, :, camera, level, :, :, None]).sum(2).flatten(2)
    output = module.output_proj(total)
    return output + feature if module.residual_mode == "add" else torch.cat([output, feature], -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("use_camera_embed", [False, True])
def test_matrices_keep_their_own_dtype(use_camera_embed: bool, dtype: torch.dtype) -> None:
    """They come with the data, in float32, whatever the module is converted to."""
    module, given = _module(use_camera_embed=use_camera_embed), _inputs()
    expected = module(**given)
    same = {
        name: [level.to(dtype) for level in value] if name == "feature_maps" else value.to(dtype)
        for name, value in given.items()
        if name != "metas"
    }
    output = module.to(dtype)(**same, metas=given["metas"])
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("residual_mode", ["add", "cat"])
@pytest.mark.parametrize("use_camera_embed", [False, True])
@pytest.mark.parametrize("use_deformable_func", [False, True])
def test_equals_the_sum(
    use_deformable_func: bool, use_camera_embed: bool, residual_mode: str
) -> None:
    module = _module(
        use_deformable_func=use_deformable_func,
        use_camera_embed=use_camera_embed,
        residual_mode=residual_mode,
    )
    given = _inputs()
    expected = _by_hand(module, given)
    if use_deformable_func:
        given["feature_maps"] = ops.feature_maps_format(given["feature_maps"])
    output = module(**given)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    with backend("reference"):
        torch.testing.assert_close(module(**given), expected, rtol=1e-4, atol=1e-5)
    leaves = list(module.parameters())[1:]  # not the fixed scales
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    grads = torch.autograd.grad(output.square().sum(), leaves)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-3)


def test_lines() -> None:
    module, given = _module(kps_generator=_LINES), _inputs(40)
    assert module.num_pts == 300
    points = module.kps_generator(given["anchor"], given["instance_feature"])
    learned = module.kps_generator.learnable_fc(given["instance_feature"])
    learned = learned.reshape(2, 5, 20, 5, 3, 2)
    for vertex, height, place in ((0, 0, 0), (3, 4, 1), (19, 2, 2)):
        point = points[:, :, (vertex * 5 + height) * 3 + place]
        corner = given["anchor"][..., 2 * vertex : 2 * vertex + 2]
        torch.testing.assert_close(point[..., :2], corner + learned[:, :, vertex, height, place])
        z = _LINES["fix_height"][height] + _LINES["ground_height"]  # type: ignore[index]
        torch.testing.assert_close(point[..., 2], torch.full((2, 5), z))
    torch.testing.assert_close(module(**given), _by_hand(module, given), rtol=1e-4, atol=1e-5)


def test_boxes_turn() -> None:
    generator = nn.SparseBox3DKeyPointsGenerator(8, 0, [[0.5, 0.0, 0.0], [0.0, 0.5, 0.5]])
    anchor = torch.tensor([[[1.0, 2, 3, math.log(4), math.log(6), math.log(2), 1, 0, 0, 0, 0]]])
    expected = torch.tensor([[[[1.0, 4, 3], [-2, 2, 4]]]])
    torch.testing.assert_close(generator(anchor), expected)


def test_state_of_the_peers() -> None:
    """Names and shapes that their checkpoints have."""
    module = nn.DeformableFeatureAggregation(
        256, 8, 4, 6, use_deformable_func=True, use_camera_embed=True, residual_mode="cat",
        kps_generator=_BOXES,
    )  # fmt: skip
    encoder = {"0": (256, 12), "2": (256,), "3": (256, 256), "5": (256,)}
    expected = {
        "kps_generator.fix_scale": (7, 3),
        "kps_generator.learnable_fc.weight": (18, 256),
        "kps_generator.learnable_fc.bias": (18,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
        "weights_fc.weight": (416, 256),
        "weights_fc.bias": (416,),
        **{f"camera_encoder.{i}.weight": shape for i, shape in encoder.items()},
        **{f"camera_encoder.{i}.bias": (256,) for i in encoder},
    }
    state = module.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert not module.kps_generator.fix_scale.requires_grad
    assert not module.weights_fc.weight.any()
    assert not module.output_proj.bias.any()
    without = nn.DeformableFeatureAggregation(256, 8, 4, 6, kps_generator=_BOXES)
    assert without.weights_fc.weight.shape == (8 * 6 * 4 * 13, 256)


def test_dropped_points() -> None:
    """Whole points of a camera are left out, and the others weigh more, in training only."""
    module, given = _module(attn_drop=0.5), _inputs()
    logits = Inputs(3).normal(2, 5, 2, 2, 13, 4)
    whole = logits.flatten(2, 4).softmax(2).reshape(logits.shape)
    share = module._dropped(logits) / whole
    assert torch.equal(share.amin((3, 5)), share.amax((3, 5)))
    assert set(share.round(decimals=9).unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(module(**given), module(**given))
    module.eval()
    torch.testing.assert_close(module(**given), _by_hand(module, given), rtol=1e-4, atol=1e-5)


def test_all_points_dropped() -> None:
    """As torch's dropout: zeros, no 0 / 0."""
    module, given = _module(attn_drop=1.0), _inputs()
    assert not module._dropped(Inputs(3).normal(2, 5, 2, 2, 13, 4)).any()
    expected = module.output_proj(torch.zeros(2, 5, 32)) + given["instance_feature"]
    torch.testing.assert_close(module(**given), expected)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_deformable_func", [False, True])
@pytest.mark.parametrize("attn_drop", [0.0, 0.5])
def test_autocast(half: torch.dtype, use_deformable_func: bool, attn_drop: float) -> None:
    """With maps of float32, and of the half type that a backbone under autocast gives."""
    module = _module(use_deformable_func=use_deformable_func, attn_drop=attn_drop)
    for dtype in (torch.float32, half):
        given = _inputs()
        given["feature_maps"] = [level.to(dtype) for level in given["feature_maps"]]
        plain = {**given, "feature_maps": [level.float() for level in given["feature_maps"]]}
        if use_deformable_func:
            for inputs in (given, plain):
                inputs["feature_maps"] = ops.feature_maps_format(inputs["feature_maps"])
        torch.manual_seed(1)
        expected = module(**plain)
        torch.manual_seed(1)
        with torch.autocast("cpu", half):
            output = module(**given)
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
        parameters = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(output.float().square().sum(), parameters)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("generator", [_BOXES, _LINES])
def test_places_under_autocast(half: torch.dtype, generator: dict[str, Any]) -> None:
    """Points and pixels, too large for float16, as in float32."""
    given = _inputs(11 if generator is _BOXES else 40)
    module = _module(kps_generator=generator)
    matrices, sides = given["metas"]["projection_mat"] * 1e4, given["metas"]["image_wh"]

    def places() -> Tensor:
        points = module.kps_generator(given["anchor"], given["instance_feature"])
        return module.project_points(points, matrices, sides)

    expected = places()
    with torch.autocast("cpu", half):
        result = places()
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    # Points of half types are exact; what is computed of them need not be rounded.
    points = Inputs(4).normal(2, 5, 3, 3).to(half)
    torch.testing.assert_close(
        module.project_points(points, matrices, sides),
        module.project_points(points.float(), matrices, sides),
        rtol=0, atol=0,
    )  # fmt: skip


def test_projection_in_the_peers_order() -> None:
    given = _inputs()
    points = Inputs(4).normal(2, 5, 3, 3).float()
    matrices, sides = given["metas"]["projection_mat"], given["metas"]["image_wh"]
    place = nn.DeformableFeatureAggregation.project_points(points, matrices, sides)
    assert place.shape == (2, 2, 5, 3, 2)
    point = torch.cat([points[1, 2, 0], torch.ones(1)])
    u, v, depth, _ = matrices[1, 1] @ point
    expected = torch.stack([u, v]) / max(depth, torch.tensor(1e-5)) / sides[1, 1]
    torch.testing.assert_close(place[1, 1, 2, 0], expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_groups": 5}, "num_groups must divide the 32 channels; got 5"),
        ({"residual_mode": "mul"}, 'residual_mode must be "add" or "cat"; got'),
        ({"kps_generator": None}, "kps_generator must be a module, or have a type among"),
        ({"kps_generator": {"type": "Other"}}, "got 'Other'"),
        ({"kps_generator": "Other"}, "kps_generator must be a module, .*; got 'Other'"),
        ({"num_groups": 0}, "num_groups must divide the 32 channels; got 0"),
        ({"kps_generator": {**_BOXES, "num_learnable_pts": -1}}, "must be at least 0; got -1"),
        (
            {"kps_generator": {**_BOXES, "fix_scale": [0.0, 0.0, 0.0]}},
            r"fix_scale must have shape \(points, 3\); got \(3,\)",
        ),
        ({"kps_generator": {**_LINES, "num_learnable_pts": 0}}, "must be at least 1; got 0"),
    ],
)
def test_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _module(**options)


@pytest.mark.parametrize(
    ("change", "got"),
    [(lambda levels: levels * 2, "4 items"), (lambda levels: levels[0], "Tensor")],
)
def test_levels_where_the_format_is_asked_for(change: Any, got: str) -> None:
    given = _inputs()
    given["feature_maps"] = change(given["feature_maps"])
    with pytest.raises(
        ValueError,
        match=r"feature_maps must be the three tensors of feature_maps_format with "
        rf"use_deformable_func; got {got}$",
    ):
        _module(use_deformable_func=True)(**given)


def test_refuses_a_fusion_that_is_not_built() -> None:
    with pytest.raises(TypeError, match=r"temporal_fusion_module must be a module or None; got"):
        _module(temporal_fusion_module={"type": "Fusion"})


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("anchor", lambda x: x[..., :7], r"Generator: anchor must have shape \(bs, Q, 8 or more\)"),
        ("instance_feature", lambda x: x[0], r"instance_feature must have shape \(bs, Q, 32\)"),
        ("anchor_embed", lambda x: x[..., 1:], r"anchor_embed must have .*; got \(2, 5, 31\)"),
        (
            "metas",
            lambda metas: {"projection_mat": metas["projection_mat"][:, :1]},
            r"projection_mat must have shape \(bs, 2, 4, 4\); got \(2, 1, 4, 4\)",
        ),
        (
            # Five queries and five pairs would go together.
            "metas",
            lambda metas: metas | {"image_wh": torch.ones(5, 2)},
            r"image_wh must have shape \(bs, M, 2\); got \(5, 2\)",
        ),
    ],
)
def test_wrong_shapes(name: str, change: Any, sentence: str) -> None:
    given = _inputs()
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=sentence):
        _module()(**given)


def test_lines_of_another_number_of_vertices() -> None:
    sentence = r"anchor must have shape \(bs, Q, 40\); got \(2, 5, 11\)"
    with pytest.raises(ValueError, match=sentence):
        _module(kps_generator=_LINES)(**_inputs())


def test_trains() -> None:
    """A few steps towards features of one map: the loss falls by half."""
    module, given = _module(use_camera_embed=True), _inputs(queries=8)
    goal = given["instance_feature"].roll(1, 1)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        loss = (module(**given) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
