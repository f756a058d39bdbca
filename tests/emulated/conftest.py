"""The emulated GPU's process, one for all tests of a worker."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from support import emulated


@pytest.fixture(scope="session")
def gpu() -> Iterator[ProcessPoolExecutor]:
    with emulated.process() as executor:
        yield executor
