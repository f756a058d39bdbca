"""In every mode the public function gives what the registered operator gives, or says why not."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchkiln import nn, ops
from torchkiln._frame import Frame
from torchkiln.testing import Inputs

RAW = torch.ops.torchkiln.box_iou.default
OTHERS = Inputs(1).boxes(3).float()


def boxes() -> Tensor:
    return Inputs(0).boxes(5).float()


def loss(x: Tensor) -> Tensor:
    return ops.complete_box_iou(x, OTHERS).square().sum()


def raw_loss(x: Tensor) -> Tensor:
    return RAW(x, OTHERS, 3).square().sum()


def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = boxes().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf)
    return grad


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_eager_modes(context: Callable[[], Any], needs_grad: bool) -> None:
    x = boxes().requires_grad_(needs_grad)
    with context():
        fast, raw = ops.box_iou(x, OTHERS), RAW(x, OTHERS)
        assert torch.equal(fast, raw)
        assert fast.requires_grad == raw.requires_grad
        assert fast.is_inference() == raw.is_inference()


def test_gradients_agree() -> None:
    torch.testing.assert_close(gradient(loss), gradient(raw_loss))


def test_parameters_take_the_fast_path() -> None:
    output = ops.box_iou(torch.nn.Parameter(boxes()), OTHERS)
    assert type(output.grad_fn).__name__ == "torchkiln_box_iouBackward"


def test_only_one_side_needs_grad() -> None:
    x = boxes().requires_grad_()
    ops.box_iou(OTHERS, x).sum().backward()
    assert x.grad is not None


def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(boxes()), loss(boxes()))
    torch.testing.assert_close(gradient(compiled), gradient(loss))


@pytest.mark.parametrize("strict", [True, False])
def test_export_holds_the_operator(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.generalized_box_iou(x, OTHERS)

    program = torch.export.export(Model(), (boxes(),), strict=strict)
    assert RAW in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(boxes()), ops.generalized_box_iou(boxes(), OTHERS))


def test_symbolic_trace_holds_the_operator() -> None:
    """Of torch.fx: what stands for tensors there has no truth value."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.RoIAlign(2, 0.5, 2)

        def forward(self, x: Tensor, maps: Tensor, rois: Tensor) -> tuple[Tensor, ...]:
            return ops.box_iou(x, OTHERS), ops.nms(x, x[:, 0], 0.5), self.pool(maps, rois)

    new = Inputs(2)
    inputs = boxes(), new.normal(1, 3, 8, 8), torch.tensor([[0, 1.0, 2, 9, 11]])
    graph = torch.fx.symbolic_trace(Model())
    assert RAW in [node.target for node in graph.graph.nodes]
    assert all(map(torch.equal, graph(*inputs), Model()(*inputs)))


def test_fake_and_meta_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        fake = ops.box_iou(torch.empty(5, 4, requires_grad=True), torch.empty(2, 4))
        assert isinstance(fake, torch._subclasses.FakeTensor)
        assert fake.shape == (5, 2)
    meta = ops.box_iou(torch.empty(5, 4, device="meta"), torch.empty(2, 4, device="meta"))
    assert (meta.shape, meta.device.type) == ((5, 2), "meta")


def test_modes_see_the_operator() -> None:
    seen: list[Any] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch(), Function()):
        seen.clear()
        with mode:
            ops.box_iou(boxes(), OTHERS)
        assert RAW in seen


def test_subclass_sees_the_operator() -> None:
    class Tagged(Tensor):
        pass

    assert type(ops.box_iou(boxes().as_subclass(Tagged), OTHERS)) is Tagged


