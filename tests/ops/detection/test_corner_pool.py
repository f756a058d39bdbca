"""corner_pool: four directions, ties, layouts, the module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from support.op_suite import Failure, OpSuite
from support.strategies import counts, tensors
from support.threads import threads
from torchkiln import nn, reference
from torchkiln.ops import corner_pool
from torchkiln.reference.detection.corner_pool import parity
from torchkiln.testing import Inputs

_MODES = ("top", "bottom", "left", "right")


class TestCornerPool(OpSuite):
    parity = parity()
    dynamic: ClassVar = {"input": 2}
    failures = (
        Failure(
            "integers",
            {"input": lambda x: x.long()},
            TypeError,
            r"^corner_pool: input must be a floating-point tensor; got int64",
        ),
        Failure(
            "three_dimensions",
            {"input": lambda x: x[0]},
            ValueError,
            r"^corner_pool: input must have shape \(N, C, H, W\); got \(3, 9, 12\)",
        ),
        Failure(
            "mode",
            {"mode": "up"},
            ValueError,
            r'^corner_pool: mode must be "top", "bottom", "left" or "right"; got \'up\'',
        ),
    )

    def sized(self, new: Inputs, n: int) -> Mapping[str, Any]:
        return {"input": new.normal(1, 2, n, 5), "mode": "top"}


def test_reference_by_hand() -> None:
    column = torch.tensor([2.0, 0.0, 3.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    pooled = reference.corner_pool(column.reshape(1, 1, 5, 1), 1)[0].flatten()
    assert pooled.tolist() == [2, 2, 3, 3, 3]
    # The second 3 takes over from the first one.
    (grad,) = torch.autograd.grad(pooled, column, torch.tensor([1.0, 2, 4, 8, 16]).double())
    assert grad.tolist() == [3, 0, 4, 24, 0]


@pytest.mark.parametrize("mode", _MODES)
def test_channels_last_stays(mode: str, device: str) -> None:
    image = Inputs().normal(2, 6, 9, 70).to(device, torch.float32)
    last = image.to(memory_format=torch.channels_last).requires_grad_()
    outputs = [corner_pool(x, mode) for x in (last, image.requires_grad_())]
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(outputs[0], outputs[1])
    (grad_last,) = torch.autograd.grad(outputs[0].square().sum(), last)
    (grad,) = torch.autograd.grad(outputs[1].square().sum(), image)
    assert grad_last.is_contiguous(memory_format=torch.channels_last)
    # Both sum along the same line, in runs of other lengths.
    torch.testing.assert_close(grad_last, grad)


@given(tensors(counts, counts))
def test_is_a_running_maximum(rows: Tensor) -> None:
    image = rows[None, None]
    for mode, dim in (("top", 2), ("bottom", 2), ("left", 3), ("right", 3)):
        pooled = corner_pool(image, mode)
        assert bool((pooled >= image).all())
        assert torch.equal(corner_pool(pooled, mode), pooled)
        if image.numel():
            end = 0 if mode in ("top", "left") else -1
            assert torch.equal(pooled.select(dim, end), image.amax(dim))


@given(tensors(counts, counts))
def test_gradients_keep_their_sum(rows: Tensor) -> None:
    image = rows.round()[None, None].requires_grad_()
    for mode in _MODES:
        pooled = corner_pool(image, mode)
        (grad,) = torch.autograd.grad(pooled.sum(), image)
        assert grad.sum().item() == image.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("mode", _MODES)
def test_lines_past_tiles(mode: str, dtype: torch.dtype) -> None:
    """On the CPU lines are scanned side by side, rows a tile at a time: full ones and parts."""
    new = Inputs(4)
    # Values repeat, so that there are ties.
    image = (new.normal(1, 3, 37, 300) * 8).round().to(dtype)
    image[0, 0, 3, 280] = image[0, 1, 36, 5] = torch.nan
    grad = new.normal(1, 3, 37, 300).to(dtype)
    exact = image.double().requires_grad_()
    expected, _ = reference.corner_pool(exact, _MODES.index(mode))
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    for count in (1, 3):
        leaf = image.clone().requires_grad_()
        with threads(count):
            pooled = corner_pool(leaf, mode)
            (found,) = torch.autograd.grad(pooled, leaf, grad)
        torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found, expected_grad.to(dtype))


@pytest.mark.parametrize("mode", _MODES)
def test_very_long_lines(mode: str) -> None:
    """Maxima lie many words apart."""
    along = 2 if mode in ("top", "bottom") else 3
    new, sizes = Inputs(5), [1, 1, 2, 2]
    sizes[along] = 40_000
    image = (new.normal(*sizes) * 8).round()
    grad = new.normal(*sizes).round()
    exact = image.double().requires_grad_()
    expected, _ = reference.corner_pool(exact, _MODES.index(mode))
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    leaf = image.requires_grad_()
    (found,) = torch.autograd.grad(corner_pool(leaf, mode), leaf, grad)
    torch.testing.assert_close(found.double(), expected_grad)


@pytest.mark.parametrize("mode", _MODES)
def test_gradients_stay_with_their_maximum(mode: str, device: str) -> None:
    """The CPU adds up runs of a row in vectors: what is not finite must not leave its run."""
    new = Inputs(6)
    image = new.normal(1, 2, 70, 70).to(device, torch.float32)
    grad = new.normal(1, 2, 70, 70).to(device, torch.float32)
    grad[0, 0, ::9, ::7], grad[0, 1, 1::9, 1::7] = torch.inf, torch.nan
    exact = image.double().requires_grad_()
    expected, _ = reference.corner_pool(exact, _MODES.index(mode))
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    leaf = image.requires_grad_()
    (found,) = torch.autograd.grad(corner_pool(leaf, mode), leaf, grad)
    torch.testing.assert_close(found.double(), expected_grad, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", range(4))
def test_gradient_without_kept_maxima(mode: int, layout: torch.memory_format, device: str) -> None:
    """A call of the raw operator keeps none unless it says so; the public function does."""
    image = Inputs(7).normal(2, 3, 33, 40).to(device, torch.float32)
    leaf = image.to(memory_format=layout).requires_grad_()
    pooled, maxima = torch.ops.torchkiln.corner_pool(leaf, mode)
    assert maxima.numel() == 0
    (found,) = torch.autograd.grad(pooled.square().sum(), leaf)
    (expected,) = torch.autograd.grad(corner_pool(leaf, _MODES[mode]).square().sum(), leaf)
    assert torch.equal(found, expected)


def test_maxima_by_hand() -> None:
    """One bit a place, the first place the lowest one."""
    row = torch.tensor([1.0, 3.0, 2.0, 3.0]).reshape(1, 1, 1, 4)
    kept = [torch.ops.torchkiln.corner_pool(row, mode, True)[1] for mode in (2, 3)]
    assert [words.tolist() for words in kept] == [[[[[0b1010]]]], [[[[0b1011]]]]]
    column = torch.zeros(1, 1, 40, 2)  # the later one of equal values is the maximum
    words = torch.ops.torchkiln.corner_pool(column, 1, True)[1]
    assert words.tolist() == [[[[-1, -1], [0xFF, 0xFF]]]]


def test_refuses_other_maxima() -> None:
    grad = torch.ones(1, 1, 2, 40)
    backward = torch.ops.torchkiln._corner_pool_backward_maxima
    with pytest.raises(RuntimeError, match=r"corner_pool: maxima must have shape \(1, 1, 2, 2\)"):
        backward(grad, torch.zeros(1, 1, 2, 1, dtype=torch.int32), 2, False)
    with pytest.raises(RuntimeError, match="corner_pool: maxima must be an int32 tensor"):
        backward(grad, torch.zeros(1, 1, 2, 2), 2, False)


def test_module() -> None:
    image = Inputs().normal(1, 2, 4, 5)
    module = nn.CornerPool("left")
    assert torch.equal(module(image), corner_pool(image, "left"))
    assert repr(module) == "CornerPool(mode='left')"


def test_refuses_a_list() -> None:
    with pytest.raises(ValueError, match=r"^corner_pool: mode must be .* got \['top'\]$"):
        corner_pool(torch.ones(1, 1, 2, 2), ["top"])  # type: ignore[arg-type]
