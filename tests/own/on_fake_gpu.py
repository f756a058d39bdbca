"""Launches from Python on a driver that runs nothing; test_launches.py runs this file."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import torchkiln
from support.lent import CPU, Lent, launches, streams
from torchkiln import errors

SOURCE = """
#include "common/types.h"
template <class Scalar, bool kApproximate, int kTaps, int kVector, int kBlockSize>
__global__ void forward(const Scalar* __restrict__ x, const Scalar* bias,
                        const unsigned char* mask, Scalar* out, long long n, float scale) {
  const long long i = (long long)blockIdx.x * kBlockSize + threadIdx.x;
  if (i < n && mask[i]) torchkiln::store(out[i], torchkiln::load(x[i]) * scale * kTaps);
}
"""
asked: list[Any] = []


def grid(p: Any) -> int:
    asked.append(p)
    return torchkiln.ceil_div(p.n, p.block_size * p.vector)


def declare(**changes: Any) -> torchkiln.Kernel:
    declaration: dict[str, Any] = {
        "template": {
            "Scalar": [torch.float32, torch.float16, torch.bfloat16],
            "approximate": [False, True],
            "taps": [3],
        },
        "tunables": {"vector": [1, 2, 4], "block_size": [128, 256]},
        "args": {
            "x": "in Scalar",
            "bias": "in Scalar",
            "mask": "in u8",
            "out": "out Scalar",
            "n": "size i64",
            "scale": "float",
        },
        "grid": grid,
        "default": {"vector": 4, "block_size": 256},
        "name": "bias_gelu",
    }
    return torchkiln.Kernel(SOURCE, "forward", **{**declaration, **changes})


kernel = declare()


def tensors(dtype: torch.dtype = torch.float32, count: int = 1000) -> dict[str, Any]:
    return {
        "x": Lent(torch.ones(count, dtype=dtype)),
        "bias": Lent(torch.ones(count, dtype=dtype)),
        "mask": Lent(torch.ones(count, dtype=torch.uint8)),
        "out": Lent(torch.ones(count, dtype=dtype)),
        "n": count,
        "scale": 0.5,
        "approximate": True,
    }


def one_launch(call: Callable[[], None]) -> dict[str, Any]:
    before = len(launches())
    call()
    found = launches()[before:]
    assert len(found) == 1
    return found[0]


def test_arguments_arrive_packed_in_order_on_the_current_stream() -> None:
    values = tensors()
    streams[0] = 0x50
    positional = [values[name] for name in ("x", "bias", "mask", "out", "n", "scale")]
    launch = one_launch(lambda: kernel(*positional, approximate=True))
    streams[0] = 0
    pointers = [values[name].tensor.data_ptr() for name in ("x", "bias", "mask", "out")]
    assert launch["args"] == struct.pack("<QQQQqf", *pointers, 1000, 0.5).hex()
    assert launch["grid"] == [1, 1, 1]
    assert launch["block"] == [256, 1, 1]
    assert launch["shared"] == 0
    assert launch["stream"] == 0x50
    # The template arguments, as the Itanium ABI spells them: float, true, 3, 4, 256.
    assert "IfLb1ELi3ELi4ELi256EE" in launch["kernel"]


def test_arguments_may_be_named() -> None:
    values = tensors(torch.bfloat16)
    assert "bfloat16ELb1E" in one_launch(lambda: kernel(**values))["kernel"]
    x, *rest = values.values()
    named = dict(zip(list(values)[1:], rest, strict=True))
    assert "bfloat16" in one_launch(lambda: kernel(x, **named))["kernel"]


def test_offset_of_a_view_counts() -> None:
    values = tensors()
    whole = torch.ones(1010)
    values["x"] = Lent(whole[10:])
    launch = one_launch(lambda: kernel(**values))
    assert launch["args"].startswith(struct.pack("<Q", whole.data_ptr() + 40).hex())
    values["x"].view.byte_offset = 8
    launch = one_launch(lambda: kernel(**values))
    assert launch["args"].startswith(struct.pack("<Q", whole.data_ptr() + 48).hex())


def test_grid_is_asked_only_when_something_changes() -> None:
    values = tensors(count=77)
    kernel(**values)
    count = len(asked)
    for _ in range(5):
        kernel(**values)
    assert len(asked) == count
    values["n"] = 76
    kernel(**values)
    assert len(asked) == count + 1
    p = asked[-1]
    assert (p.n, p.vector, p.block_size, p.Scalar, p.approximate, p.taps) == (
        *(76, 4, 256),
        *(torch.float32, True, 3),
    )
    assert (p.device.major, p.device.minor, p.device.multiprocessors) == (9, 0, 132)


def test_empty_grid_launches_nothing() -> None:
    before = len(launches())
    kernel(**tensors(count=0))
    assert len(launches()) == before


def test_sizes_choose_the_default_by_a_function() -> None:
    def default(p: Any) -> dict[str, int]:
        return {"vector": 1 if p.n % 4 else 4, "block_size": 128 if p.n < 500 else 256}

    small_or_large = declare(default=default, name="by_size")
    assert "ELi4ELi256EE" in one_launch(lambda: small_or_large(**tensors()))["kernel"]
    assert "ELi4ELi128EE" in one_launch(lambda: small_or_large(**tensors(count=100)))["kernel"]


def test_illegal_points_are_not_taken() -> None:
    def legal(p: Any) -> bool:
        return p.vector == 1

    careful = declare(
        legal=legal, default=lambda p: {"vector": 4, "block_size": 256}, name="careful"
    )
    assert "ELi1ELi" in one_launch(lambda: careful(**tensors()))["kernel"]


def test_the_first_legal_default_is_taken() -> None:
    points = [{"vector": vector, "block_size": 128} for vector in (4, 2, 1)]
    listed = declare(legal=lambda p: p.vector < 4, default=points, name="listed")
    assert "ELi2ELi128EE" in one_launch(lambda: listed(**tensors()))["kernel"]
    none = declare(legal=lambda p: False, default=points, name="never_legal")
    with pytest.raises(RuntimeError, match="no default is legal"):
        none(**tensors())


def test_legal_may_not_tell_sizes_of_a_bucket_apart() -> None:
    """The choice for 1000 serves 1001, too: unasked it would read packs that are not aligned."""
    divided = declare(
        legal=lambda p: p.vector == 1 or p.n % p.vector == 0,
        default=[{"vector": vector, "block_size": 128} for vector in (4, 1)],
        name="divided",
    )
    one_launch(lambda: divided(**tensors()))
    for _ in range(2):
        before = len(launches())
        with pytest.raises(ValueError, match=r"^divided: legal must give one answer .* n=1001\. "):
            divided(**tensors(count=1001))
        assert len(launches()) == before
    one_launch(lambda: divided(**tensors(count=996)))


def test_geometry_may_have_three_dimensions_and_shared_memory() -> None:
    wide = declare(grid=lambda p: (p.n, 2, 3), block=(32, 4), shared=lambda p: p.n * 4, name="wide")
    launch = one_launch(lambda: wide(**tensors(count=10)))
    assert launch["grid"] == [10, 2, 3]
    assert launch["block"] == [32, 4, 1]
    assert launch["shared"] == 40


def test_every_kind_of_number() -> None:
    kinds = {"a": "bool", "b": "i8", "c": "u8", "d": "i16", "e": "u16", "f": "i32", "g": "u32"}
    kinds |= {"h": "i64", "i": "u64", "j": "float", "k": "double"}
    parameters = "bool a, signed char b, unsigned char c, short d, unsigned short e, int f, "
    parameters += "unsigned g, long h, unsigned long i, float j, double k"
    source = f"__global__ void numbers(int* out, {parameters}) {{ *out = f; }}"
    numbers = torchkiln.Kernel(
        source, "numbers", args={"out": "out i32", **kinds}, grid=1, block=1, name="numbers"
    )
    out = Lent(torch.zeros(1, dtype=torch.int32))
    values = (True, -128, 255, -300, 65535, -70000, 4294967295, -(2**63), 2**62, 1.5, -2.25)
    launch = one_launch(lambda: numbers(out, *values))
    # Natural alignment, which struct's native mode has, too.
    assert launch["args"] == struct.pack("@P?bBhHiIqQfd", out.tensor.data_ptr(), *values).hex()
    one_launch(lambda: numbers(out, True, *map(numpy.int64, values[1:9]), numpy.float32(1), 2))


# ---- wrong calls ---------------------------------------------------------------------------------


class Answering:
    """Like FakeTensor: a tensor type that answers torch's calls itself."""

    __dlpack_c_exchange_api__ = Lent.__dlpack_c_exchange_api__

    @classmethod
    def __torch_dispatch__(cls) -> None: ...


