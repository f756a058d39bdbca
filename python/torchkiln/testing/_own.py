"""Operators and kernels of users that `torchkiln verify` compares with their references."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchkiln.testing._cases import Case, Parity

if TYPE_CHECKING:
    from torchkiln._kernel import Kernel
    from torchkiln.library import Op
    from torchkiln.testing._workloads import Workload

# float64 is seldom among the types of a user's kernel.
_USUAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_registered: dict[str, Parity] = {}


def registered() -> dict[str, Parity]:
    """What modules imported so far have registered, by name."""
    return dict(_registered)


def register_op(
    op: Op[Any],
    cases: Sequence[Case],
    workloads: Sequence[Workload],
    tier: str,
    differentiable: Sequence[str],
    dtypes: Sequence[torch.dtype] | None,
) -> None:
    """Registers an operator of `torchkiln.library.op`."""
    assert op.reference is not None
    _registered[op.name] = Parity(
        op=op.name,
        tier=tier,
        cases=tuple(cases),
        differentiable=tuple(differentiable),
        dtypes=_USUAL_DTYPES if dtypes is None else tuple(dtypes),
        workloads=tuple(workloads),
        function=op,
        reference=op.reference,
    )


def register_kernel(kernel: Kernel, cases: Sequence[Case]) -> None:
    """Registers a kernel: its results are the tensors that it writes."""
    assert kernel.reference is not None
    written = [name for name, kind in kernel.args.items() if kind.split()[0] in ("out", "inout")]
    _registered[kernel.name] = Parity(
        op=kernel.name,
        tier="B",
        cases=tuple(cases),
        dtypes=kernel.floating_dtypes or (torch.float32,),
        devices=("cuda",),
        function=_returning(kernel, written),
        reference=_returning(kernel.reference, written),
    )


def _returning(
    call: Callable[..., None], written: Sequence[str]
) -> Callable[..., tuple[Tensor, ...]]:
    def run(**arguments: Any) -> tuple[Tensor, ...]:
        results = {name: arguments[name].clone() for name in written}
        call(**{**arguments, **results})
        return tuple(results.values())

    return run
