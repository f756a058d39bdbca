"""Makes visible what an operator writes beside its outputs, and what it leaves unwritten."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Call = Callable[[], dict[str, Tensor]]

# One is a small float in most dtypes, the other a huge one: what is not written differs.
FILLS = (0x11, 0x7E)
_M_PERTURB = -6  # of glibc's malloc.h
# Flags in the lowest bits of the size that glibc keeps in front of each block.
_PREVIOUS_IN_USE, _IS_MAPPED = 1, 2
_WORD = ctypes.sizeof(ctypes.c_size_t)


def surrounded(tensor: Tensor) -> Tensor:
    """The same values between two guard bands, in one storage."""
    band = 64
    wide = tensor.new_empty(tensor.numel() + 2 * band)
    wide.untyped_storage().fill_(FILLS[1])  # type: ignore[attr-defined]
    return wide[band : band + tensor.numel()].view(tensor.shape).copy_(tensor)


@contextlib.contextmanager
def fresh_memory_is(byte: int) -> Iterator[None]:
    """Fills what malloc hands out with `byte`; blocks of 128 KiB and more come from the kernel."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_PERTURB, byte ^ 0xFF)
    try:
        yield
    finally:
        libc.mallopt(_M_PERTURB, 0)


def assert_blocks_are_whole(tensor: Tensor) -> None:
    """Checks malloc's notes right before and right after a CPU tensor's memory.

    A size has at least 32 bytes and the flag that the block before it is in use. Zeros or numbers
    written over it have not, but for rare bit patterns. The note after the block begins with its
    last byte where the size is 8 more than a multiple of 16, else up to 8 bytes later.
    """
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return
    start = storage.data_ptr()
    own = ctypes.c_size_t.from_address(start - _WORD).value
    block = own & ~7
    if not storage.nbytes() <= block <= storage.nbytes() + (1 << 13):
        raise AssertionError("the call wrote before an output")
    if own & _IS_MAPPED:
        return
    following = ctypes.c_size_t.from_address(start - _WORD + block).value
    if not (following & _PREVIOUS_IN_USE and 32 <= following < 1 << 40):
        raise AssertionError("the call wrote behind an output")


def _fills_work() -> bool:
    """Whether torch's memory comes from glibc, and not from a malloc in its place."""
    if platform.libc_ver()[0] != "glibc":
        return False
    with fresh_memory_is(FILLS[0]):
        # More than glibc keeps for each thread, less than it asks the kernel for.
        return bool((torch.empty(1 << 14, dtype=torch.uint8) == FILLS[0]).all())


def run_on_cpu(call: Call) -> list[dict[str, Tensor]]:
    if not _fills_work():
        return [call()]
    results = []
    for byte in FILLS:
        with fresh_memory_is(byte):
            results.append(call())
            # Before malloc looks at its notes itself, and ends the process.
            for output in results[-1].values():
                assert_blocks_are_whole(output)
    return results


def run_on_cuda(call: Call) -> list[dict[str, Tensor]]:
    """Calls with outputs in holes full of one byte, between blocks full of it.

    torch's allocator gives a freed block to the next request of its size. A write past an end
    changes the block beside it, once it is past the rounding to 512 bytes.
    """
    sizes = [output.nbytes for output in call().values()]
    results = []
    for byte in FILLS:
        blocks = [
            torch.full((size,), byte, dtype=torch.uint8, device="cuda")
            for size in sizes
            for _ in range(9)
        ]
        del blocks[1::2]
        results.append(call())
        if not all(bool((block == byte).all()) for block in blocks):
            raise AssertionError("the call wrote beside an output")
    return results


def run_watched(device: str, call: Call) -> list[dict[str, Tensor]]:
    """Returns the results of several calls that differ only in what fresh memory held."""
    return run_on_cpu(call) if torch.device(device).type == "cpu" else run_on_cuda(call)
