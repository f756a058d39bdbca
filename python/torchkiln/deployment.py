"""Which kernels a program uses, and whether it may compile more of them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torchkiln import _control

__all__ = ["record", "seal"]


@contextmanager
def record(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds every CUDA kernel that is launched in the block to a manifest.

    `torchkiln warm` and `torchkiln bundle create` take it with `--manifest`. Each kernel is written
    at its first launch, before it is compiled, so nothing is lost when the process dies. Kernels
    that were warm before the block are recorded too. All threads of the process are recorded,
    several blocks may overlap, and several processes may share a file.

    Args:
        path: the file; it is made when missing and otherwise added to.

    A file that cannot be written costs one warning, and never the launch.
    """
    recording = _control.control("record.start", {"path": os.path.abspath(path)})
    try:
        yield
    finally:
        _control.control("record.stop", recording)


def seal(mode: Literal["forbid", "warn", "allow"] = "forbid") -> None:
    """Ends the warm-up: from now on launches of this process do not compile kernels.

    Args:
        mode: `"forbid"`: a missing kernel is served by its generic variant, and where that is
            missing too, the launch raises `torchkiln.errors.MissingKernelError`. `"warn"`: it is
            compiled, with one warning. `"allow"`: takes the seal off. The environment variable
            TORCHKILN_JIT sets the mode that a process starts with.

    Raises:
        ValueError: another mode.
    """
    if mode not in ("forbid", "warn", "allow"):
        raise ValueError(f"seal: mode must be forbid, warn or allow; got {mode!r}")
    _control.control("seal", {"mode": mode})
