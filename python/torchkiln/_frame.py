"""Ties an operator's schema, which C++ owns, to its fake, gradient, autocast rule and reference.

Import registers one cheap Python kernel for each of them and looks up nothing; whatever costs time
is built at an operator's first call. Torch's public functions build it at once, at 1 to 2 ms each.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._library import autograd as library_autograd
from torch._library import fake_impl, simple_registry
from torch._library import utils as library_utils
from torch.amp import autocast_mode
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils import _pytree as pytree

from torchkiln._backend import choice
from torchkiln.errors import translate

# Bound once: each lookup through the module costs as much as the check itself.
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_dispatch_modes = torch._C._len_torch_dispatch_stack
_in_functorch = torch._C._are_functorch_transforms_active
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
# Non-strict tracers need no question of their own: they are modes.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled

Result = TypeVar("Result")

# As a schema writes them.
_TENSOR_KINDS = ("Tensor", "Optional[Tensor]")
_AUTOCAST_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}


def _saves_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The setup_context of a backward that needs no input."""


def _runs_native(argument: Any) -> bool:
    """Whether there is compiled code for the device of an operator's first argument.

    What is no tensor goes to the operator too, which has the right error for it.
    """
    if isinstance(argument, Tensor):
        return argument.is_cpu or argument.is_cuda or argument.is_meta
    if isinstance(argument, (list, tuple)):
        return all(_runs_native(item) for item in argument)
    return True