def strided() -> Lent:
    return Lent(torch.ones(20, 50).t())


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"x": 1}, TypeError, "x must be a tensor; got int"),
    "None": ({"mask": None}, TypeError, "mask must be a tensor; got NoneType"),
    "a list": ({"out": [1.0]}, TypeError, "out must be a tensor; got list"),
    "a tensor of torch": (
        {"bias": torch.ones(3)},
        ValueError,
        "bias must be on a CUDA device; got cpu",
    ),
    "another device": (
        {"out": Lent(torch.ones(3), device=1)},
        ValueError,
        r"out must be on the device of x \(cuda:0\); got cuda:1",
    ),
    "an unknown device": (
        {"x": Lent(torch.ones(3), kind=10)},
        ValueError,
        "x must be on a CUDA device; got device 0 of DLPack type 10",
    ),
    "a type nobody listed": (
        {"x": Lent(torch.ones(3).double())},
        TypeError,
        "x must be of float32, float16, bfloat16; got float64",
    ),
    "a type without a name": (
        {"x": Lent(torch.ones(3, dtype=torch.complex64))},
        TypeError,
        "x must be of float32, float16, bfloat16; got complex64",
    ),
    "two types": (
        {"out": Lent(torch.ones(3).half())},
        TypeError,
        r"out must have the dtype of x \(float32\); got float16",
    ),
    "a fixed type": (
        {"mask": Lent(torch.ones(3, dtype=torch.bool))},
        TypeError,
        "mask must be uint8; got bool",
    ),
    "strides": (
        {"bias": strided()},
        ValueError,
        r"bias must be contiguous; got shape \(50, 20\) with strides \(1, 50\). Call .contig",
    ),
    "a subclass": (
        {"x": Answering()},
        TypeError,
        "x must be a tensor with memory of its own; got Answering. .*torchkiln.library.op",
    ),
    "a float for a size": ({"n": 1.5}, TypeError, "n must be an int; got float"),
    "a text for a float": ({"scale": "1"}, TypeError, "scale must be a float; got str"),
    "a tensor for a number": (
        {"n": torch.tensor(3)},
        TypeError,
        "n must be an int; got Tensor",
    ),
    "a tensor for a float": (
        {"scale": torch.tensor(3.0)},
        TypeError,
        "scale must be a float; got Tensor",
    ),
    "beyond int64": ({"n": 2**63}, ValueError, "n must be from -9223372036854775808 to 922"),
    "beyond float": ({"scale": 1e39}, ValueError, "scale must be in the range of float; got 1e"),
    "a template value of another kind": (
        {"approximate": 1},
        TypeError,
        "approximate must be a bool; got int",
    ),
    "a template value nobody listed": (
        {"taps": 4},
        ValueError,
        "taps must be among 3; got 4. Add it to template",
    ),
    "a dtype nobody listed": (
        {"Scalar": torch.float64},
        ValueError,
        "Scalar must be among float32, float16, bfloat16; got torch.float64",
    ),
    "no dtype": ({"Scalar": "float"}, TypeError, "Scalar must be a dtype .*; got str"),
    "a dtype that the tensors have not": (
        {"Scalar": torch.float16},
        TypeError,
        r"x must have the dtype of Scalar \(float16\); got float32",
    ),
    "an unknown keyword": ({"approx": True}, TypeError, "must be among x, bias, .* got approx"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_name_the_argument(case: str) -> None:
    change, kind, sentence = WRONG[case]
    before = len(launches())
    with pytest.raises(kind, match=f"^bias_gelu: .*{sentence}"):
        kernel(**{**tensors(), **change})
    assert len(launches()) == before


def test_missing_and_surplus_arguments_are_named() -> None:
    values = tensors()
    with pytest.raises(TypeError, match="bias_gelu: bias must be given"):
        kernel(values["x"])
    with pytest.raises(TypeError, match="bias_gelu: args must be at most 6 by position"):
        kernel(*values.values(), 1)
    with pytest.raises(TypeError, match="bias_gelu: x must be given once"):
        kernel(values["x"], **values)
    del values["approximate"]
    with pytest.raises(TypeError, match="bias_gelu: approximate must be given by keyword"):
        kernel(**values)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3, True, -0.0])
