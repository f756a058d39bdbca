"""`mmcv.ops.info`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torchkiln import _control
from torchkiln.errors import TorchkilnError

__all__ = ["get_compiler_version", "get_compiling_cuda_version"]


def get_compiler_version() -> str:
    """The compiler that torchkiln was built with, such as "GCC 12.2"."""
    name: str = _control.control("build", {})["compiler"]
    return name


def get_compiling_cuda_version() -> str:
    """The version of NVRTC, such as "13.0", or "not available" without one."""
    try:
        version: str = _control.control("nvrtc", {"load": True})["version"]
    except TorchkilnError:
        return "not available"
    return version
