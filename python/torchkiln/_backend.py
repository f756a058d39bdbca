"""Which implementation runs: the compiled operators or the plain PyTorch references."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import threading
from typing import Literal

BackendName = Literal["native", "reference"]


class _Choice(threading.local):
    """The choice of this thread. Dynamo guards on it; on a context variable it cannot."""

    def __init__(self) -> None:
        self.reference = False


choice = _Choice()


class backend:
    """Chooses, inside a `with` block and on this thread, what runs the operators.

    Args:
        name: "reference" for `torchkiln.reference`, plain PyTorch that runs on any device and can
            be differentiated twice; "native" for the compiled operators, the default.

    Tensors that are neither on a CPU nor on a CUDA device take the reference in any case.

    Example:
        >>> import torch, torchkiln
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> with torchkiln.backend("reference"):
        ...     torchkiln.ops.box_iou(boxes, boxes)
        tensor([[1.]])
    """

    def __init__(self, name: BackendName) -> None:
        if name not in ("native", "reference"):
            raise ValueError(f"backend: name must be 'native' or 'reference'; got {name!r}")
        self._reference = name == "reference"
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(choice.reference)
        choice.reference = self._reference

    def __exit__(self, *exception: object) -> None:
        choice.reference = self._before.pop()