def test_special_floats_pass(value: float) -> None:
    launch = one_launch(lambda: kernel(**{**tensors(), "scale": value}))
    assert launch["args"].endswith(struct.pack("<f", value).hex())


def test_sizes_of_one_and_zero_have_any_stride() -> None:
    values = tensors()
    values["x"] = Lent(torch.ones(1000, 2)[:, :1].t())
    with pytest.raises(ValueError, match="x must be contiguous"):
        kernel(**values)
    values["x"] = Lent(torch.ones(1, 1000).t())
    one_launch(lambda: kernel(**values))
    values["x"] = Lent(torch.ones(0, 3).t())
    one_launch(lambda: kernel(**values))


# ---- functions of the user that fail -------------------------------------------------------------


def test_what_a_function_raises_arrives_and_nothing_is_launched() -> None:
    broken = declare(grid=lambda p: p.missing, name="broken")
    for _ in range(2):
        before = len(launches())
        with pytest.raises(AttributeError, match="missing"):
            broken(**tensors())
        assert len(launches()) == before
    one_launch(lambda: kernel(**tensors()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid": lambda p: 1.5}, "grid must be 1 to 3 integers from 0 to 2147483647; got 1.5"),
        ({"grid": lambda p: (1, 2, 3, 4)}, r"grid must be 1 to 3 .* got \(1, 2, 3, 4\)"),
        ({"grid": lambda p: -1}, "grid must be .* got -1"),
        ({"grid": 1, "block": lambda p: 2048}, "block must be .* from 0 to 1024; got 2048"),
        ({"grid": 1, "shared": lambda p: "all"}, "shared must be a number of bytes.*got 'all'"),
        ({"default": lambda p: {"vector": 4}}, "default must be a dict of vector, block_size"),
        (
            {"default": lambda p: {"vector": 3, "block_size": 128}},
            "default must take vector from 1, 2, 4; got 3",
        ),
    ],
)
def test_wrong_answers_of_functions_are_told(changes: dict[str, Any], sentence: str) -> None:
    wrong = declare(**changes, name="wrong_answers")
    with pytest.raises(ValueError, match=f"wrong_answers: {sentence}"):
        wrong(**tensors())


