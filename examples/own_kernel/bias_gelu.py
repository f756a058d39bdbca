"""y = gelu(x + bias) * mask * scale as an operator: one pass over memory instead of four.

What a layer does between two matrix products when it trains: bias, activation, dropout. The mask
is given, so that a program decides where it comes from.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import torchkiln
from torchkiln import ceil_div
from torchkiln.testing import FLOATS, Case, Inputs

# ---- kernels ----

TUNABLES = {"vector": [1, 2, 4, 8], "block_size": [128, 256, 512], "rows_at_once": [1, 2, 4]}
# The first one that is legal.
DEFAULTS = [{"vector": v, "block_size": 256, "rows_at_once": 2} for v in (8, 4, 2, 1)]


def is_legal(p: Any) -> bool:
    """A pack has at most 16 bytes, and is loaded at once where rows begin at such a place."""
    return p.vector * p.Scalar.itemsize <= 16 and (p.aligned or p.vector == 1)


forward_kernel = torchkiln.Kernel(
    "bias_gelu.cuh",
    "bias_gelu::forward",
    template={"Scalar": FLOATS, "aligned": [False, True]},
    tunables=TUNABLES,
    args={
        "x": "in Scalar",
        "bias": "in Scalar",
        "mask": "in u8",
        "y": "out Scalar",
        "rows": "size i64",
        "columns": "size i64",
        "scale": "double",
    },
    grid=lambda p: blocks(p, ceil_div(p.rows, p.rows_at_once)),
    legal=is_legal,
    default=DEFAULTS,
)

backward_kernel = torchkiln.Kernel(
    "bias_gelu.cuh",
    "bias_gelu::backward",
    template={"Scalar": FLOATS, "Sum": [torch.float32, torch.float64], "aligned": [False, True]},
    tunables=TUNABLES,
    args={
        "grad_y": "in Scalar",
        "x": "in Scalar",
        "bias": "in Scalar",
        "mask": "in u8",
        "grad_x": "out Scalar",
        "sums": "out Sum",
        "rows": "size i64",
        "columns": "size i64",
        "strip_rows": "size i64",
        "scale": "double",
    },
    grid=lambda p: blocks(p, ceil_div(p.rows, p.strip_rows)),
    legal=is_legal,
    default=DEFAULTS,
)


def blocks(p: Any, strips: int) -> int:
    """One thread for each strip of rows and pack of columns."""
    threads = strips * (p.columns // p.vector)
    if threads >= 2**32:
        raise ValueError(f"bias_gelu: x must have fewer elements; got {p.rows} x {p.columns}")
    return ceil_div(threads, p.block_size)


# ---- the operator ----


def wide_dtype(x: Tensor) -> torch.dtype:
    """What it is computed in: float32 for the half types."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """In that dtype."""
    return x.to(wide_dtype(x))


def check(x: Tensor, bias: Tensor, mask: Tensor) -> None:
    """What the kernels must be able to count on."""
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu: bias must have shape {tuple(x.shape[-1:])}; got {tuple(bias.shape)}"
        )
    if mask.shape != x.shape or mask.dtype != torch.uint8:
        raise ValueError(
            f"bias_gelu: mask must be uint8 of shape {tuple(x.shape)}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def plain(x: Tensor, bias: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The operator in plain PyTorch: what it must equal, and what runs on the CPU."""
    check(x, bias, mask)
    v = wide(x) + wide(bias)
    y = v * 0.5 * (1 + torch.erf(v / math.sqrt(2))) * mask * scale
    return y.to(x.dtype).contiguous()


def launch(x: Tensor, bias: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The operator on CUDA."""
    check(x, bias, mask)
    x, bias, mask = x.contiguous(), bias.contiguous(), mask.contiguous()
    y = torch.empty_like(x)
    rows, columns = sizes(x)
    forward_kernel(x, bias, mask, y, rows, columns, scale, aligned=is_aligned(x, bias, mask))
    return y


def plain_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias in plain PyTorch, from the derivative of gelu."""
    v = wide(x) + wide(bias)
    cdf = 0.5 * (1 + torch.erf(v / math.sqrt(2)))
    density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    grad = wide(grad_y) * mask * scale * (cdf + v * density)
    grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad.clone()
    return grad.to(x.dtype).contiguous(), grad_bias.to(bias.dtype)


def launch_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias on CUDA: one sum for each strip of rows, then their sum."""
    grad_y, x, bias, mask = (t.contiguous() for t in (grad_y, x, bias, mask))
    rows, columns = sizes(x)
    # By the sizes alone, so that tuning changes no bit; enough strips to fill any GPU.
    strip_rows = max(16, ceil_div(x.numel(), 2**20))
    grad_x = torch.empty_like(x)
    sums = x.new_empty(ceil_div(rows, strip_rows), columns, dtype=wide_dtype(x))
    tensors = (grad_y, x, bias, mask, grad_x, sums)
    aligned = is_aligned(grad_y, x, bias, mask)
    backward_kernel(*tensors, rows, columns, strip_rows, scale, aligned=aligned)
    return grad_x, sums.sum(0).to(bias.dtype)


def sizes(x: Tensor) -> tuple[int, int]:
    """Rows and columns."""
    columns = x.shape[-1]
    return x.numel() // max(columns, 1), columns


def is_aligned(x: Tensor, *others: Tensor) -> bool:
    """Whether each row of each tensor begins at a multiple of 16 bytes, one of bytes at 8."""
    return x.shape[-1] % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in (x, *others))


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the gradients need."""
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and bias; mask and scale have none."""
    return (*bias_gelu_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


# ---- what it is tried on ----


def arguments(new: Inputs, *shape: int) -> dict[str, Any]:
    """Random ones of a shape."""
    mask = new.integers(*shape, high=2).to(torch.uint8)
    return {"x": new.normal(*shape) * 2, "bias": new.normal(shape[-1]), "mask": mask, "scale": 1.25}


CASES = (
    Case("typical", lambda new: arguments(new, 37, 64)),
    Case("odd_columns", lambda new: arguments(new, 41, 13)),
    Case("three_dimensions", lambda new: arguments(new, 3, 5, 24)),
    Case("many_strips", lambda new: arguments(new, 530, 40)),
    Case("one_row", lambda new: arguments(new, 72)),
    Case("single", lambda new: arguments(new, 1, 1)),
    Case("no_rows", lambda new: arguments(new, 0, 8)),
    Case("no_columns", lambda new: arguments(new, 8, 0)),
)

bias_gelu_backward = torchkiln.library.op(
    "own_kernel::bias_gelu_backward", launch_backward, reference=plain_backward
)
bias_gelu = torchkiln.library.op(
    "own_kernel::bias_gelu",
    launch,
    reference=plain,
    setup_context=keep_inputs,
    backward=gradients,
    cases=CASES,
    tier="A",
    differentiable=("x", "bias"),
    dtypes=FLOATS,
)
