"""Calls an operator with random arguments and judges what comes of it by the reference.

Rounding excuses a difference only where it explains it: where a result is not what the tier allows,
the reference is asked again, in the dtype that the operator computes in and for inputs moved by
some of its units of rounding. What lies among the answers is counted as undecided, not as equal.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchkiln.testing._cases import Arguments, Parity, convert
from torchkiln.testing._checks import bits, tensors_of
from torchkiln.testing._draw import Draw
from torchkiln.testing._layouts import LAYOUTS
from torchkiln.testing._parity import evaluate
from torchkiln.testing._tolerance import NEXT_TIER, TIERS, compare, needs_plain

#: Right: the result is the reference's; or the arguments are refused with a sentence.
EQUAL, REFUSED = "equal", "refused"
#: Right, as far as can be told: rounding decides; or no result is right, and the call has ended.
UNDECIDED, ENDED = "undecided", "ended"
#: Wrong.
FAILED = "failed"
VERDICTS = (EQUAL, REFUSED, UNDECIDED, ENDED, FAILED)

_SENTENCE = re.compile(r"^\w+: .+ must .+; got ", re.DOTALL)
_SPOILED = 0.06
_WIDE = (torch.float32, torch.float64)
# Units of rounding by which inputs are moved, and how often at random.
_UNITS, _MOVES = 4, 4


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Args:
        verdict: one of VERDICTS.
        message: why it failed, or how it was refused.
    """

    verdict: str
    message: str = ""


@dataclass(frozen=True)
class Call:
    """A drawn call.

    Args:
        draw: where it comes from.
        arguments: of the public function.
        differentiable: arguments that get a gradient.
        is_spoiled: whether one of the arguments is wrong.
    """

    draw: Draw
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    is_spoiled: bool

    def __str__(self) -> str:
        def show(value: object) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            name = str(value.dtype).removeprefix("torch.")
            return f"{name}{list(value.shape)} strides {list(value.stride())}"

        inner = ", ".join(f"{name}={show(value)}" for name, value in self.arguments.items())
        return f"{self.draw.function}({inner}), {self.draw.kind} values"


def draw_call(
    parity: Parity, seed: int, number: int, device: str = "cpu", configurations: int | None = None
) -> Call:
    """Returns a call; equal arguments give equal calls.

    Args:
        parity: the operator; has a `fuzz`.
        seed: of all calls.
        number: which one.
        device: where it will run.
        configurations: how many static configurations there are; None: one for each call.
    """
    assert parity.fuzz is not None, f"{parity.op} has no generator of arguments"
    static = number if configurations is None else number % configurations
    name = f"{seed}/{parity.op}"
    draw = Draw(
        f"{name}/{number}",
        f"{name}/configuration {static}",
        parity.functions,
        parity.dtypes,
        torch.device(device).type,
    )
    arguments = convert(parity.fuzz(draw), draw.dtype, device)
    for key, value in arguments.items():
        names = ["contiguous", *LAYOUTS]
        if key in draw.distinct:
            names.remove("expanded")
        layout = LAYOUTS[draw.option(f"layout of {key}", *names)]
        arguments[key] = pytree.tree_map_only(Tensor, layout, value)
    with_gradient = bool(parity.differentiable) and draw.option("gradient", True, False)
    names = [name for name in parity.differentiable if isinstance(arguments.get(name), Tensor)]
    is_spoiled = draw.promised is None and draw.chance(_SPOILED)
    if is_spoiled:
        draw.spoil(arguments)
        with_gradient = False
    draw.settle(arguments)
    return Call(draw, arguments, tuple(names) if with_gradient else (), is_spoiled)


def judge(parity: Parity, call: Call) -> Outcome:
    """Makes the call and says what came of it. On CUDA it has ended when this returns."""
    function = parity.native(call.draw.function)
    before = [bits(_storage(tensor)).clone() for tensor in tensors_of(call.arguments)]
    try:
        actual = evaluate(function, call.arguments, call.differentiable)
        if call.draw.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return _judge_error(call, error)
    for tensor, old in zip(tensors_of(call.arguments), before, strict=True):
        if not torch.equal(bits(_storage(tensor)), old):
            return Outcome(FAILED, "the call changed an input, or what lies beside it")
    if call.draw.promised is not None:
        return Outcome(FAILED, f"it returned instead of raising {call.draw.promised.__name__}")
    if not call.draw.is_judged:
        return Outcome(ENDED)
    # References are many small steps, which a GPU only waits for.
    here = _on_cpu(call)
    return _judge_result(parity, here, {key: value.cpu() for key, value in actual.items()})


def _on_cpu(call: Call) -> Call:
    arguments = pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), dict(call.arguments))
    return replace(call, arguments=arguments)


def _storage(tensor: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage())


