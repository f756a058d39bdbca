"""The Python of documentation pages runs as it stands there, block after block."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from support.machine import CLEAN, ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a page takes as given.
GIVEN = {
    "multi_scale_deformable_attention": "",
    "deformable_aggregation": """
import torch
levels = [torch.rand(1, 6, 32, 8, 22), torch.rand(1, 6, 32, 4, 11)]
points_2d, weights = torch.rand(1, 9, 13, 6, 2), torch.rand(1, 9, 13, 6, 2, 8)
logits = weights.movedim(2, 4)
""",
}


@pytest.mark.parametrize("page", GIVEN)
def test_code_of_a_page_runs(page: str) -> None:
    """In a process of its own: drop-ins change what is imported."""
    blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())
    assert len(blocks) > 2
    program = "\n".join([GIVEN[page], *blocks])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "tests",
        env={**CLEAN, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
