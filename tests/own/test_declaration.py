"""Declarations that are wrong say so when they are made; no GPU and no compiler takes part."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import torchkiln

SOURCE = """
#include "common/types.h"
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) run(const Scalar* x, Scalar* out, long long n) {}
__global__ void other() {}
"""
numbers = itertools.count()


def declare(source: Any = SOURCE, entry: str = "run", **changes: Any) -> torchkiln.Kernel:
    declaration: dict[str, Any] = {
        "template": {"Scalar": [torch.float32, torch.float16]},
        "tunables": {"block_size": [128, 256]},
        "args": {"x": "in Scalar", "out": "out Scalar", "n": "size i64"},
        "grid": 1,
        "name": f"declared_{next(numbers)}",
    }
    return torchkiln.Kernel(source, entry, **{**declaration, **changes})


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "missing entry": (
        {"entry": "forward"},
        ValueError,
        "entry must be a __global__ function of the source; got forward. The source has other, run",
    ),
    "entry that is no name": ({"entry": "run<float>"}, ValueError, "entry must be a C.. name"),
    "foreign header": (
        {"source": f"#include <cuda_fp16.h>\n{SOURCE}"},
        ValueError,
        r"got <cuda_fp16.h> in user/declared_\d+.cuh\(1\).*common/types.h",
    ),
    "no header for half": (
        {"source": SOURCE.replace('#include "common/types.h"', "")},
        ValueError,
        'source must include "common/types.h"',
    ),
    "name of an operator": ({"name": "nms"}, ValueError, "name must not be that of an operator"),
    "name with a blank": ({"name": "a b"}, ValueError, "path must be a file below user/"),
    "kind": (
        {"args": {"x": "read Scalar"}},
        ValueError,
        "args must give x 'in T', .*'read Scalar'",
    ),
    "type": ({"args": {"x": "in float17"}}, ValueError, "T is one of float, half, .*, Scalar"),
    "half by value": ({"args": {"x": "in float", "a": "half"}}, ValueError, "args must give a"),
    "template type by value": (
        {"args": {"x": "in Scalar", "a": "Scalar"}},
        ValueError,
        "args must give a",
    ),
    "size that is no integer": (
        {"args": {"x": "in float", "n": "size float"}},
        ValueError,
        "args must give n .* 'size T' with an integer T",
    ),
    "no tensor": ({"args": {"n": "size i64"}}, ValueError, "args must have a tensor.* got n"),
    "mixed values": (
        {"template": {"Scalar": [torch.float32], "flag": [True, 2]}},
        TypeError,
        "template must give flag a list of dtypes, integers or bools",
    ),
    "no values": ({"tunables": {"block_size": []}}, TypeError, "tunables must give block_size a"),
    "dtype to tune": (
        {"tunables": {"block_size": [128], "type": [torch.float32]}},
        TypeError,
        "tunables must give type a list of integers or bools",
    ),
    "unknown dtype": (
        {"template": {"Scalar": [torch.complex64]}},
        TypeError,
        "template must give Scalar",
    ),
    "many points": (
        {"tunables": {"block_size": [*range(64)], "other": [*range(65)]}},
        ValueError,
        "tunables must have at most 4096 points; got 4160",
    ),
    "many parameters": (
        {"tunables": {f"t{i}": [1] for i in range(16)}, "block": 1},
        ValueError,
        "at most 16; got 17",
    ),
    "many sizes": (
        {"args": {"x": "in Scalar", **{f"n{i}": "size i64" for i in range(9)}}},
        ValueError,
        "args must have at most 8 sizes; got 9",
    ),
    "one name twice": (
        {"args": {"x": "in Scalar", "block_size": "size i64"}},
        ValueError,
        "args must have each name once; got block_size",
    ),
    "name of an argument": (
        {"args": {"x y": "in Scalar"}},
        ValueError,
        "args must have names of letters, digits and _; got x y",
    ),
    "grid": ({"grid": (1, 2, 3, 4)}, ValueError, "grid must be 1 to 3 integers"),
    "no block": ({"tunables": {}}, ValueError, "block must be given where there is no tunable"),
    "block": ({"block": "all"}, ValueError, "block must be 1 to 3 integers from 0 to 1024"),
    "shared": ({"shared": -1}, ValueError, "shared must be a number of bytes"),
    "default without a tunable": ({"default": {}}, ValueError, "default must be a dict of block"),
    "default beside the values": (
        {"default": {"block_size": 64}},
        ValueError,
        "default must take block_size from 128, 256; got 64",
    ),
    "file": ({"source": "nowhere.cuh"}, ValueError, "source must be CUDA C.. or a file that can"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_declarations_name_the_argument(case: str) -> None:
    change, kind, sentence = WRONG[case]
    with pytest.raises(kind, match=sentence):
        declare(**change)


def test_a_source_may_be_a_file_beside_the_module(tmp_path: Path) -> None:
    (tmp_path / "my_scale.cuh").write_text(f'#include "deep/step.h"\n{SOURCE}')
    (tmp_path / "step.h").write_text("// a header\n")
    headers = {"deep/step.h": tmp_path / "step.h"}
    assert declare(tmp_path / "my_scale.cuh", name=None, headers=headers).name == "my_scale"
    module = {"__file__": str(tmp_path / "module.py"), "__name__": "module"}
    (tmp_path / "other_scale.cuh").write_text(SOURCE)
    program = (
        "import torchkiln\nkernel = torchkiln.Kernel("
        "'other_scale.cuh', 'other', args={'x': 'in u8'}, grid=1, block=1)"
    )
    exec(program, module)
    assert module["kernel"].name == "other_scale"  # type: ignore[attr-defined]


def test_texts_have_names_of_their_own() -> None:
    one, same = (declare(name=None) for _ in range(2))
    other = declare(f"{SOURCE}// edited\n", name=None)
    assert one.name == same.name != other.name
    assert one.name.startswith("run_")


def test_a_name_belongs_to_one_text() -> None:
    declare(name="taken")
    declare(name="taken")  # a module that is loaded again
    with pytest.raises(ValueError, match=r"the text of user/taken\.cuh must stay the same"):
        declare(f"{SOURCE}// edited\n", name="taken")
    with pytest.raises(ValueError, match="taken: name must be another one"):
        declare(name="taken", tunables={"block": [128]}, block=1)


def test_it_shows_what_it_is() -> None:
    assert repr(declare(name="shown")) == "<torchkiln.Kernel shown: run(x, out, n)>"
