"""`mmcv.ops.deprecated_wrappers`: torch.nn's classes, which mmcv.ops once had versions of."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

__all__ = [
    "Conv2d",
    "Conv2d_deprecated",
    "ConvTranspose2d",
    "ConvTranspose2d_deprecated",
    "Linear",
    "Linear_deprecated",
    "MaxPool2d",
    "MaxPool2d_deprecated",
]


def _deprecated(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a class of torch.nn that warns when it is constructed."""

    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        name = base.__name__
        warnings.warn(
            f"mmcv.ops.{name}: is deprecated; use torch.nn.{name} or mmcv.cnn.{name}",
            DeprecationWarning,
            stacklevel=2,
        )

    name = f"{base.__name__}_deprecated"
    return type(name, (base,), {"__module__": __name__, "__init__": construct})


Conv2d = Conv2d_deprecated = _deprecated(nn.Conv2d)
ConvTranspose2d = ConvTranspose2d_deprecated = _deprecated(nn.ConvTranspose2d)
Linear = Linear_deprecated = _deprecated(nn.Linear)
MaxPool2d = MaxPool2d_deprecated = _deprecated(nn.MaxPool2d)
