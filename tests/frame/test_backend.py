"""Choosing the reference: by hand, by device, by thread, inside and around torch.compile."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import torchkiln
from torchkiln._backend import choice
from torchkiln._frame import Frame, deterministic_default

NAMESPACE = "torchkiln_backend"


@pytest.fixture(scope="module")
def twice() -> Iterator[object]:
    """An operator whose reference gives another number, so that one sees what ran."""
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    frame = Frame(NAMESPACE)
    yield frame.operator("twice", fake=torch.empty_like, reference=lambda x: 20 * x)
    library._destroy()


def test_reference_and_back(twice: object) -> None:
    x = torch.ones(1)
    assert twice(x) == 2
    with torchkiln.backend("reference"):
        assert twice(x) == 20
        with torchkiln.backend("native"):
            assert twice(x) == 2
        assert twice(x) == 20
    assert twice(x) == 2


def test_one_object_can_be_entered_twice(twice: object) -> None:
    reference = torchkiln.backend("reference")
    with reference, torchkiln.backend("native"):
        with reference:
            assert twice(torch.ones(1)) == 20
        assert twice(torch.ones(1)) == 2
    assert not choice.reference


def test_restored_after_an_exception() -> None:
    with pytest.raises(KeyError), torchkiln.backend("reference"):
        raise KeyError
    assert not choice.reference


def test_other_threads_keep_their_own(twice: object) -> None:
    seen: list[Tensor] = []
    with torchkiln.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(twice(torch.ones(1))))
        thread.start()
        thread.join()
    assert seen == [2]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name must be 'native' or 'reference'; got 'cuda'"):
        torchkiln.backend("cuda")


def test_compiled_code_follows_the_choice(twice: object) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: twice(x) + 1, backend="eager", fullgraph=True)
    x = torch.ones(1)
    assert compiled(x) == 3
    with torchkiln.backend("reference"):
        assert compiled(x) == 21
    assert compiled(x) == 3
    seen: list[Tensor] = []
    thread = threading.Thread(target=lambda: seen.append(compiled(x)))
    thread.start()
    thread.join()
    assert seen == [3]


def test_choice_inside_of_compiled_code(twice: object) -> None:
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def both(x: Tensor) -> Tensor:
        with torchkiln.backend("reference"):
            y = twice(x)
        return y + twice(x)

    assert both(torch.ones(1)) == 22
    assert not choice.reference


class Elsewhere(Tensor):
    """Stands for a device that is neither a CPU nor CUDA."""

    is_cpu = is_cuda = is_meta = False


def test_other_devices_take_the_reference(twice: object) -> None:
    assert twice(torch.ones(1).as_subclass(Elsewhere)) == 20


def test_meta_tensors_take_the_fake(twice: object) -> None:
    assert twice(torch.ones(3, device="meta")).shape == (3,)


def test_reference_is_differentiable_twice() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]], dtype=torch.float64)
    with torchkiln.backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda x: torchkiln.ops.distance_box_iou(x, boxes + 0.25), boxes.requires_grad_()
        )


@pytest.mark.parametrize("mode", [False, True])
def test_deterministic_default(mode: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        assert deterministic_default(None) is mode
        assert deterministic_default(True) is True
        assert deterministic_default(False) is False
    finally:
        torch.use_deterministic_algorithms(before)
