"""Operators made of a user's functions: what torch sees of them, on the CPU."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchkiln
from torchkiln import testing


def plain(x: Tensor, bias: Tensor, factor: float = 2.0) -> Tensor:
    return torch.tanh(x + bias) * factor


def no_gpu(x: Tensor, bias: Tensor, factor: float = 2.0) -> Tensor:
    raise AssertionError("there is no GPU here")


def on_cpu(x: Tensor, bias: Tensor, factor: float = 2.0) -> Tensor:
    return factor * torch.tanh(bias + x)


def gradient(grad: Tensor, out: Tensor, factor: float) -> Tensor:
    return grad * (factor - out * out / factor)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.factor = inputs[2]


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (out,) = ctx.saved_tensors
    from_x = biased_gradient(grad, out, ctx.factor)
    return from_x, from_x.sum(0), None


biased_gradient = torchkiln.library.op("test_own::biased_gradient", gradient, reference=gradient)
biased = torchkiln.library.op(
    "test_own::biased",
    no_gpu,
    cpu=on_cpu,
    reference=plain,
    setup_context=setup_context,
    backward=backward,
    cases=[testing.Case("typical", lambda new: {"x": new.normal(4, 3), "bias": new.normal(3)})],
    tier="A",
    differentiable=["x", "bias"],
    dtypes=[torch.float32, torch.float64],
)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    new = testing.Inputs()
    return (
        new.normal(4, 3).to(dtype).requires_grad_(),
        new.normal(3).to(dtype).requires_grad_(),
    )


def test_the_schema_is_that_of_the_annotations() -> None:
    schema = "test_own::biased(Tensor x, Tensor bias, float factor=2.) -> Tensor"
    assert str(biased.overload._schema) == schema
    assert repr(biased) == "<torchkiln operator test_own::biased>"
    assert torch.ops.test_own.biased.default is biased.overload


def test_the_cpu_takes_its_function_and_the_backend_the_reference() -> None:
    x, bias = inputs()
    assert torch.equal(biased(x, bias), on_cpu(x, bias))
    assert torch.equal(biased(x, bias=bias, factor=3.0), on_cpu(x, bias, 3.0))
    with torchkiln.backend("reference"):
        output = biased(x, bias)
    assert "TanhBackward" in str(
        output.grad_fn.next_functions
    )  # plain PyTorch, differentiated by torch


def test_gradients_are_right() -> None:
    torch.autograd.gradcheck(biased, inputs())
    torch.library.opcheck(biased.overload, inputs())


def test_it_compiles_into_one_graph_with_its_gradient() -> None:
    compiled = torch.compile(lambda x, bias: biased(x, bias), fullgraph=True, backend="aot_eager")
    x, bias = inputs()
    compiled(x, bias).sum().backward()
    y, other = inputs()
    plain(y, other).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(bias.grad, other.grad)


def test_verify_knows_it() -> None:
    results = testing.verify(["test_own::biased"])
    assert {result.dtype for result in results} == {"float32", "float64"}
    assert {result.direction for result in results} == {"forward", "gradient x", "gradient bias"}
    assert all(result.ok for result in results)


def test_without_cpu_and_reference_the_cpu_is_refused() -> None:
    lonely = torchkiln.library.op("test_own::lonely", no_gpu, fake=plain)
    with pytest.raises(NotImplementedError, match="test_own::lonely: tensors must be on a CUDA"):
        lonely(*inputs())


@pytest.mark.parametrize("name", ["biased", "a::b::c", "a::", "a.b::c"])
def test_names_have_a_namespace(name: str) -> None:
    with pytest.raises(ValueError, match=f"op: name must be like mine::bias_gelu; got {name}"):
        torchkiln.library.op(name, no_gpu)


def test_cases_need_a_reference() -> None:
    case = testing.Case("typical", lambda new: {"x": new.normal(1)})
    with pytest.raises(ValueError, match="test_own::caseless: reference must be given"):
        torchkiln.library.op("test_own::caseless", no_gpu, cases=[case])


def test_a_kernel_with_a_reference_is_verified_on_cuda_only() -> None:
    def plain_copy(x: Tensor, out: Tensor, n: int) -> None:
        out.copy_(x)

    torchkiln.Kernel(
        "__global__ void copy(const float* x, float* out, long long n) { out[0] = x[0]; }",
        "copy",
        args={"x": "in float", "out": "out float", "n": "size i64"},
        grid=1,
        block=1,
        name="test_own_copy",
        reference=plain_copy,
        cases=[
            testing.Case("typical", lambda new: {"x": new.normal(5), "out": new.normal(5), "n": 5})
        ],
    )
    parity = testing.find()["test_own_copy"]
    assert parity.devices == ("cuda",)
    assert parity.dtypes == (torch.float32,)
    arguments = testing.prepare(parity.cases[0], torch.float32, "cpu")
    (result,) = parity.oracle("test_own_copy")(**arguments)
    assert torch.equal(result, arguments["x"])
    assert not torch.equal(arguments["out"], arguments["x"])  # the case's own tensor stays
    with pytest.raises(ValueError, match="verify: device must be cuda for test_own_copy; got cpu"):
        testing.verify(["test_own_copy"])
