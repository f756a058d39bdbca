"""The drop-in for SparseDrive's and Sparse4D's `projects.mmdet3d_plugin.ops`."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchkiln import ops
from torchkiln.compat import sparsedrive
from torchkiln.testing import Inputs

_OPS = "projects.mmdet3d_plugin.ops"


@pytest.fixture
def installed() -> Iterator[None]:
    sparsedrive.install()
    yield
    sparsedrive.uninstall()


def test_without_the_project(installed: None) -> None:
    package = importlib.import_module(_OPS)
    module = importlib.import_module(f"{_OPS}.deformable_aggregation")
    assert package.deformable_aggregation is module
    assert package.CUDA_EXT_AVAILABLE is module.CUDA_EXT_AVAILABLE is True
    new = Inputs()
    maps = package.feature_maps_format([new.normal(1, 2, 8, 4, 6), new.normal(1, 2, 8, 2, 3)])
    location = new.uniform(1, 3, 5, 2, 2).requires_grad_()
    weights = new.normal(1, 3, 5, 2, 2, 4)
    output = package.deformable_aggregation_function(*maps, location, weights)
    again = module.DeformableAggregationFunction.apply(*maps, location, weights)
    assert torch.equal(output, again)
    assert torch.equal(output, ops.deformable_aggregation_function(*maps, location, weights))
    (grad,) = torch.autograd.grad(again.sum(), location)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("name", [_OPS, f"{_OPS}.deformable_aggregation"])
def test_those_who_ask_whether_it_is_there(name: str, installed: None) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.name == name
    importlib.import_module(name)
    assert importlib.util.find_spec(name) is not None


def test_the_package_knows_it(installed: None) -> None:
    """`import projects.mmdet3d_plugin.ops` sets it as any import does."""
    importlib.import_module(f"{_OPS}.deformable_aggregation")
    projects: Any = importlib.import_module("projects")
    assert projects.mmdet3d_plugin.ops.feature_maps_format is ops.feature_maps_format
    assert projects.mmdet3d_plugin.ops.deformable_aggregation.CUDA_EXT_AVAILABLE


@pytest.mark.parametrize("has_init", [False, True])
def test_inside_of_the_project(
    has_init: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own package, which cannot be imported without its extension, is not even looked at."""
    plugin = tmp_path / "projects" / "mmdet3d_plugin"
    (plugin / "ops").mkdir(parents=True)
    if has_init:
        (tmp_path / "projects" / "__init__.py").touch()
    (plugin / "__init__.py").write_text("from .blocks import DAF\n")
    (plugin / "blocks.py").write_text("from .ops import deformable_aggregation_function as DAF\n")
    (plugin / "ops" / "__init__.py").write_text("from . import deformable_aggregation_ext\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError):
        importlib.import_module("projects.mmdet3d_plugin")
    _forget()
    sparsedrive.install()
    sparsedrive.install()
    try:
        plugin_module = importlib.import_module("projects.mmdet3d_plugin")
        assert plugin_module.DAF is ops.deformable_aggregation_function
    finally:
        sparsedrive.uninstall()
        sparsedrive.uninstall()
        assert _OPS not in sys.modules
        _forget()


def test_gives_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "projects" / "mmdet3d_plugin" / "ops"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent, folder.parent.parent):
        (place / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module(_OPS)
    parent = sys.modules["projects.mmdet3d_plugin"]
    sparsedrive.install()
    assert importlib.import_module(_OPS) is not own
    assert parent.ops is sys.modules[_OPS]
    sparsedrive.uninstall()
    assert sys.modules[_OPS] is own
    assert parent.ops is own
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "projects"]:
        del sys.modules[name]
