"""The examples in docstrings."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import torchkiln

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
