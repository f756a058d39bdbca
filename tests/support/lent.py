"""Tensors on a GPU that is not there: memory of the host, lent through DLPack's exchange table.

With a driver that runs nothing (tests/deploy/fake_libcuda.cpp) they let tests see launches from
Python.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import json
from typing import Any

import torch

CPU, CUDA = 1, 2
CODES = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float64: (2, 64),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.bool: (6, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.complex64: (5, 64),
}


class DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


Read = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DlTensor))
Stream = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class Exchange(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("unused", ctypes.c_void_p * 3),
        ("read", Read),
        ("current_stream", Stream),
    )


streams: dict[int, int] = {}


def _read(tensor: Lent, out: Any) -> int:
    out[0] = tensor.view
    return 0


def _current_stream(kind: int, device: int, out: Any) -> int:
    out[0] = streams.get(device, 0)
    return 0


_TABLE = Exchange(1, 1, None, (None, None, None), Read(_read), Stream(_current_stream))
_NAME = b"dlpack_exchange_api"
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Lent:
    """Looks like `tensor`, on a CUDA device."""

    __dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(_TABLE), _NAME, None)

    def __init__(self, tensor: torch.Tensor, device: int = 0, kind: int = CUDA) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype
        self._shape = (ctypes.c_int64 * tensor.ndim)(*tensor.shape)
        self._strides = (ctypes.c_int64 * tensor.ndim)(*tensor.stride())
        code, bits = CODES[tensor.dtype]
        self.view = DlTensor(
            tensor.data_ptr(), kind, device, tensor.ndim, code, bits, 1, self._shape, self._strides
        )


def launches() -> list[dict[str, Any]]:
    """What the fake driver was told to launch so far."""
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_cuda_launches.restype = ctypes.c_char_p
    found: list[dict[str, Any]] = json.loads(library.fake_cuda_launches())
    return found