class Operator(Generic[Result]):
    """One registered operator: called with all arguments of its schema, by position.

    A plain eager call goes below autograd or straight to a lean `autograd.Function`, two to three
    times quicker than what torch registers. All other callers (torch.compile, export, modes,
    subclasses, autocast, raw `torch.ops` calls) meet the registered operator, and torch.func meets
    a Function that it can transform.
    """

    def __init__(
        self,
        namespace: str,
        name: str,
        setup_context: Callable[..., None],
        backward: Callable[..., Any] | None,
        reference: Callable[..., Result] | None,
        public: str | None = None,
    ) -> None:
        self.namespace = namespace
        self.name = name
        self._public = public or name
        self._setup_context = setup_context
        self._backward = backward or self._refuse_gradient
        self._reference = reference

    def __call__(self, *args: Any) -> Result:
        output: Result
        # The hot path: what is asked here costs each call, so the questions stand in line.
        first = args[0]
        # Identity: torch.fx's stand-ins for tensors have every attribute, and no truth.
        on_device = getattr(first, "is_cuda", False) is True or _runs_native(first)
        if (choice.reference or not on_device) and self.has_reference:
            return self.reference(*args)
        if _is_dynamo_compiling():
            output = getattr(getattr(torch.ops, self.namespace), self.name).default(*args)
            return output
        try:
            if (
                has_torch_function(args)
                or _dispatch_modes() > 0
                or _in_functorch()
                or forward_ad._current_level >= 0
            ):
                output = self._run_watched(args)
            elif _is_grad_enabled() and _any_requires_grad(*args):
                output = self._run_differentiable(args)
            else:
                with _BelowAutograd():
                    output = self.overload._op(*args)
            for place in self._changed:
                _count_change(args[place])
            return output
        except RuntimeError as error:
            better = self._unfit_tensor(args) or translate(error)
            if better is error:
                raise
            raise better from None

    def __repr__(self) -> str:
        return f"<operator {self.namespace}::{self.name}>"

    @property
    def has_reference(self) -> bool:
        """Internal operators (`_x_backward`) have none: references use torch's own autograd."""
        return self._reference is not None or not self.name.startswith("_")

    @property
    def reference(self) -> Callable[..., Result]:
        """The plain PyTorch version, with the schema's arguments."""
        if self._reference is not None:
            return self._reference
        from torchkiln import reference

        return getattr(reference, self.name)  # type: ignore[no-any-return]

    @functools.cached_property
    def overload(self) -> Any:
        """`torch.ops.<namespace>.<name>.default`."""
        return getattr(getattr(torch.ops, self.namespace), self.name).default

    @functools.cached_property
    def _changed(self) -> tuple[int, ...]:
        """Places of the arguments that a public operator writes to."""
        if self.name.startswith("_"):
            return ()
        kinds = (argument.alias_info for argument in self.overload._schema.arguments)
        return tuple(i for i, kind in enumerate(kinds) if kind is not None and kind.is_write)

    def _unfit_tensor(self, args: tuple[Any, ...]) -> TypeError | None:
        """The error for what must be a tensor with strides and is none.

        None is an undefined tensor to torch; for a sparse one it lists all its backends.
        """
        for argument, value in zip(self.overload._schema.arguments, args, strict=False):
            kind = str(argument.type)
            for leaf in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
                    return unfit(self._public, argument.name, leaf)
            is_missing = value is None and kind == "Tensor"
            if is_missing or (kind in _TENSOR_KINDS and not isinstance(value, (Tensor, NoneType))):
                return unfit(self._public, argument.name, value)
        return None

    def require_meta(self, *args: Any, **kwargs: Any) -> None:
        """Raises where some tensors are on the meta device and others are not.

        Torch sends such a call to the operator's fake, which looks at sizes only: outputs would be
        memory that nobody writes.
        """
        names = [argument.name for argument in self.overload._schema.arguments]
        named = [*zip(names, args, strict=False), *kwargs.items()]
        tensors = [
            (name, leaf)
            for name, value in named
            for leaf in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(leaf, Tensor)
        ]
        first, reference = tensors[0]
        for name, tensor in tensors:
            if tensor.is_meta != reference.is_meta:
                raise ValueError(
                    f"{self._public}: {name} must be on the device of {first} "
                    f"({reference.device}); got {tensor.device}"
                )

    def _run_watched(self, args: tuple[Any, ...]) -> Any:
        """Runs where a mode, subclass or transform above autograd must see the call."""
        if _in_functorch():
            return self._transformable.apply(*args)
        return self.overload(*args)

    def _run_differentiable(self, args: tuple[Any, ...]) -> Any:
        # Autocast lies above autograd: the gradient must be that of the inputs it has cast.
        if _is_any_autocast_enabled() or self._takes_lists:
            return self.overload(*args)
        return self._function.apply(*args)

    # ---- gradients ----

    @functools.cached_property
    def _takes_lists(self) -> bool:
        """A plain Function would not see the tensors inside of lists."""
        schema = self.overload._schema
        values = (*schema.arguments, *schema.returns)
        return any(library_utils.is_tensorlist_like_type(value.type) for value in values)

    def _gradients(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The operator's backward, with None for the arguments at the end that it leaves out."""
        result = self._backward(ctx, *grads)
        result = result if isinstance(result, tuple) else (result,)
        if not self._takes_lists:
            return result + (None,) * (len(self.overload._schema.arguments) - len(result))
        # Torch takes an empty list of numbers for one of tensors, and wants a list for it.
        needed = ctx.needs_input_grad[len(result) :]
        return result + tuple([] if need == [] else None for need in needed)

    def _refuse_gradient(self, ctx: Any, *grads: Any) -> Any:
        what = "second derivatives are" if self.name.startswith("_") else "a gradient is"
        raise NotImplementedError(
            f"{self._public}: {what} not implemented. "
            'Use torchkiln.backend("reference"), which torch differentiates itself'
        )

    @functools.cached_property
    def _function(self) -> Any:
        """Saves what backward needs inside of forward: a third of the cost of a setup_context."""

        def forward(ctx: Any, *args: Any) -> Any:
            with _BelowAutograd():
                output = self.overload._op(*args)
            self._setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(self._gradients)}
        return type(f"torchkiln_{self.name}", (torch.autograd.Function,), members)

    @functools.cached_property
    def _transformable(self) -> Any:
        """The form that torch.func asks for; forward and backward are looped over under vmap."""
        if self._takes_lists:
            raise NotImplementedError(
                f"{self._public}: takes lists of tensors, which torch.func cannot transform. "
                'Use torchkiln.backend("reference")'
            )
        members = {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: self.overload(*args)),
            "setup_context": staticmethod(self._setup_context),
            "backward": staticmethod(self._gradients),
        }
        return type(f"torchkiln_{self.name}", (torch.autograd.Function,), members)

    @functools.cached_property
    def _registered(self) -> Callable[..., Any]:
        info = library_autograd.Info(self._gradients, self._setup_context)
        return library_autograd.make_autograd_impl(self.overload, info)

    def autograd_kernel(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """What `torch.library.register_autograd` would have registered."""
        if forward_ad._current_level >= 0:
            # The registered kernel would drop tangents without a word; a Function refuses them.
            args, _ = library_utils.fill_defaults(self.overload._schema, args, kwargs)
            if not self._takes_lists:
                return self._function.apply(*args)
            self._refuse_tangents(args)
            return self._registered(keyset, *args)
        return self._registered(keyset, *args, **kwargs)

    def _refuse_tangents(self, args: tuple[Any, ...]) -> None:
        tensors = (x for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise NotImplementedError(
                f"{self._public}: forward-mode differentiation (jvp) is not implemented. "
                'Use torchkiln.backend("reference"), which torch differentiates itself'
            )


class Frame:
    """The operators of one namespace.

    Args:
        namespace: of schemas that exist already; they are not looked up here.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._operators: dict[str, Operator[Any]] = {}
        self._fakes: dict[str, Callable[..., Any]] = {}

    def __iter__(self) -> Iterator[Operator[Any]]:
        return iter(self._operators.values())

    def __getitem__(self, name: str) -> Operator[Any]:
        return self._operators[name]

    def fake(self, name: str) -> Callable[..., Any]:
        """The function that computes an operator's output shapes."""
        return self._fakes[name]

    def operator(
        self,
        name: str,
        *,
        fake: Callable[..., Result],
        setup_context: Callable[..., None] = _saves_nothing,
        backward: Callable[..., Any] | None = None,
        autocast: torch.dtype | None = None,
        reference: Callable[..., Result] | None = None,
        public: str | None = None,
    ) -> Operator[Result]:
        """Registers all that Python adds to the schema `name`, and returns what calls it.

        Args:
            name: of the schema; a leading underscore marks an internal operator.
            fake: takes the schema's arguments and defaults, returns empty outputs. It must not turn
                a symbolic size into a number. `torch.library.get_ctx()` gives data-dependent sizes.
            setup_context: `(ctx, inputs, output)`, as of `torch.library.register_autograd`;
                `inputs` holds all arguments.
            backward: `(ctx, *grads)`, gradients of the arguments in order; those at the end may be
                left out. Without it the gradient is refused when it is asked for.
            autocast: dtype that floating-point inputs are cast to under autocast.
            reference: for tests; normally `torchkiln.reference.<name>`, found when it is needed.
            public: what errors call it, where that is not `name`.

        Returns:
            The operator. Its calls have the return type of `fake`.
        """
        if name in self._operators:
            raise RuntimeError(f"operator: {self._namespace}::{name} is registered twice")
        operator: Operator[Result] = Operator(
            self._namespace, name, setup_context, backward, reference, public
        )
        self._operators[name] = operator
        self._register_fake(operator, fake)
        self._implement(name, "Autograd", operator.autograd_kernel, with_keyset=True)
        if autocast is not None:
            for key, device in _AUTOCAST_DEVICES.items():
                kernel = functools.partial(_run_in_dtype, operator, key, device, autocast)
                self._implement(name, key, kernel, with_keyset=False)
        return operator

    def _implement(
        self, name: str, key: str, kernel: Callable[..., Any], *, with_keyset: bool
    ) -> None:
        # Not Library.impl: its bookkeeping costs more than the registration and is of no use here.
        self._library.m.impl(name, key, kernel, with_keyset)  # type: ignore[union-attr]

    def _register_fake(self, operator: Operator[Any], fake: Callable[..., Any]) -> None:
        """`torch.library.register_fake` without its search for source lines."""
        self._fakes[operator.name] = fake
        qualified = f"{self._namespace}::{operator.name}"
        holder = simple_registry.singleton.find(qualified).fake_impl
        holder.kernels.append(library_utils.Kernel(fake, fake.__module__))

        def meta_kernel(*args: Any, **kwargs: Any) -> Any:
            operator.require_meta(*args, **kwargs)
            return fake_impl.construct_meta_kernel(qualified, holder)(*args, **kwargs)

        self._implement(operator.name, "Meta", meta_kernel, with_keyset=False)


def unfit(op: str, name: str, value: object) -> TypeError:
    """The error for an argument that must be a tensor with strides and is none."""
    if isinstance(value, Tensor):
        return TypeError(
            f"{op}: {name} must be dense; got {value.layout}. Convert it with to_dense()"
        )
    got = "None" if value is None else type(value).__name__
    return TypeError(f"{op}: {name} must be a tensor; got {got}")


def _count_change(tensor: Tensor | None) -> None:
    """So that autograd refuses a gradient that was to read what is no longer there."""
    if tensor is not None and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _run_in_dtype(
    operator: Operator[Any], key: str, device: str, dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    """The autocast rule: casts floating-point inputs and calls again without autocast."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    with torch._C._ExcludeDispatchKeyGuard(excluded):
        return operator.overload(
            *autocast_mode._cast(args, device, dtype), **autocast_mode._cast(kwargs, device, dtype)
        )


def deterministic_default(deterministic: bool | None) -> bool:
    """Resolves a `deterministic` argument: None follows `torch.use_deterministic_algorithms`."""
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    return deterministic


#: The operators of torchkiln. `operator` is what an operator's file calls.
frame = Frame("torchkiln")
operator = frame.operator
