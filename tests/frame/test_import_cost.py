"""What import costs with 400 operators. The number is for the report; no time is asserted."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# 200 operators of two tensors with a gradient, and their 200 backwards, in a throw-away namespace.
PROGRAM = """
    import time
    import torch
    from torch import Tensor
    from torchkiln._frame import Frame

    library = torch.library.Library("torchkiln_cost", "DEF")
    for i in range(200):
        library.define(f"op{i}(Tensor a, Tensor b, int mode=0) -> Tensor")
        arguments = "Tensor grad, Tensor a, Tensor b, int mode"
        library.define(f"_op{i}_backward({arguments}) -> (Tensor, Tensor)")

    frame = Frame("torchkiln_cost")
    wall, processor = time.perf_counter(), time.process_time()
    for i in range(200):
        def fake(a: Tensor, b: Tensor, mode: int = 0):
            return a.new_empty(a.shape)
        def fake_backward(grad: Tensor, a: Tensor, b: Tensor, mode: int):
            return a.new_empty(a.shape), b.new_empty(b.shape)
        def setup_context(ctx, inputs, output):
            *tensors, ctx.mode = inputs
            ctx.save_for_backward(*tensors)
        backward_operator = frame.operator(f"_op{i}_backward", fake=fake_backward)
        def backward(ctx, grad, call=backward_operator):
            return call(grad, *ctx.saved_tensors, ctx.mode)
        frame.operator(
            f"op{i}",
            fake=fake,
            setup_context=setup_context,
            backward=backward,
            autocast=torch.float32,
        )
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{len(list(frame))} operators register in {wall * 1e3:.1f} ms", end=", ")
    print(f"{processor * 1e3:.1f} ms of them on the processor")

    # The last one works, first as the raw operator.
    library.impl("op199", lambda a, b, mode=0: a * b, "CPU")
    library.impl("_op199_backward", lambda grad, a, b, mode: (grad * b, grad * a), "CPU")
    a, b = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    for call in (torch.ops.torchkiln_cost.op199, lambda *args: frame["op199"](*args, 0)):
        call(a, b).sum().backward()
        assert torch.equal(a.grad, b) and torch.equal(b.grad, a)
        a.grad = b.grad = None
    with torch._subclasses.FakeTensorMode():
        assert torch.ops.torchkiln_cost.op199(torch.rand(5), torch.rand(5)).shape == (5,)
    print("works")
"""


def run(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(program)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def test_400_operators_register_and_work(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(PROGRAM).stdout
    with capsys.disabled():
        sys.stdout.write("\n" + output)
    assert output.endswith("works\n")


def test_import_adds_little(capsys: pytest.CaptureFixture[str]) -> None:
    program = """
        import time
        import torch
        before = time.perf_counter()
        import torchkiln
        print(f"import torchkiln after torch: {(time.perf_counter() - before) * 1e3:.1f} ms")
    """
    output = run(program).stdout
    with capsys.disabled():
        sys.stdout.write("\n" + output)
    assert output.startswith("import torchkiln")


def test_import_opens_no_driver_compiler_or_lazy_part() -> None:
    program = """
        import subprocess, sys
        import torch
        nvrtc = lambda: "libnvrtc" in open("/proc/self/maps").read()
        opened_by_torch = nvrtc()
        started = []
        sys.addaudithook(lambda event, args: started.append(event))
        import torchkiln
        assert nvrtc() == opened_by_torch
        assert not {"subprocess.Popen", "os.fork", "os.posix_spawn"} & set(started), started
        assert not torch.cuda.is_initialized()
        names = ("compat", "nn", "reference", "testing", "tuning")
        lazy = {f"torchkiln.{name}" for name in names}
        assert not lazy & set(sys.modules), lazy & set(sys.modules)
        assert torchkiln.reference.box_iou and torchkiln.verify and torchkiln.nn
    """
    run(program)
