"""A fact that is written twice says the same: schema, fake, reference and public function."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchkiln
from torchkiln import ops, testing
from torchkiln._frame import Operator, frame

OPERATORS = list(frame)
PUBLIC = sorted(name for name in vars(ops) if inspect.isfunction(getattr(ops, name)))


def arguments_of(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters]


def schema_of(operator: Operator[Any]) -> list[tuple[str, Any]]:
    return [
        (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in operator.overload._schema.arguments
    ]


def takes_lists(operator: Operator[Any]) -> bool:
    """Their schemas have no defaults: torch drops trailing ones and then rejects the gradient."""
    return any(str(a.type) == "List[Tensor]" for a in operator.overload._schema.arguments)


def label(operator: Operator[Any]) -> str:
    return operator.name


@pytest.mark.parametrize("operator", OPERATORS, ids=label)
def test_fake_has_the_schema(operator: Operator[Any]) -> None:
    assert arguments_of(frame.fake(operator.name)) == schema_of(operator)


@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.has_reference], ids=label)
def test_reference_has_the_schema(operator: Operator[Any]) -> None:
    assert arguments_of(operator.reference) == schema_of(operator)


@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.name in PUBLIC], ids=label)
def test_public_function_follows_the_schema(operator: Operator[Any]) -> None:
    """Arguments of both have one order and one default; the public one may resolve None itself.

    Keyword-only arguments have no order: they may stand anywhere in the schema. A word such as
    "none" may stand for a number of the schema.
    """
    public, schema = arguments_of(getattr(ops, operator.name)), schema_of(operator)
    parameters = inspect.signature(getattr(ops, operator.name)).parameters
    shared = [name for name, _ in schema if name in parameters]
    ordered = [n for n in shared if parameters[n].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [name for name, _ in public if name in ordered] == ordered
    for name in shared:
        default = dict(public)[name]
        resolved = default is None or isinstance(default, str) or takes_lists(operator)
        assert resolved or default == dict(schema)[name], name


def test_every_schema_has_its_python_part() -> None:
    """Schemas that exist but were not given a fake and a gradient."""
    schemas = {
        name.removeprefix("torchkiln::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torchkiln::")
    }
    assert schemas == {operator.name for operator in OPERATORS}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_is_documented(name: str) -> None:
    text = inspect.getdoc(getattr(ops, name)) or ""
    for part in ("Args:", "Returns:", "Differentiable:", "Deterministic:", "Example:"):
        assert part in text, part


def test_names_are_flat() -> None:
    assert {"box_iou", "generalized_box_iou"} <= set(PUBLIC)
    assert torchkiln.reference.box_iou
    # Operators of users, which other tests make, have a function of their own.
    ours = {name for name, parity in testing.find().items() if parity.function is None}
    assert ours <= {operator.name for operator in OPERATORS} | set(PUBLIC)
