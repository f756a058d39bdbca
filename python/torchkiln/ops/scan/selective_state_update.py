"""One position of a selective scan, from a state that is kept: what decoding does."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchkiln._frame import operator
from torchkiln.ops._arguments import dtype_name, require_device, require_tensor, shape, sum_dtype
from torchkiln.ops.scan.selective_scan import TRUE_TIME, method_of, parts_of

__all__ = ["scan_history", "selective_state_update"]

# Samples before its own that a rule takes in; those of poly lie behind it, too.
_BACK = {"foh": 1, "tustin": 1, "rk4": 1, "highorder": 2}


class ScanHistory(NamedTuple):
    """The last samples of each sequence, for rules that take them in; changed in place.

    Sample k lies in slot k modulo the number of slots, which is one more than a rule looks back.

    Attributes:
        x: (rows, slots, D), D all channels.
        B: (rows, slots, G, N), of a complex A with pairs of numbers as a last dimension.
        dt: (rows, slots, D), float32 (float64 for float64), the steps; for rules in true time.
        seen: (rows,) int32, how many samples came before.
    """

    x: Tensor
    B: Tensor
    dt: Tensor | None
    seen: Tensor


def _fake(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    method: int = 0,
    is_complex: bool = False,
    x_history: Tensor | None = None,
    B_history: Tensor | None = None,
    dt_history: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


_selective_state_update = operator("selective_state_update", fake=_fake)


def scan_history(
    u: Tensor,
    B: Tensor,
    discretization: str,
    *,
    true_time: bool = False,
    delta: Tensor | None = None,
) -> ScanHistory | None:
    """What `selective_state_update` must know of the samples that came before.

    Args:
        u: (batch, dim, length) as scanned so far; length 0 to begin with nothing.
        B: (batch, N, length) or (batch, G, N, length) as scanned so far; complex if A is.
        discretization: as for `selective_scan`.
        true_time: as for `selective_scan`.
        delta: (batch, dim, length), the steps after bias and softplus; needed in true time.

    Returns:
        None for the rules that take in their own sample only.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for poly, which takes in a later sample, for another name or shape, or steps
            that are missing.

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Example:
        >>> import torch
        >>> from torchkiln.ops import scan_history
        >>> history = scan_history(torch.ones(2, 4, 0), torch.ones(2, 16, 0), "foh")
        >>> history.x.shape, history.B.shape, history.seen
        (torch.Size([2, 2, 4]), torch.Size([2, 2, 1, 16]), tensor([0, 0], dtype=torch.int32))
    """
    method_of("scan_history", discretization, true_time)
    _check_samples(u, B)
    if discretization == "poly":
        raise ValueError(
            "scan_history: discretization must be a rule that needs no later sample; got 'poly'. "
            "Decode with highorder, or scan whole sequences"
        )
    back = _BACK.get(discretization, 0)
    if back == 0:
        return None
    B = B.unsqueeze(1) if B.dim() == 3 else B
    last = B.movedim(3, 1)
    if last.is_complex():
        last = torch.view_as_real(last.resolve_conj())
    steps = None
    if true_time and discretization in TRUE_TIME:
        delta = _checked_steps(u, delta)
        steps = _ring(delta.movedim(2, 1).to(sum_dtype(u.dtype)), back + 1)
    seen = torch.full((u.shape[0],), u.shape[2], dtype=torch.int32, device=u.device)
    return ScanHistory(
        _ring(u.movedim(2, 1), back + 1), _ring(last.to(u.dtype), back + 1), steps, seen
    )


def _check_samples(u: Tensor, B: Tensor) -> None:
    require_tensor("scan_history", u=u, B=B)
    require_device("scan_history", u=u, B=B)
    if u.dim() != 3:
        raise ValueError(f"scan_history: u must have shape (B, D, L); got {shape(u)}")
    batch, _, length = u.shape
    if B.dim() not in (3, 4) or B.shape[0] != batch or B.shape[-1] != length:
        raise ValueError(
            f"scan_history: B must have shape ({batch}, N, {length}) or ({batch}, G, N, {length}); "
            f"got {shape(B)}. Expand a constant one"
        )


def _checked_steps(u: Tensor, delta: Tensor | None) -> Tensor:
    if delta is None:
        raise ValueError("scan_history: delta must be given in true time; got None")
    require_tensor("scan_history", delta=delta)
    require_device("scan_history", u=u, delta=delta)
    if delta.shape != u.shape:
        raise ValueError(f"scan_history: delta must have shape {shape(u)}; got {shape(delta)}")
    return delta


def _ring(samples: Tensor, slots: int) -> Tensor:
    """The last of (batch, length, ...) samples, each in its slot."""
    length = samples.shape[1]
    ring = samples.new_zeros(samples.shape[0], slots, *samples.shape[2:])
    for k in range(max(length - slots, 0), length):
        ring[:, k % slots] = samples[:, k]
    return ring


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    discretization: str = "mamba",
    true_time: bool = False,
    history: ScanHistory | None = None,
) -> Tensor:
    """Goes on with `selective_scan` by one position from its state, which is changed in place.

    Args:
        state: (B, D, N), or (B, H, D, N) with heads; dtype of `x` or float32, if A is complex,
            complex64 (complex128 beside float64); any strides.
        x: (B, D) or (B, H, D), float16, bfloat16, float32 or float64.
        dt: steps, like `x`.
        A: (D, N) or (H, D, N), dtype of `x` or float32, or complex; strides of 0 cost nothing.
        B: (B, N) or (B, G, N), dtype of `x`: channels, or heads where there are any, share it in G
            equal groups. With a complex A: complex of any dtype, rounded to that of `x`; or 2 N
            real numbers, real and imaginary parts in turns.
        C: like `B`.
        D: (D,) or (H, D), dtype of `x` or float32.
        z: like `x`; the output is multiplied by silu(z).
        dt_bias: like `D`.
        dt_softplus: whether the steps go through softplus.
        state_batch_indices: (B,) int32: `state` is (rows, ...), and this is the row of each
            sequence, no row twice. Below 0 (on CUDA from `rows` on, too): there is none, the
            result is 0.
        discretization: as for `selective_scan`; poly is refused, as it takes in a later sample.
        true_time: as for `selective_scan`.
        history: for foh, tustin, rk4 and highorder, of `scan_history`; changed in place.

    Returns:
        The shape and dtype of `x`, contiguous.

    Raises:
        TypeError: for another dtype, or a history of another kind.
        ValueError: for another shape or discretization, different devices, or a history that is
            missing or of no use.
        IndexError: for a row beyond the state, on the CPU.

    Differentiable: no. Deterministic: yes. Autocast: as without.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
        section 3; the rules as for `selective_scan`.

    Example:
        >>> import torch
        >>> from torchkiln.ops import selective_state_update
        >>> state = torch.zeros(1, 1, 1)
        >>> one = torch.ones(1, 1)
        >>> for _ in range(2):
        ...     print(selective_state_update(state, one, one / 2, -one, one, one,
        ...                                  discretization="zoh"))
        tensor([[0.3935]])
        tensor([[0.6321]])
    """
    require_tensor("selective_state_update", state=state, x=x, dt=dt, A=A, B=B, C=C)
    method = method_of("selective_state_update", discretization, true_time)
    _check_history(history, discretization)
    is_complex, changed = A.is_complex(), state
    if is_complex:
        changed = _parts_to_change(state, x)
        A = parts_of(A, x.dtype)
        B, C = _pairs("B", B, x.dtype), _pairs("C", C, x.dtype)
    if B.dim() - is_complex == 2:
        B = B.unsqueeze(1)
    if C.dim() - is_complex == 2:
        C = C.unsqueeze(1)
    out = _selective_state_update(
        changed,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        state_batch_indices,
        method,
        is_complex,
        *((None,) * 4 if history is None else history),
    )
    if is_complex and _is_copied(state):
        state.copy_(torch.view_as_complex(changed))
    if history is not None:
        _count(history.seen, state_batch_indices)
    return out


def _check_history(history: ScanHistory | None, discretization: str) -> None:
    if history is None:
        return
    if not isinstance(history, ScanHistory):
        raise TypeError(
            "selective_state_update: history must be a ScanHistory or None; got "
            f"{type(history).__name__}. Make one with torchkiln.ops.scan_history"
        )
    # Its samples would be counted, but not kept.
    if discretization not in (*_BACK, "poly"):
        raise ValueError(
            "selective_state_update: history must be None for a rule that takes in its own sample "
            f"only; got one beside {discretization!r}. Leave it out"
        )


def _is_copied(state: Tensor) -> bool:
    """Graphs cannot write through the real view of a complex tensor; a conjugate has none."""
    return torch.compiler.is_compiling() or state.is_conj()


def _parts_to_change(state: Tensor, x: Tensor) -> Tensor:
    """Real and imaginary parts of a complex state: the same memory where there can be."""
    wanted = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    if state.dtype != wanted:
        name = str(wanted).removeprefix("torch.")
        raise TypeError(
            f"selective_state_update: state must be {name} beside a complex A and x of "
            f"{dtype_name(x)}; got {dtype_name(state)}"
        )
    parts = torch.view_as_real(state.resolve_conj())
    return parts.clone() if _is_copied(state) else parts


def _pairs(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex numbers, or real and imaginary parts in turns, as pairs."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()).to(dtype)
    if tensor.dim() == 0 or tensor.shape[-1] % 2:
        raise ValueError(
            f"selective_state_update: {name} must be complex beside a complex A, or have shape "
            f"(..., 2 N); got {shape(tensor)}"
        )
    parts: Tensor = tensor.unflatten(-1, (-1, 2))
    return parts


def _count(seen: Tensor, rows: Tensor | None) -> None:
    """On a GPU an index beyond `seen` would be an assertion there, from which nothing recovers."""
    if rows is None:
        seen += 1
    elif len(seen):
        exists = (rows >= 0) & (rows < len(seen))
        seen.index_add_(0, (rows * exists).long(), exists.to(seen.dtype))