@pytest.mark.parametrize("needs_grad", [False, True])
def test_autocast(needs_grad: bool) -> None:
    x = boxes().bfloat16().requires_grad_(needs_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.box_iou(x, OTHERS)
    assert output.dtype == torch.float32
    assert torch.equal(output, ops.box_iou(x.float(), OTHERS))
    if needs_grad:
        output.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.box_iou(boxes().double(), OTHERS.double()).dtype == torch.float64


def test_func_grad() -> None:
    torch.testing.assert_close(torch.func.grad(loss)(boxes()), gradient(loss))


def test_vmap() -> None:
    batch = torch.stack([boxes(), boxes() + 1])
    expected = torch.stack([ops.box_iou(x, OTHERS) for x in batch])
    assert torch.equal(torch.vmap(ops.box_iou, (0, None))(batch, OTHERS), expected)


_ROIS = torch.tensor([[0, 1.0, 2, 6, 5], [1, 0, 0, 7, 7]])
_TURNED = torch.cat([_ROIS, torch.tensor([[0.5], [1.0]])], 1)
_BORDERS = torch.full((2, 64, 4), 3.0)
_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "roi_align": lambda x: ops.roi_align(x, _ROIS, 2),
    "roi_pool": lambda x: ops.roi_pool(x, _ROIS, 2),
    "ps_roi_pool": lambda x: ops.ps_roi_pool(x, _ROIS, 2),
    "prroi_pool": lambda x: ops.prroi_pool(x, _ROIS, 2),
    "roi_align_rotated": lambda x: ops.roi_align_rotated(x, _TURNED, 2),
    "border_align": lambda x: ops.border_align(x, _BORDERS, 2),
    "corner_pool": lambda x: ops.corner_pool(x, "left"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("name", list(_POOLS))
def test_vmap_over_maps_of_any_layout(name: str, place: int, layout: torch.memory_format) -> None:
    """A gradient inside of vmap, and one around it that nothing inside shows."""
    pool, new = _POOLS[name], Inputs(4)
    maps = [new.normal(2, 8, 8, 8).float().contiguous(memory_format=layout) for _ in range(2)]
    stacked = torch.stack(maps, place)

    def loss(x: Tensor) -> Tensor:
        return pool(x).square().sum()

    inside = torch.func.vmap(torch.func.grad(loss), in_dims=place)(stacked)
    around = torch.func.grad(lambda x: torch.func.vmap(loss, in_dims=place)(x).sum())(stacked)
    for i, each in enumerate(maps):
        leaf = each.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(inside[i], expected)
        torch.testing.assert_close(around.select(place, i), expected)


def test_vmap_of_grad_and_jacrev() -> None:
    batch = torch.stack([boxes(), boxes() + 1])
    grads = torch.vmap(torch.func.grad(loss))(batch)
    torch.testing.assert_close(grads[0], gradient(loss))
    jacobian = torch.func.jacrev(lambda x: ops.box_iou(x, OTHERS).sum(1))(boxes())
    torch.testing.assert_close(jacobian.sum(0), gradient(lambda x: ops.box_iou(x, OTHERS).sum()))


def second_derivative(x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad(grad.sum(), leaf)[0]


def forward_mode(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, torch.ones_like(x)))

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (second_derivative, "second derivatives are not implemented"),
        (torch.func.grad(lambda x: torch.func.grad(loss)(x).sum()), "second derivatives are not"),
        (lambda x: torch.func.jvp(loss, (x,), (x,)), "jvp"),
        (forward_mode(loss), "jvp"),
        (forward_mode(raw_loss), "jvp"),
    ],
    ids=["double_backward", "func_grad_grad", "func_jvp", "dual", "dual_raw"],
)
def test_what_cannot_be_is_refused(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        call(boxes())


@pytest.fixture(scope="module")
def frame() -> Iterator[Frame]:
    library = torch.library.Library("torchkiln_paths", "DEF")
    library.define("no_gradient(Tensor x) -> Tensor")
    library.define("indices(Tensor x) -> Tensor")
    library.define("positive(Tensor x) -> Tensor")
    library.define("total(Tensor[] parts) -> Tensor")
    library.impl("no_gradient", torch.sin, "CPU")
    library.impl("indices", lambda x: torch.argsort(x), "CPU")
    library.impl("total", lambda parts: torch.stack(parts).sum(0), "CPU")
    frame = Frame("torchkiln_paths")
    frame.operator("no_gradient", fake=torch.empty_like)
    frame.operator("indices", fake=lambda x: x.new_empty(x.shape, dtype=torch.int64))
    frame.operator(
        "positive", fake=lambda x: x.new_empty(torch.library.get_ctx().new_dynamic_size())
    )
    frame.operator(
        "total",
        fake=lambda parts: torch.empty_like(parts[0]),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "n", len(inputs[0])),
        backward=lambda ctx, grad: [grad] * ctx.n,
    )
    yield frame
    library._destroy()


@pytest.mark.parametrize("way", ["fast", "raw"])
def test_missing_gradient_is_refused_when_used(frame: Frame, way: str) -> None:
    operator = frame["no_gradient"]
    call = operator if way == "fast" else operator.overload
    output = call(torch.ones(2, requires_grad=True))
    with pytest.raises(NotImplementedError, match="no_gradient: a gradient is not implemented"):
        output.sum().backward()


def test_integer_results_need_no_gradient(frame: Frame) -> None:
    assert not frame["indices"](torch.rand(4, requires_grad=True)).requires_grad


def test_lists_of_tensors(frame: Frame) -> None:
    parts = [torch.rand(2, requires_grad=True) for _ in range(3)]
    frame["total"](parts).sum().backward()
    for part in parts:
        assert torch.equal(part.grad, torch.ones(2))
    with pytest.raises(NotImplementedError, match="total: takes lists of tensors"):
        torch.func.grad(lambda x: frame["total"]([x, x]).sum())(torch.rand(2))


def test_size_that_depends_on_data(frame: Frame) -> None:
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        assert frame["positive"](torch.empty(4)).dim() == 1
    with pytest.raises(RuntimeError, match="data-dependent"):
        frame["positive"](torch.empty(4, device="meta"))


def test_a_name_registers_once(frame: Frame) -> None:
    with pytest.raises(RuntimeError, match="torchkiln_paths::total is registered twice"):
        frame.operator("total", fake=torch.empty_like)
