"""mmcv.ops' pooling at rotated, curved and bordering points: arguments, and where mmcv differs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from torchkiln import ops as native
from torchkiln.compat.mmcv import ops


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


ROTATED = torch.tensor([[0, 4.0, 4, 5, 3, 0.4], [0, 3, 5, 2, 6, -2.0]], dtype=torch.float64)
BEZIERS = torch.cat([torch.zeros(3, 1).double(), 8 * numbers(3, 16, seed=1)], 1)


@pytest.mark.parametrize("clockwise", [False, True])
def test_roi_align_rotated(clockwise):
    from torchkiln.compat.mmcv._ops.roi_align_rotated import RoIAlignRotatedFunction

    input = numbers(1, 3, 8, 8).requires_grad_()
    settings = ((2, 3), 0.5, 2, False, clockwise)
    expected = native.roi_align_rotated(input, ROTATED, *settings)
    assert torch.equal(ops.roi_align_rotated(input, ROTATED, *settings), expected)
    assert torch.equal(RoIAlignRotatedFunction.apply(input, ROTATED, *settings), expected)
    module = ops.RoIAlignRotated(*settings)
    assert torch.equal(module(input, ROTATED), expected)
    assert repr(module).startswith("RoIAlignRotated(output_size=(2, 3), spatial_scale=0.5")
    module(input, ROTATED).sum().backward()
    assert input.grad is not None


def test_old_keywords_of_roi_align_rotated():
    with pytest.warns(DeprecationWarning, match="RoIAlignRotated") as warned:
        module = ops.RoIAlignRotated(out_size=2, spatial_scale=0.5, sample_num=2)
    assert [str(w.message) for w in warned] == [
        "RoIAlignRotated: out_size is deprecated; use output_size",
        "RoIAlignRotated: sample_num is deprecated; use sampling_ratio",
    ]
    input = numbers(1, 3, 8, 8)
    expected = ops.roi_align_rotated(input, ROTATED, 2, 0.5, 2)
    assert torch.equal(module(input, ROTATED), expected)


def test_riroi_align_rotated():
    from torchkiln.compat.mmcv._ops.riroi_align_rotated import RiRoIAlignRotatedFunction

    input = numbers(1, 8, 8, 8)
    settings = ((2, 3), 0.5, 2, 4, True)
    expected = native.riroi_align_rotated(input, ROTATED, *settings)
    assert torch.equal(ops.riroi_align_rotated(input, ROTATED, *settings), expected)
    assert torch.equal(RiRoIAlignRotatedFunction.apply(input, ROTATED, *settings), expected)
    module = ops.RiRoIAlignRotated(*settings)
    assert torch.equal(module(input, ROTATED), expected)
    assert (module.out_size, module.num_samples) == ((2, 3), 2)
    assert repr(module).startswith("RiRoIAlignRotated(out_size=(2, 3), spatial_scale=0.5")


@pytest.mark.parametrize("out_size", ["7", 2.0, (2, 2.5), (2,)])
def test_riroi_align_rotated_rejects_sizes(out_size):
    with pytest.raises(TypeError, match="out_size must be an integer or a tuple"):
        ops.riroi_align_rotated(numbers(1, 8, 8, 8), ROTATED, out_size, 1.0)


def test_bezier_align():
    from torchkiln.compat.mmcv._ops.bezier_align import BezierAlignFunction

    input = numbers(1, 3, 8, 8)
    settings = ((2, 3), 0.5, 2, False)
    expected = native.bezier_align(input, BEZIERS, *settings)
    assert torch.equal(ops.bezier_align(input, BEZIERS, *settings), expected)
    assert torch.equal(BezierAlignFunction.apply(input, BEZIERS, *settings), expected)
    module = ops.BezierAlign(*settings)
    assert torch.equal(module(input, BEZIERS), expected)
    assert repr(module).startswith("BezierAlign(output_size=(2, 3), spatial_scale=0.5")


def test_border_align():
    from torchkiln.compat.mmcv._ops.border_align import BorderAlignFunction

    input, boxes = numbers(1, 8, 6, 7), 5 * numbers(1, 4, 4, seed=1)
    before = boxes.clone()
    expected = native.border_align(input, boxes, 2)
    module = ops.BorderAlign(2)
    for result in (
        ops.border_align(input, boxes, 2),
        BorderAlignFunction.apply(input, boxes, 2),
        module(input, boxes),
        module(input, boxes),
    ):
        assert torch.equal(result, expected)
    assert torch.equal(boxes, before)
    assert repr(module) == "BorderAlign(pool_size=2)"


@pytest.mark.parametrize(
    ("channels", "shape"), [(8, (4, 4)), (8, (1, 4, 5)), (6, (1, 4, 4))], ids=str
)
def test_border_align_rejects(channels, shape):
    with pytest.raises(AssertionError):
        ops.border_align(numbers(1, channels, 6, 7), numbers(*shape), 2)


def test_rotated_feature_align():
    from torchkiln.compat.mmcv._ops.rotated_feature_align import RotatedFeatureAlignFunction

    features, boxes = numbers(1, 3, 4, 5), 30 * numbers(1, 4, 5, 5, seed=1)
    expected = native.rotated_feature_align(features, boxes, 0.125, 5)
    assert torch.equal(ops.rotated_feature_align(features, boxes, points=5), expected)
    result = RotatedFeatureAlignFunction.apply(features, boxes, 0.125, 5)
    assert torch.equal(result, expected)
    with pytest.raises(AssertionError, match="points must be 1 or 5; got 4"):
        ops.rotated_feature_align(features, boxes, points=4)


def test_quirk_rotated_feature_align_axes():
    """The first number of a box is its y, natively too: trained weights know it so."""
    features = torch.arange(20, dtype=torch.float64).reshape(1, 1, 4, 5)
    boxes = torch.tensor([1.0, 3, 1, 1, 0]).double().expand(1, 4, 5, 5)
    for function in (ops.rotated_feature_align, native.rotated_feature_align):
        added = function(features, boxes, 1.0) - features
        assert (added == features[0, 0, 1, 3]).all()


def test_quirk_roi_align_rotated_negative_size():
    rois = torch.tensor([[0, 4.0, 4, -2, 3, 0.1]], dtype=torch.float64)
    input = numbers(1, 3, 8, 8)
    with pytest.raises(RuntimeError, match="ROIAlignRotated must have a non-negative size"):
        ops.roi_align_rotated(input, rois, 2, 1.0)
    assert ops.roi_align_rotated(input, rois, 2, 1.0, aligned=False).all()
    assert not native.roi_align_rotated(input, rois, 2).any()


def test_quirk_riroi_align_rotated_turns():
    """Mmcv reads beside the features from a turn on."""
    input = numbers(1, 8, 8, 8)
    turn = torch.tensor([0, 0, 0, 0, 0, 6.283185307179586], dtype=torch.float64)
    expected = ops.riroi_align_rotated(input, ROTATED, 2, 1.0)
    for turns in (-3, 1, 5):
        result = ops.riroi_align_rotated(input, ROTATED + turns * turn, 2, 1.0)
        torch.testing.assert_close(result, expected)


def test_quirk_border_align_gradient_outside():
    """Mmcv adds zeros beside the gradient where the winner is outside."""
    input = torch.full((1, 4, 4, 4), -1.0, requires_grad=True)
    boxes = torch.tensor([[[-9.0, -9, 9, 9]]])
    ops.border_align(input, boxes, 2).sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))