def _judge_error(call: Call, error: Exception) -> Outcome:
    text = f"{type(error).__name__}: {error}"
    if call.draw.promised is None and not call.is_spoiled:
        return Outcome(FAILED, f"right arguments raised {text}")
    types = (call.draw.promised,) if call.draw.promised else (TypeError, ValueError, IndexError)
    if type(error) not in types:
        return Outcome(FAILED, f"it raised another type than promised: {text}")
    if not _SENTENCE.match(str(error)):
        return Outcome(FAILED, f"the error is no sentence: {text}")
    return Outcome(REFUSED, text)


def _judge_result(parity: Parity, call: Call, actual: Mapping[str, Tensor]) -> Outcome:
    oracle = parity.oracle(call.draw.function)

    def reference(arguments: Arguments, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return evaluate(oracle, convert(arguments, dtype), call.differentiable)

    try:
        expected = reference(call.arguments)
    except Exception as error:
        return Outcome(FAILED, f"the reference raised {type(error).__name__}: {error}")
    if actual.keys() != expected.keys():
        return Outcome(FAILED, f"the outputs are {list(actual)}, not {list(expected)}")
    differentiated = call.draw.kind == "plain" and call.draw.dtype in _WIDE
    messages = {}
    for key in expected:
        is_gradient = key.startswith("gradient")
        if is_gradient and not differentiated:
            continue
        tier = NEXT_TIER[parity.tier] if is_gradient else parity.tier
        plain = None
        if needs_plain(tier, actual[key].dtype):
            plain = reference(call.arguments, actual[key].dtype)[key]
        found = compare(actual[key], expected[key], tier, plain)
        if not found.ok:
            messages[key] = found.message
    if not messages:
        return Outcome(EQUAL)
    others = _other_answers(reference, call)
    for key, message in messages.items():
        tier = NEXT_TIER[parity.tier] if key.startswith("gradient") else parity.tier
        answers = [other[key] for other in others if key in other]
        if not _lies_among(actual[key], expected[key], answers, tier):
            return Outcome(FAILED, f"{key}: {message}")
    return Outcome(UNDECIDED, "; ".join(messages.values()))


def _other_answers(
    reference: Callable[..., dict[str, Tensor]], call: Call
) -> list[dict[str, Tensor]]:
    """The reference's results for what rounding makes of the inputs."""
    computed = torch.float64 if call.draw.dtype == torch.float64 else torch.float32
    unit = _UNITS * torch.finfo(computed).eps
    new = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        # Away from 0, so that the whole part of an index stays.
        share = torch.rand(x.shape, generator=new, dtype=torch.float64).round().to(x.device)
        x = x.double()
        if x.dim() == 0:
            return x * (1 + unit * share)
        size = torch.where(x.isfinite(), x.abs(), 0.0)
        row = size.amax(-1, keepdim=True) if x.shape[-1] else size
        step = torch.where(x == 0, row.clamp(max=1), x)
        return x + unit * share * torch.where(step.isfinite(), step, 0.0)

    def scaled(factor: float) -> Arguments:
        return {
            key: value * factor if isinstance(value, float) else value
            for key, value in call.arguments.items()
        }

    questions: list[tuple[Arguments, torch.dtype]] = [(call.arguments, computed)]
    questions += [(scaled(1 + unit), torch.float64), (scaled(1 - unit), torch.float64)]
    for _ in range(_MOVES):
        arguments = pytree.tree_map_only(Tensor, moved, dict(call.arguments))
        questions.append((arguments, torch.float64))
    answers = []
    for arguments, dtype in questions:
        # Moved inputs may be none that the reference takes.
        with contextlib.suppress(Exception):
            answers.append(reference(arguments, dtype))
    return answers


def _lies_among(actual: Tensor, expected: Tensor, answers: list[Tensor], tier: str) -> bool:
    """Whether rounding explains a result.

    Of indices all must be those of one answer; of truth values each may be that of another one; a
    number may be off by some times what the answers differ in.
    """
    if not actual.is_floating_point():
        alike = [other for other in answers if other.shape == actual.shape]
        if actual.dtype != torch.bool:
            return any(torch.equal(actual, other) for other in alike)
        return actual.shape == expected.shape and bool(
            torch.stack([actual == other for other in (expected, *alike)]).any(0).all()
        )
    if actual.shape != expected.shape:
        return any(
            compare(actual, other.double(), tier).ok
            for other in answers
            if other.shape == actual.shape
        )
    relative, absolute = TIERS[tier][actual.dtype] or (1e-2, 1e-2)
    rounded = expected.to(actual.dtype)
    sure = torch.ones_like(rounded, dtype=torch.bool)
    slack = torch.zeros_like(expected)
    for other in answers:
        same = torch.isclose(other.double(), expected, rtol=0, atol=0, equal_nan=True)
        gap = torch.where(same, 0.0, (other.double() - expected).abs())
        sure &= gap.isfinite()
        slack = torch.maximum(slack, gap.nan_to_num())
    finite = expected.abs().nan_to_num(posinf=0.0)
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    error = (actual.double() - expected).abs()
    close = error <= relative * finite + absolute * scale + _UNITS * slack
    close |= torch.isclose(actual, rounded, rtol=0, atol=0, equal_nan=True)
    return bool((close | ~sure).all())
