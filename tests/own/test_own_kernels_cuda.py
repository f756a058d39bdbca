"""A user's kernels on a real GPU, against torch."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import torchkiln
from support.machine import CLEAN, ROOT, Machine
from torchkiln import testing

pytestmark = pytest.mark.gpu

FLOATS = [torch.float32, torch.float16, torch.bfloat16]

ADD = torchkiln.Kernel(
    """
    template <int kBlockSize>
    __global__ void add(const float* x, const float* y, float* out, long long n) {
      const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
      if (i < n) out[i] = x[i] + y[i];
    }""",
    "add",
    args={"x": "in float", "y": "in float", "out": "out float", "n": "size i64"},
    tunables={"block_size": [128, 256]},
    grid=lambda p: torchkiln.ceil_div(p.n, p.block_size),
    name="test_cuda_add",
)

BIAS_GELU = torchkiln.Kernel(
    """
    #include "common/types.h"
    namespace mine {
    template <class Scalar, bool kApproximate, int kRepeat, int kVector, int kBlockSize>
    __global__ void forward(const Scalar* __restrict__ x, const Scalar* __restrict__ bias,
                            const unsigned char* __restrict__ mask, Scalar* __restrict__ out,
                            long long n, int columns, float scale) {
      const long long first = ((long long)blockIdx.x * kBlockSize + threadIdx.x) * kVector;
      for (int v = 0; v < kVector; ++v) {
        const long long i = first + v;
        if (i >= n) return;
        const float z = torchkiln::load(x[i]) + torchkiln::load(bias[i % columns]);
        float y;
        if (kApproximate) {
          y = 0.5f * z * (1.0f + tanhf(0.7978845608028654f * (z + 0.044715f * z * z * z)));
        } else {
          y = 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
        }
        torchkiln::store(out[i], mask[i] ? y * scale * kRepeat : 0.0f);
      }
    }
    }""",
    "mine::forward",
    template={"Scalar": FLOATS, "approximate": [False, True], "repeat": [1, 3]},
    tunables={"vector": [1, 2, 4], "block_size": [128, 256, 512]},
    args={
        "x": "in Scalar",
        "bias": "in Scalar",
        "mask": "in u8",
        "out": "out Scalar",
        "n": "size i64",
        "columns": "i32",
        "scale": "float",
    },
    grid=lambda p: torchkiln.ceil_div(p.n, p.block_size * p.vector),
    default=lambda p: (
        {"vector": 1, "block_size": 128} if p.n < 10_000 else {"vector": 4, "block_size": 256}
    ),
    name="test_cuda_bias_gelu",
)


def tensors(rows: int, columns: int, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    new = testing.Inputs()
    return [
        new.normal(rows, columns).to(device, dtype),
        new.normal(columns).to(device, dtype),
        (new.uniform(rows, columns) < 0.8).to(device, torch.uint8),
    ]


def expected(
    x: Tensor, bias: Tensor, mask: Tensor, scale: float, approximate: bool = False, repeat: int = 1
) -> Tensor:
    y = functional.gelu(x.double() + bias.double(), approximate="tanh" if approximate else "none")
    return (y * mask * scale * repeat).to(x.dtype)


def own(x: Tensor, bias: Tensor, mask: Tensor, scale: float, **template: Any) -> Tensor:
    out = torch.empty_like(x)
    template = {"approximate": False, "repeat": 1, **template}
    BIAS_GELU(x, bias, mask, out, x.numel(), x.shape[1], scale, **template)
    return out


def close(actual: Tensor, reference: Tensor) -> None:
    loose = {"rtol": 1.6e-2, "atol": 1e-3} if actual.dtype is torch.bfloat16 else {}
    loose = {"rtol": 2e-3, "atol": 1e-3} if actual.dtype is torch.float16 else loose
    torch.testing.assert_close(actual, reference, **loose)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 100_003])
def test_vectors_are_added(count: int) -> None:
    x, y = torch.randn(2, count, device="cuda")
    out = torch.full_like(x, torch.nan)
    ADD(x, y, out, count)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("shape", [(3, 7), (64, 1000)])
def test_template_values_and_half_types(
    dtype: torch.dtype, approximate: bool, repeat: int, shape: tuple[int, int]
) -> None:
    values = tensors(*shape, dtype)
    close(
        own(*values, 1.25, approximate=approximate, repeat=repeat),
        expected(*values, 1.25, approximate, repeat),
    )


def test_size_buckets_choose_their_default() -> None:
    before = torchkiln.statistics()["cold_launches"]
    for rows in (6, 7, 8, 200, 220, 240):
        values = tensors(rows, 100, torch.float32)
        close(own(*values, 0.5), expected(*values, 0.5))
    # 512..1023 and 16384..32767 elements: two buckets.
    assert torchkiln.statistics()["cold_launches"] - before <= 2


def test_errors_name_the_argument() -> None:
    x, bias, mask = tensors(8, 16, torch.float32)
    out = torch.empty_like(x)
    rest = (x.numel(), 16, 1.0)
    template = {"approximate": False, "repeat": 1}
    with pytest.raises(ValueError, match="x must be contiguous; got shape"):
        BIAS_GELU(x.t(), bias, mask, out, *rest, **template)
    with pytest.raises(ValueError, match="bias must be on a CUDA device; got cpu"):
        BIAS_GELU(x, bias.cpu(), mask, out, *rest, **template)
    with pytest.raises(TypeError, match=r"out must have the dtype of x \(float32\); got float16"):
        BIAS_GELU(x, bias, mask, out.half(), *rest, **template)
    with pytest.raises(TypeError, match="mask must be uint8; got bool"):
        BIAS_GELU(x, bias, mask.bool(), out, *rest, **template)
    with pytest.raises(TypeError, match="n must be an int; got Tensor"):
        BIAS_GELU(x, bias, mask, out, torch.tensor(3, device="cuda"), 16, 1.0, **template)
    with pytest.raises(ValueError, match="x must be a dense tensor"):
        BIAS_GELU(x.to_sparse(), bias, mask, out, *rest, **template)


def test_leaves_and_parameters_are_tensors() -> None:
    x = torch.nn.Parameter(torch.randn(100, device="cuda"))
    out = torch.empty(100, device="cuda")
    ADD(x, x.detach().requires_grad_(), out, 100)
    assert torch.equal(out, 2 * x)


def test_another_stream_and_another_thread() -> None:
    x, y = torch.randn(2, 1 << 20, device="cuda")
    out = torch.zeros_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    done = []

    def work() -> None:
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
            ADD(x, y, out, x.numel())
            done.append(side.query())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]  # queued behind the sleep, so on that stream
    side.synchronize()
    assert torch.equal(out, x + y)


def test_cuda_graphs_hold_it_warm_and_cold() -> None:
    cold = torchkiln.Kernel(
        """__global__ void twice(const float* x, float* out, long long n) {
             const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
             if (i < n) out[i] = 2 * x[i];
           }""",
        "twice",
        args={"x": "in float", "out": "out float", "n": "size i64"},
        grid=lambda p: torchkiln.ceil_div(p.n, 256),
        block=256,
        name="test_cuda_twice",
    )
    x, y = torch.randn(2, 1000, device="cuda")
    middle, out = torch.zeros(2, 1000, device="cuda")
    ADD(x, y, middle, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ADD(x, y, middle, 1000)
        cold(middle, out, 1000)
    middle.zero_()
    x.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, 2 * (x + y))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_decides() -> None:
    x, y = torch.randn(2, 1000, device="cuda:1")
    out = torch.zeros_like(x)
    with torch.cuda.device(0):
        ADD(x, y, out, 1000)
        assert torch.cuda.current_device() == 0
    assert torch.equal(out, x + y)
    with pytest.raises(ValueError, match=r"y must be on the device of x \(cuda:1\); got cuda:0"):
        ADD(x, y.to("cuda:0"), out, 1000)


def test_static_limits_of_the_function_are_told() -> None:
    bounded = torchkiln.Kernel(
        "__global__ void __launch_bounds__(128) f(float* out) { out[threadIdx.x] = 1; }",
        "f",
        args={"out": "out float"},
        grid=1,
        block=256,
        name="test_cuda_bounded",
    )
    out = torch.zeros(256, device="cuda")
    with pytest.raises(ValueError, match="block must have at most 128 threads"):
        bounded(out)
    assert not out.any()


# ---- the operator --------------------------------------------------------------------------------


def plain_operator(x: Tensor, bias: Tensor, mask: Tensor, scale: float) -> Tensor:
    return functional.gelu(x + bias) * mask * scale


def on_cuda(x: Tensor, bias: Tensor, mask: Tensor, scale: float) -> Tensor:
    return own(x.contiguous(), bias.contiguous(), mask.contiguous(), scale)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scale = inputs[3]


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias, mask = ctx.saved_tensors
    z = x.float() + bias.float()
    slope = 0.5 * (1 + torch.erf(z * 0.5**0.5))
    slope = slope + z * torch.exp(-0.5 * z * z) * 0.3989422804014327
    from_x = grad.float() * mask * ctx.scale * slope
    return from_x.to(x.dtype), from_x.sum(0).to(x.dtype), None, None


operator = torchkiln.library.op(
    "test_cuda::bias_gelu",
    on_cuda,
    reference=plain_operator,
    setup_context=setup_context,
    backward=backward,
    cases=[
        testing.Case(
            "typical",
            lambda new: {
                "x": new.normal(33, 65),
                "bias": new.normal(65),
                "mask": (new.uniform(33, 65) < 0.8).to(torch.uint8),
                "scale": 1.25,
            },
        )
    ],
    differentiable=["x", "bias"],
)


def test_the_operator_is_differentiable() -> None:
    x, bias, mask = tensors(9, 33, torch.float32)
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    direction = torch.randn_like(x)
    actual = torch.autograd.grad(operator(x, bias, mask, 1.5), leaves, direction)
    reference = torch.autograd.grad(plain_operator(x, bias, mask, 1.5), leaves, direction)
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_operator_compiles_with_changing_sizes() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, b, m: operator(x * 2, b, m, 0.5) + 1, backend=backend, fullgraph=True
    )
    for rows in (4, 5, 6):
        x, bias, mask = tensors(rows, 10, torch.float32)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(mask, 0)
        close(compiled(x, bias, mask), plain_operator(x * 2, bias, mask, 0.5) + 1)
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_operator_compiles_by_inductor() -> None:
    x, bias, mask = tensors(64, 128, torch.float32)
    x.requires_grad_()
    compiled = torch.compile(lambda x: operator(x.sin(), bias, mask, 0.5).sum())
    compiled(x).backward()
    actual, x.grad = x.grad, None
    plain_operator(x.sin(), bias, mask, 0.5).sum().backward()
    torch.testing.assert_close(actual, x.grad, rtol=1e-4, atol=1e-5)


def test_verify_compares_the_operator_on_the_gpu() -> None:
    results = testing.verify(["test_cuda::bias_gelu"], "cuda")
    assert [result for result in results if not result.ok] == []
    assert len(results) == 9


# ---- tuning and deployment -----------------------------------------------------------------------


def test_a_tuned_kernel_gives_the_same_and_touches_nothing_else() -> None:
    from torchkiln import _control

    values = tensors(511, 1023, torch.float32)
    copies = [value.clone() for value in values]
    state = _control.control("tune.set", {"mode": "tune"})
    before = _control.control("tune.report", {"since": 0})["next"]
    try:
        close(own(*values, 0.75), expected(*values, 0.75))
    finally:
        _control.control("tune.set", {"mode": state["mode"]})
    assert all(torch.equal(a, b) for a, b in zip(values, copies, strict=True))
    (report,) = _control.control("tune.report", {"since": before})["tuned"]
    assert report["measured"] + report["reused"] >= 4
    assert report["failed"] == []
    assert report["verified"]


PROGRAM = """
import json, sys, torch, torchkiln
sys.path.insert(0, sys.argv[1])
from test_own_kernels_cuda import ADD
x, y = torch.randn(2, 1000, device="cuda")
out = torch.zeros_like(x)
ADD(x, y, out, 1000)
assert torch.equal(out, x + y)
print(json.dumps(torchkiln.statistics()))
"""


def test_a_bundle_serves_it_where_nothing_compiles(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'tests' / 'own'}"})
    major, minor = torch.cuda.get_device_capability()
    selection = ("--ops", "test_cuda_add", "--arch", f"sm_{major}{minor}")
    imports = ("--import", str(ROOT / "tests" / "own" / "test_own_kernels_cuda.py"))
    # This file asks torch for GPUs when it is imported: not by the driver that is none.
    command = ("bundle", "create", "--out", "add.bundle")
    machine.json(*command, *selection, *imports, LD_LIBRARY_PATH="")
    environment = {
        **CLEAN,
        "PYTHONPATH": str(ROOT / "tests"),
        "TORCHKILN_BUNDLES": str(tmp_path / "add.bundle"),
        "TORCHKILN_JIT": "forbid",
        "TORCHKILN_CACHE_DIR": "/proc/nowhere",
        "TORCHKILN_NVRTC_PATH": "/nowhere",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "tests" / "own")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counters = json.loads(done.stdout)
    assert counters["hits_bundle"] == counters["launches"] == 1
    assert counters["compiles"] == 0


def test_sealed_processes_tell_what_is_missing() -> None:
    own_name = "test_cuda_sealed"
    sealed = torchkiln.Kernel(
        "__global__ void f(float* out) { *out = 1; }",
        "f",
        args={"out": "out float"},
        grid=1,
        block=1,
        name=own_name,
    )
    torchkiln.seal()
    try:
        with pytest.raises(torchkiln.errors.MissingKernelError) as error:
            sealed(torch.zeros(1, device="cuda"))
    finally:
        torchkiln.seal("allow")
    assert f"--ops {own_name}" in error.value.command
    assert "--import" in error.value.command
    sealed(out := torch.zeros(1, device="cuda"))
    assert out.item() == 1
