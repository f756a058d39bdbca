"""The kernel of own_launch.py in Triton, which reads the source of a module."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def launch(x, bias, mask, out, n, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, D103
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, inside) + tl.load(bias + i, inside)
    kept = tl.load(mask + i, inside, other=0) != 0
    tl.store(out + i, tl.where(kept, total * scale, 0.0), inside)
