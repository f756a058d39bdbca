"""Operators with planted faults, for the tests of the fuzzer."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Parity


def _double(x: Tensor) -> Tensor:
    return x * 2


def is_fatal(x: Tensor) -> bool:
    """In every tenth call or so."""
    return x.dim() == 1 and len(x) == 7


def wrong(x: Tensor) -> Tensor:
    """Slightly, and only where a vector loop would have a rest."""
    result = x * 2
    return torch.where(torch.arange(len(x)) == 6, result * 1.01, result) if x.dim() == 1 else result


def crashing(x: Tensor) -> Tensor:
    if is_fatal(x):
        os.kill(os.getpid(), signal.SIGSEGV)
    return x * 2


def hanging(x: Tensor) -> Tensor:
    if is_fatal(x):
        time.sleep(600)
    return x * 2


def rude(x: Tensor) -> Tensor:
    """Lets torch speak, instead of saying which argument must be what."""
    if is_fatal(x):
        raise ValueError("invalid argument")
    return x * 2


def writing(x: Tensor) -> Tensor:
    if is_fatal(x):
        x[0] += 1
    return x * 2


def right(x: Tensor) -> Tensor:
    return x * 2


def cancelling(x: Tensor) -> Tensor:
    """Right, though hardly a digit is."""
    return (x + 1e5) - 1e5


def _fuzz(draw: Draw) -> dict[str, Tensor]:
    return {"x": draw.values(draw.size())}


def _parity(function: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]) -> Parity:
    return Parity(
        op=f"planted_{function.__name__}",
        tier="A",
        cases=(Case("typical", lambda new: {"x": new.normal(3)}),),
        dtypes=(torch.float32, torch.float64),
        function=function,
        reference=reference,
        devices=("cpu",),
        fuzz=_fuzz,
    )


def parities() -> tuple[Parity, ...]:
    functions = (wrong, crashing, hanging, rude, writing, right)
    planted = [_parity(function, _double) for function in functions]
    return (*planted, _parity(cancelling, cancelling))
