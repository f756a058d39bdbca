"""The examples in docstrings."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import torchkiln
from torchkiln.ops import detection

PARTS = (
    "torchkiln._backend",
    "torchkiln.ops.",
    "torchkiln.nn.",
    "torchkiln.testing.",
    "torchkiln.tuning",
)
MODULES = [
    info.name
    for info in pkgutil.walk_packages(torchkiln.__path__, "torchkiln.")
    if info.name.startswith(PARTS)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


DETECTION = [
    value for name, value in vars(detection).items() if callable(value) and not name.startswith("_")
]
SECTIONS = ("Args", "Returns", "Raises", "Differentiable", "Deterministic", "Autocast", "Source")


@pytest.mark.parametrize("function", DETECTION, ids=lambda function: function.__name__)
def test_docstrings_of_detection_say_everything(function: object) -> None:
    text = function.__doc__ or ""
    assert [section for section in (*SECTIONS, "Example") if f"{section}:" not in text] == []
