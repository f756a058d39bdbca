"""SelectiveScan, Mamba and BidirectionalMamba: layers around selective_scan."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchkiln.ops import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_inner_fn,
    scan_history,
    selective_scan,
    selective_state_update,
)
from torchkiln.ops._arguments import require_choice, require_shape, widened
from torchkiln.ops.scan.mamba_inner import project
from torchkiln.ops.scan.selective_scan import METHODS
from torchkiln.ops.scan.selective_state_update import ScanHistory

__all__ = ["BidirectionalMamba", "Mamba", "MambaState", "SelectiveScan"]


_DT_INITS = {"random": None, "constant": None}


def _rank(op: str, dt_rank: int | str, channels: int) -> int:
    """Of the projection of the steps."""
    if dt_rank == "auto":
        return math.ceil(channels / 16)
    if not isinstance(dt_rank, int) or dt_rank < 1:
        raise ValueError(f'{op}: dt_rank must be "auto" or at least 1; got {dt_rank!r}')
    return dt_rank


class SelectiveScan(nn.Module):
    """A selective scan with its parameters: steps, B and C are projections of the input.

    Args:
        dim: channels.
        d_state: states of a channel.
        dt_rank: of the projection of the steps; "auto": dim / 16, rounded up.
        dt_min: smallest step at the start.
        dt_max: largest step at the start; they are log-uniform between the two.
        dt_init: how the weight of the projection of the steps starts: "random", uniform, or
            "constant".
        dt_scale: of that weight, which is within dt_scale / sqrt(dt_rank).
        dt_init_floor: no step is smaller at the start.
        discretization_method: `discretization` of `torchkiln.ops.selective_scan`.
        reverse: whether it scans from the last position to the first.
        device: of the parameters.
        dtype: of the parameters; A_log and D are float32 beside a half type.

    Raises:
        ValueError: for another word, or a dt_rank below 1.

    Example:
        >>> import torch
        >>> from torchkiln.nn import SelectiveScan
        >>> SelectiveScan(8)(torch.zeros(2, 8, 5)).shape
        torch.Size([2, 8, 5])
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        discretization_method: str = "mamba",
        reverse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "SelectiveScan"
        require_choice(op, "discretization_method", discretization_method, METHODS)
        require_choice(op, "dt_init", dt_init, _DT_INITS)
        self.discretization_method = discretization_method
        self.reverse = reverse
        self.dt_rank = rank = _rank(op, dt_rank, dim)
        self.d_state = d_state
        self.x_proj = nn.Linear(dim, rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_proj = nn.Linear(rank, dim, device=device, dtype=dtype)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        steps = torch.rand(dim, device=device, dtype=wide)
        steps = torch.exp(steps * math.log(dt_max / dt_min) + math.log(dt_min))
        steps = steps.clamp(min=dt_init_floor)
        bound = dt_scale * rank**-0.5
        with torch.no_grad():
            self.dt_proj.weight.uniform_(bound if dt_init == "constant" else -bound, bound)
            # The inverse of softplus.
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        rates = torch.arange(1, d_state + 1, device=device, dtype=wide)
        self.A_log = nn.Parameter(rates.log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim, device=device, dtype=wide))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Returns (batch, dim, length) for x, and a gate z, of that shape."""
        require_shape("SelectiveScan", ("batch", self.x_proj.in_features, "length"), x=x)
        rows = project(self.x_proj.weight, x)
        rank, n = self.dt_rank, self.d_state
        delta = project(self.dt_proj.weight, rows[:, :rank])
        out = selective_scan(
            x,
            delta,
            -widened(self.A_log).exp(),
            rows[:, rank : rank + n],
            rows[:, rank + n :],
            widened(self.D),
            z,
            widened(self.dt_proj.bias),
            True,
            self.discretization_method,
            reverse=self.reverse,
        )
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        """Shows the rule."""
        return f"discretization_method={self.discretization_method!r}, reverse={self.reverse}"


@dataclass
class MambaState:
    """What `Mamba.step` keeps of a sequence; changed in place.

    Attributes:
        conv: (batch, d_inner, d_conv - 1), the last inputs of the convolution.
        scan: (batch, d_inner, d_state), of the scan.
        history: the last samples, for rules that take them in.
    """

    conv: Tensor
    scan: Tensor
    history: ScanHistory | None


class Mamba(nn.Module):
    """A Mamba block; arguments and parameters have the names and shapes of mamba-ssm's.

    Args:
        d_model: channels of input and output.
        d_state: states of a channel.
        d_conv: width of the convolution.
        expand: inner channels are expand * d_model.
        dt_rank: of the projection of the steps; "auto": d_model / 16, rounded up.
        dt_min: smallest step at the start.
        dt_max: largest step at the start; they are log-uniform between the two.
        dt_init: as of `SelectiveScan`.
        dt_scale: as of `SelectiveScan`.
        dt_init_floor: no step is smaller at the start.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections have one.
        use_fast_path: has no effect: there is one path, on every device.
        layer_idx: kept as an attribute; states are handed to `step`, not looked up by it.
        device: of the parameters.
        dtype: of the parameters; A_log and D are float32 beside a half type.
        discretization_method: `discretization` of `torchkiln.ops.selective_scan`.
        reverse: whether it goes from the last position to the first.

    Raises:
        ValueError: for another word, or a dt_rank below 1.

    Example:
        >>> import torch
        >>> from torchkiln.nn import Mamba
        >>> Mamba(8, discretization_method="zoh")(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        discretization_method: str = "mamba",
        reverse: bool = False,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        rank = _rank("Mamba", dt_rank, d_model)
        scan = SelectiveScan(
            inner,
            d_state,
            rank,
            dt_min,
            dt_max,
            dt_init,
            dt_scale,
            dt_init_floor,
            discretization_method,
            reverse,
            device,
            dtype,
        )
        self.d_inner, self.d_state, self.dt_rank = inner, d_state, rank
        self.discretization_method, self.reverse = discretization_method, reverse
        self.layer_idx = layer_idx
        factory: Any = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        # Where mamba-ssm has them: state dicts are exchanged.
        self.x_proj, self.dt_proj = scan.x_proj, scan.dt_proj
        self.A_log, self.D = scan.A_log, scan.D
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, length, d_model) for x of that shape."""
        return self._inner(self._project(x), self.out_proj.weight, self.out_proj.bias)

    def mixed(self, xz: Tensor) -> Tensor:
        """What lies between the projections: (batch, d_inner, length) of (batch, 2 d_inner, L)."""
        return self._inner(xz, None, None)

    def _project(self, x: Tensor, op: str = "Mamba") -> Tensor:
        """X and z as (batch, 2 d_inner, length), positions contiguous."""
        require_shape(op, ("batch", "length", self.in_proj.in_features), x=x)
        xz = project(self.in_proj.weight, x.transpose(1, 2))
        return xz if self.in_proj.bias is None else xz + self.in_proj.bias[:, None].to(xz.dtype)

    def _inner(self, xz: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return mamba_inner_fn(
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            weight,
            bias,
            -widened(self.A_log).exp(),
            D=widened(self.D),
            delta_bias=widened(self.dt_proj.bias),
            discretization=self.discretization_method,
            reverse=self.reverse,
        )

    @torch.no_grad()
    def prefill(self, x: Tensor) -> tuple[Tensor, MambaState]:
        """Runs (batch, length, d_model), length 0 to begin with nothing, and returns a state too.

        Raises:
            ValueError: for a reversed block, and for poly, which takes in a later sample.
        """
        if self.reverse:
            raise ValueError("Mamba.prefill: reverse must be False to decode; got True")
        inner, z = self._project(x).chunk(2, dim=1)
        inner, conv = causal_conv1d_fn(
            inner,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            return_final_states=True,
            activation="silu",
        )
        rows = project(self.x_proj.weight, inner)
        B, C = rows[:, self.dt_rank :].split(self.d_state, 1)
        history = scan_history(inner, B, self.discretization_method)
        out, scan = selective_scan(
            inner,
            project(self.dt_proj.weight, rows[:, : self.dt_rank]),
            -widened(self.A_log).exp(),
            B,
            C,
            widened(self.D),
            z,
            widened(self.dt_proj.bias),
            True,
            self.discretization_method,
            return_last_state=True,
        )
        return self.out_proj(out.transpose(1, 2)), MambaState(conv, scan, history)

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaState) -> Tensor:
        """Returns (batch, d_model) for the next position x of that shape; changes the state."""
        require_shape("Mamba.step", ("batch", self.in_proj.in_features), x=x)
        inner, z = self.in_proj(x).chunk(2, dim=1)
        inner = causal_conv1d_update(
            inner, state.conv, self.conv1d.weight[:, 0], self.conv1d.bias, "silu"
        )
        dt, B, C = self.x_proj(inner).split([self.dt_rank, self.d_state, self.d_state], 1)
        out = selective_state_update(
            state.scan,
            inner,
            functional.linear(dt, self.dt_proj.weight),
            -widened(self.A_log).exp(),
            B,
            C,
            widened(self.D),
            z,
            widened(self.dt_proj.bias),
            True,
            discretization=self.discretization_method,
            history=state.history,
        )
        projected: Tensor = self.out_proj(out)
        return projected

    def extra_repr(self) -> str:
        """Shows the rule."""
        return f"discretization_method={self.discretization_method!r}, reverse={self.reverse}"


class BidirectionalMamba(nn.Module):
    """A block as in Vision Mamba: two scans of one projection, from both ends, are added.

    Both directions have parameters of their own, `ahead.*` and `back.*`, and the same rule; the
    projections are `ahead.in_proj` and `ahead.out_proj`.

    Args:
        d_model: channels of input and output.
        d_state: states of a channel.
        d_conv: width of the convolutions.
        expand: inner channels are expand * d_model.
        dt_rank: of the projection of the steps; "auto": d_model / 16, rounded up.
        divide: whether the mean of the two is taken instead of their sum.
        discretization_method: `discretization` of `torchkiln.ops.selective_scan`.
        device: of the parameters.
        dtype: of the parameters, as of `Mamba`.

    Source:
        Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State
        Space Model", 2024, algorithm 1.

    Example:
        >>> import torch
        >>> from torchkiln.nn import BidirectionalMamba
        >>> BidirectionalMamba(8)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        divide: bool = False,
        discretization_method: str = "mamba",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.divide = divide
        self.ahead, back = (
            Mamba(
                d_model,
                d_state,
                d_conv,
                expand,
                dt_rank,
                device=device,
                dtype=dtype,
                discretization_method=discretization_method,
                reverse=reverse,
            )
            for reverse in (False, True)
        )
        # The projections are shared.
        del back.in_proj, back.out_proj
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, length, d_model) for x of that shape."""
        xz = self.ahead._project(x, "BidirectionalMamba")
        both = self.ahead.mixed(xz) + self.back.mixed(xz)
        both = both / 2 if self.divide else both
        projected: Tensor = self.ahead.out_proj(both.transpose(1, 2))
        return projected
