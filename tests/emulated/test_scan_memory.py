"""Memory of the scan's CUDA route on the emulated GPU, which counts what tensors hold."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from support import emulated


def peers_bytes(size: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """What mamba-ssm holds: the output before its gate, states, float32 sums of B and C."""
    batch, dim, length, states = size
    output = batch * dim * length * dtype.itemsize
    kept = batch * dim * -(-length // 2048) * 2 * states * 4
    sums = 0 if dtype == torch.float32 else 2 * batch * states * length * 4
    return output + kept + sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 64, 512, 16), id="positions_in_splits"),
        pytest.param((4, 32, 197, 16), id="whole_rows"),
    ],
)
def test_no_more_than_the_peer(
    gpu: ProcessPoolExecutor, size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert gpu.submit(emulated.scan_bytes, size, dtype).result() <= peers_bytes(size, dtype)
