"""What `doctor` runs in a process of its own, on an empty cache: what breaks here breaks alone.

Prints one JSON object; everything that fails becomes a sentence in it.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from torchkiln_cli import _native


def main(targets: list[str]) -> None:
    """Compiles a small kernel for each target, runs it on each GPU, looks at torchvision."""
    facts: dict[str, Any] = {}
    try:
        _native.load_operators()
    except _native.EngineMissingError as error:
        facts["error"] = str(error)
    else:
        facts["compiles"] = [_attempt(target, _compile, target) for target in targets]
        facts["gpus"] = _gpus()
        facts["torchvision"] = _attempt("torchvision", _torchvision)
    click.echo(json.dumps(facts))


def _attempt(name: str, action: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return {"name": name, "error": None, **action(*arguments)}
    except Exception as error:
        return {"name": name, "error": str(error).splitlines()[0] if str(error) else repr(error)}


def _compile(target: str) -> dict[str, Any]:
    specializations = _native.control("expand", operators=["box_iou"], dtypes=["float32"])
    return _native.control(
        "compile", specialization=specializations["specializations"][0], target=target
    )


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
