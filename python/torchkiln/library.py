"""Makes torch operators of your own functions: kernels for CUDA, plain PyTorch for the rest."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch._library.custom_ops import CustomOpDef

from torchkiln._backend import choice

if TYPE_CHECKING:
    from torchkiln.testing import Case, Workload

__all__ = ["Op", "op"]

Result = TypeVar("Result")


class Op(Generic[Result]):
    """An operator that `torchkiln.library.op` has made; call it like the function it came from.

    Attributes:
        name: with its namespace, "mine::bias_gelu".
        overload: what `torch.ops` calls, for graphs and tests.
        definition: the `torch.library.CustomOpDef` behind it, for whatever else torch offers.
        reference: its plain PyTorch version, or None.
    """

    def __init__(
        self,
        name: str,
        definition: CustomOpDef,
        reference: Callable[..., Result] | None,
    ) -> None:
        self.name = name
        self.definition = definition
        self.reference = reference
        namespace, _, base = name.partition("::")
        self.overload: Any = getattr(getattr(torch.ops, namespace), base).default

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Runs the operator, or its reference inside `torchkiln.backend("reference")`."""
        if choice.reference and self.reference is not None:
            return self.reference(*args, **kwargs)
        result: Result = self.overload(*args, **kwargs)
        return result

    def __repr__(self) -> str:
        return f"<torchkiln operator {self.name}>"


def op(
    name: str,
    cuda: Callable[..., Result],
    *,
    cpu: Callable[..., Result] | None = None,
    fake: Callable[..., Result] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    reference: Callable[..., Result] | None = None,
    mutates_args: Sequence[str] = (),
    cases: Sequence[Case] = (),
    workloads: Sequence[Workload] = (),
    tier: str = "B",
    differentiable: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] | None = None,
) -> Op[Result]:
    """Makes a torch operator: it compiles, differentiates, exports and shows up in profiles.

    Args:
        name: namespace and name, "mine::bias_gelu".
        cuda: what runs for CUDA tensors: it makes the outputs and launches a `torchkiln.Kernel`.
            Its type annotations become the schema, as of `torch.library.custom_op`; it must return
            new tensors.
        cpu: what runs for CPU tensors; by default the reference.
        fake: outputs without data for given inputs; by default the reference, which torch runs on
            tensors without data.
        setup_context: `(ctx, inputs, output)`: keeps what `backward` needs.
        backward: `(ctx, *grads)`: gradients of all inputs in order, None for those without. What it
            calls should be an operator too, so that compiled graphs hold it.
        reference: the same in plain PyTorch, for any device.
        mutates_args: names of inputs that the operator writes.
        cases: `torchkiln.testing.Case`s; with them and a reference `torchkiln verify` compares the
            operator with its reference.
        workloads: `torchkiln.testing.Workload`s, calls of realistic sizes; with them and a
            reference `torchkiln tune` tunes the kernels that the operator launches.
        tier: how near results must be, a key of `torchkiln.testing.TIERS`.
        differentiable: inputs whose gradients are compared.
        dtypes: floating dtypes that it is tried in; float16, bfloat16 and float32 by default.

    Returns:
        The operator. Called with the arguments of `cuda`.

    Raises:
        ValueError: the name has no namespace, or cases lack a reference.

    Example:
        >>> import torch, torchkiln
        >>> def plain(x: torch.Tensor, factor: float) -> torch.Tensor:
        ...     return x * factor
        >>> def on_cuda(x: torch.Tensor, factor: float) -> torch.Tensor:
        ...     out = torch.empty_like(x)
        ...     scale_kernel(x, out, x.numel(), factor)  # a torchkiln.Kernel
        ...     return out
        >>> scale = torchkiln.library.op(
        ...     "doc::scale",
        ...     on_cuda,
        ...     reference=plain,
        ...     setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
        ...     backward=lambda ctx, grad: (scale(grad, ctx.factor), None),
        ... )
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale(x, 3.0).sum().backward()
        >>> x.grad
        tensor([3., 3.])
    """
    if name.count("::") != 1 or not all(part.isidentifier() for part in name.split("::")):
        raise ValueError(f"op: name must be like mine::bias_gelu; got {name}")
    if (cases or workloads) and reference is None:
        raise ValueError(f"{name}: reference must be given with cases or workloads; got None")
    definition = torch.library.custom_op(
        name, cuda, mutates_args=tuple(mutates_args), device_types="cuda"
    )
    definition.register_kernel("cpu")(cpu or reference or _no_cpu(name))
    shapes = fake or reference
    if shapes is not None:
        definition.register_fake(shapes)
    if backward is not None:
        definition.register_autograd(backward, setup_context=setup_context)
    made = Op(name, definition, reference)
    if cases or workloads:
        from torchkiln.testing import _own

        _own.register_op(made, cases, workloads, tier, differentiable, dtypes)
    return made


def _no_cpu(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{name}: tensors must be on a CUDA device; got cpu. "
            "torchkiln.library.op takes a cpu function or a reference"
        )

    return refuse
