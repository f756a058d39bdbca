"""What `doctor` runs in a process of its own, on an empty cache: what breaks here breaks alone.

Prints one JSON object; everything that fails becomes a sentence in it.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import json
import os
import select
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from torchkiln_cli import _native

# NVRTC crashes with less than half a megabyte: a compile must not run on the caller's thread.
_SMALL_STACK = 256 * 1024
_CHILD_SECONDS = 60
# Files of the closed world that a working directory may happen to have, too.
_TRAPS = ("detection/box_iou.h", "common/types.h", "cuda_fp16.h", "stdint.h")


def main(targets: list[str]) -> None:
    """Compiles a small kernel for each target, runs it on each GPU, looks at torchvision."""
    facts: dict[str, Any] = {}
    try:
        _native.load_operators()
    except _native.EngineMissingError as error:
        facts["error"] = str(error)
    else:
        facts["nvrtc"] = _attempt("nvrtc", _native.control, "nvrtc", load=True)
        facts["compiles"] = [_attempt(target, _compile, target) for target in targets]
        facts["surroundings"] = list(_surroundings(targets[-1])) if targets else []
        facts["gpus"] = _gpus()
        facts["torchvision"] = _attempt("torchvision", _torchvision)
    click.echo(json.dumps(facts))


def _attempt(
    name: str, action: Callable[..., dict[str, Any]], *arguments: Any, **named: Any
) -> dict[str, Any]:
    try:
        return {"name": name, "error": None, **action(*arguments, **named)}
    except Exception as error:
        return {"name": name, "error": str(error).splitlines()[0] if str(error) else repr(error)}


def _compile(target: str, dtype: str = "float32") -> dict[str, Any]:
    specializations = _native.control("expand", operators=["box_iou"], dtypes=[dtype])
    return _native.control(
        "compile", specialization=specializations["specializations"][0], target=target
    )


def _surroundings(target: str) -> Iterator[dict[str, Any]]:
    """Each compiles with a dtype of its own: what is stored already would prove nothing."""
    yield _attempt("small stack", _compile_on_a_small_stack, target)
    yield _attempt("working directory with traps", _compile_among_traps, target)
    yield _attempt("forked child", _look_up_in_a_child, target)


def _compile_on_a_small_stack(target: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    before = threading.stack_size(_SMALL_STACK)
    try:
        thread = threading.Thread(
            target=lambda: rows.append(_attempt("", _compile, target, "float16"))
        )
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    _require_compiled(rows[0])
    return {"fact": f"a thread with {_SMALL_STACK // 1024} KiB got its kernel"}


def _compile_among_traps(target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="torchkiln-traps-") as folder, _working_in(folder):
        for name in _TRAPS:
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text("#error a file of the working directory was included\n")
        _require_compiled(_attempt("", _compile, target, "bfloat16"))
    return {"fact": "headers that lie there are not included"}


@contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.environ["CPATH"] = folder
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _look_up_in_a_child(target: str) -> dict[str, Any]:
    """A forked child finds what is stored, and says that it cannot compile the rest."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        stored, missing = (_attempt("", _compile, target, d) for d in ("float32", "float64"))
        os.write(writer, json.dumps([stored, missing]).encode())
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], _CHILD_SECONDS)
    if not ready:
        os.kill(child, 9)
    os.waitpid(child, 0)
    if not ready:
        raise RuntimeError(f"did not answer for {_CHILD_SECONDS} seconds")
    with os.fdopen(reader) as stream:
        stored, missing = json.loads(stream.read() or "[{}, {}]")
    if stored.get("error", "it died") is not None:
        raise RuntimeError(f"does not find a stored kernel: {stored.get('error')}")
    if missing["error"] is None:
        raise RuntimeError("compiled, although NVRTC is not safe there")
    return {"fact": "finds stored kernels, and says that it cannot compile others"}


def _require_compiled(row: dict[str, Any]) -> None:
    if row["error"] is not None:
        raise RuntimeError(row["error"])
    if row["status"] != "compiled":
        raise RuntimeError(f"nothing was compiled: {row['status']}")


def _gpus() -> list[dict[str, Any]]:
    import torch

    return [
        _attempt(f"cuda:{i} ({torch.cuda.get_device_name(i)})", _compare, i)
        for i in range(torch.cuda.device_count())
    ]


def _compare(index: int) -> dict[str, Any]:
    import torch

    import torchkiln

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(64, 2, generator=generator)
    boxes = torch.cat([corners, corners + torch.rand(64, 2, generator=generator)], dim=1)
    expected = torchkiln.ops.box_iou(boxes, boxes)
    on_gpu = boxes.to(f"cuda:{index}")
    torch.testing.assert_close(torchkiln.ops.box_iou(on_gpu, on_gpu).cpu(), expected)
    return {}


def _torchvision() -> dict[str, Any]:
    from torchkiln.compat import torchvision

    healthy = torchvision.is_healthy()
    torchvision.install()
    package = importlib.import_module("torchvision")
    return {"version": package.__version__, "healthy": healthy}


if __name__ == "__main__":
    main(sys.argv[1:])
