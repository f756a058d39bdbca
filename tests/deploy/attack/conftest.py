"""What the tests of this folder need: the worker, and a private folder."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import attack


@pytest.fixture(autouse=True, scope="session")
def _built() -> None:
    if not Path(attack.worker("get")[0]).exists():
        pytest.skip("the worker is not built; run make setup")


@pytest.fixture
def work() -> Iterator[Path]:
    # Not pytest's own folder, whose ancestors others may be able to write to.
    with tempfile.TemporaryDirectory(prefix="torchkiln-attack-") as folder:
        yield Path(folder)
