"""How far a result may be from the float64 reference, by the kind of arithmetic behind it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _tier(*limits: tuple[float, float] | None) -> dict[torch.dtype, tuple[float, float] | None]:
    return dict(zip(_DTYPES, limits, strict=True))


# rtol and atol; atol is multiplied by max(1, largest absolute value of the reference). None: the
# relative rule, by which the error may be twice that of the reference run in the same dtype.
TIERS = {
    # Indices, counts, masks, copies.
    "X": _tier((0, 0), (0, 0), (0, 0), (0, 0)),
    # Per element, a few operations.
    "A": _tier((1e-10, 1e-12), (1.3e-6, 1e-5), (1e-3, 1e-5), (1.6e-2, 1e-5)),
    # Sums up to about 4,000 terms, float accumulator.
    "B": _tier((1e-9, 1e-11), (1e-5, 1e-5), (2e-3, 1e-4), (2e-2, 1e-4)),
    # Long sums, atomics, products of matrices, iteration.
    "C": _tier((1e-8, 1e-10), (1e-4, 1e-5), None, None),
}
# Gradients use the next tier.
NEXT_TIER = {"X": "A", "A": "B", "B": "C", "C": "C"}


@dataclass(frozen=True)
class Difference:
    """The element that is nearest to its limit, or furthest beyond it.

    Args:
        error: absolute error there; the number of different elements where they must be equal.
        limit: what it may be.
        message: what is wrong, or an empty string.
    """

    error: float
    limit: float
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the result passes."""
        return not self.message


def needs_plain(tier: str, dtype: torch.dtype) -> bool:
    """Whether `compare` asks for the reference's result in the tested dtype."""
    return TIERS[tier].get(dtype, (0, 0)) is None


def compare(actual: Tensor, expected: Tensor, tier: str, plain: Tensor | None = None) -> Difference:
    """Compares one output with the reference.

    Args:
        actual: of the operator, any dtype.
        expected: of the reference, float64 where `actual` is floating.
        tier: a key of TIERS.
        plain: of the reference run in the dtype of `actual`, for the relative rule.

    Returns:
        The worst element.
    """
    if actual.shape != expected.shape:
        shapes = f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
        return Difference(math.inf, 0.0, f"the shape is {shapes}")
    if not actual.is_floating_point():
        return _compare_exactly(actual, expected)
    rounded = expected.to(actual.dtype)
    special = ~rounded.isfinite()
    wrong = special != ~actual.isfinite()
    wrong |= special & ~torch.isclose(actual, rounded, equal_nan=True)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        values = f"{actual[where].item()}, not {rounded[where].item()}"
        return Difference(math.inf, 0.0, f"at {where} it is {values}")
    return _compare_finite(actual[~special], expected[~special], tier, plain, special)


def _compare_exactly(actual: Tensor, expected: Tensor) -> Difference:
    different = actual.to(expected.dtype) != expected
    count = int(different.sum())
    if not count:
        return Difference(0.0, 0.0)
    where = tuple(different.nonzero()[0].tolist())
    values = f"at {where} it is {actual[where].item()}, not {expected[where].item()}"
    return Difference(float(count), 0.0, f"{count} elements differ; {values}")


def _compare_finite(
    actual: Tensor, expected: Tensor, tier: str, plain: Tensor | None, special: Tensor
) -> Difference:
    """Compares what is finite in the reference; `plain` still holds all elements."""
    if actual.numel() == 0:
        return Difference(0.0, 0.0)
    expected = expected.double()
    error = (actual.double() - expected).abs()
    scale = float(expected.abs().max())
    rule = TIERS[tier][actual.dtype]
    if rule is None:
        assert plain is not None, "the relative rule needs the reference's result in this dtype"
        step = torch.finfo(actual.dtype).eps * scale
        peer = (plain[~special].double() - expected).abs().max()
        limit = (2 * peer + step).expand_as(error)
    else:
        limit = rule[0] * expected.abs() + rule[1] * max(1.0, scale)
    worst = int(torch.where(limit > 0, error / limit, error * math.inf).nan_to_num(0.0).argmax())
    worst_error, worst_limit = float(error[worst]), float(limit[worst])
    if worst_error <= worst_limit:
        return Difference(worst_error, worst_limit)
    values = f"{actual[worst].item():.9g}, not {expected[worst].item():.9g}"
    message = f"error {worst_error:.3g} beyond {worst_limit:.3g} (tier {tier}): {values}"
    return Difference(worst_error, worst_limit, message)
