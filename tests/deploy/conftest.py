"""Machines to deploy from and to."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest

from support.machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def other_machine(tmp_path: Path) -> Machine:
    folder = tmp_path / "other"
    folder.mkdir()
    return Machine(folder)
