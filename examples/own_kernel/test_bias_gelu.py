"""Proves the operator: its values, gradients, layouts, memory, graphs and errors."""

# SPDX-License-Identifier: Apache-2.0

from typing import ClassVar

from bias_gelu import bias_gelu

from torchkiln.testing import Failure, Suite, find


class TestBiasGelu(Suite):
    """The cases are those that the operator was made with."""

    parity = find()[bias_gelu.name]
    dynamic: ClassVar = {"x": 0, "mask": 0}
    failures = (
        Failure("bias", {"bias": lambda b: b[:3]}, ValueError, r"bias must have shape \(64,\)"),
        Failure("mask", {"mask": lambda m: m[:3]}, ValueError, r"mask must be uint8 of shape \(37"),
        Failure("floats", {"mask": lambda m: m.float()}, ValueError, "mask must be uint8 of shape"),
    )