def test_functions_that_fail_outside_of_a_launch_are_told_too() -> None:
    declare(legal=lambda p: 1 // 0, name="illegal")
    from torchkiln import _control

    with pytest.raises(ZeroDivisionError):
        _control.control("expand", {"operators": ["illegal"]})


def test_launches_over_the_limits_name_the_rule() -> None:
    big = declare(block=(32, 32, 2), name="big")
    with pytest.raises(ValueError, match=r"block must have at most 1024 threads.* \(32x32x2\)"):
        big(**tensors())
    hungry = declare(shared=400_000, name="hungry")
    with pytest.raises(ValueError, match=r"shared must be at most 232448 bytes.* got 400000"):
        hungry(**tensors())


def test_a_source_that_does_not_compile_is_told_in_full() -> None:
    typo = torchkiln.Kernel(
        "__global__ void f(float* x) { x[0] = undeclared; }",
        "f",
        args={"x": "out float"},
        grid=1,
        block=1,
        name="typo",
    )
    for _ in range(2):
        with pytest.raises(errors.KernelCompileError, match=r"user/typo.cuh\(1\)") as error:
            typo(Lent(torch.ones(1)))
        assert "undeclared" in error.value.log


def test_a_signature_that_is_not_that_of_args_names_the_argument() -> None:
    wrong = declare(
        args={
            "x": "in Scalar",
            "bias": "in Scalar",
            "mask": "in i32",
            "out": "out Scalar",
            "n": "size i64",
            "scale": "float",
        },
        name="signature",
    )
    values = tensors()
    values["mask"] = Lent(torch.ones(1000, dtype=torch.int32))
    with pytest.raises(errors.KernelCompileError, match="as args says of mask"):
        wrong(**values)


# ---- the process ---------------------------------------------------------------------------------


def test_the_quick_way_to_call_is_there() -> None:
    vectorcall = 1 << 11
    assert torchkiln.Kernel.__flags__ & vectorcall
    assert callable(kernel)


def test_other_threads_run_while_a_kernel_compiles() -> None:
    slow = declare(name="slow")
    stop, ticks = threading.Event(), [0]

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks[0]
    slow(**tensors())  # a compile of some ten milliseconds
    during = ticks[0] - before
    stop.set()
    thread.join()
    assert during > 0


def test_threads_share_a_kernel() -> None:
    shared = declare(name="shared_by_threads")
    before = len(launches())
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for count in range(100, 120):
                shared(**tensors(count=count))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(launches()) - before == 160


def test_a_launch_keeps_no_reference() -> None:
    values = tensors()
    kernel(**values)
    before = [sys.getrefcount(value) for value in values.values()]
    for _ in range(50):
        kernel(**values)
    with pytest.raises(TypeError):
        kernel(**{**values, "scale": "x"})
    assert [sys.getrefcount(value) for value in values.values()] == before


def test_the_second_device_is_entered_and_left() -> None:
    values = {
        name: Lent(value.tensor, device=1) if isinstance(value, Lent) else value
        for name, value in tensors().items()
    }
    streams[1] = 0x60
    assert one_launch(lambda: kernel(**values))["stream"] == 0x60
    assert one_launch(lambda: kernel(**tensors()))["stream"] == 0


def test_cpu_tables_are_told_apart() -> None:
    with pytest.raises(ValueError, match="x must be on a CUDA device; got cpu"):
        kernel(**{**tensors(), "x": Lent(torch.ones(3), kind=CPU)})


def test_tuning_measures_on_copies() -> None:
    # The fake GPU is as quick for every point: the default stays, and the launch itself happens.
    tuned = declare(name="tuned")
    from torchkiln import _control

    memory = {}

    def allocate(size: int, device: int) -> tuple[object, int]:
        block = torch.empty(size, dtype=torch.uint8)
        memory[block.data_ptr()] = size
        return block, block.data_ptr()

    _control.set_allocator(allocate)
    state = _control.control("tune.set", {"mode": "tune"})
    try:
        values = tensors()
        before = len(launches())
        tuned(**values)
        found = launches()[before:]
    finally:
        _control.control("tune.set", {"mode": state["mode"]})
    own = struct.pack("<Q", values["out"].tensor.data_ptr()).hex()
    on_own_memory = [launch for launch in found if own in launch["args"]]
    assert len(on_own_memory) == 1
    assert len(found) > 10
    assert 4000 in memory.values()
    report = _control.control("tune.report", {"since": 0})["tuned"][-1]
    assert report["points"] == 6
    assert report["failed"] == []
    assert report["verified"]
