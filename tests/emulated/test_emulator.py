"""The emulated GPU finds mistakes, and finds none where there are none."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor

import planted
import pytest

from support import emulated


@pytest.mark.parametrize("name", planted.MISTAKES)
def test_finds(gpu: ProcessPoolExecutor, name: str) -> None:
    says = planted.MISTAKES[name].says
    error, differs = gpu.submit(planted.meet, name).result()
    if says:
        assert re.search(says, error), error or "no error"
    else:
        assert differs, error or "two schedules give the same result"


@pytest.mark.parametrize("schedule", emulated.SCHEDULES)
@pytest.mark.parametrize("name", planted.SOUND)
def test_computes(gpu: ProcessPoolExecutor, name: str, schedule: int) -> None:
    expected = planted.SOUND[name][1]
    got = gpu.submit(planted.compute, name, schedule).result()
    for i, value in enumerate(got):
        assert value == expected(*divmod(i, planted.BLOCK)), i


def test_a_typo_is_told_as_nvrtc_tells_it(gpu: ProcessPoolExecutor) -> None:
    with pytest.raises(RuntimeError, match=r"user/typo\.cuh\(4\): .*undeclared"):
        gpu.submit(planted.launch, "out[i] = undeclared;", "typo", 0, 0).result()


def test_no_operator_falls_back_to_its_cpu_version(gpu: ProcessPoolExecutor) -> None:
    with pytest.raises(NotImplementedError, match="emulated::cpu_only has no kernel for CUDA"):
        gpu.submit(planted.call_cpu_only).result()
