"""The names of Deformable DETR's extension, under which its descendants import it, too.

    from torchkiln.compat.deformable_detr import MSDeformAttn        # models.ops.modules
    from torchkiln.compat.deformable_detr import MSDeformAttnFunction  # models.ops.functions

A project that keeps its own `ops` folder and only builds the extension runs unchanged after
`install()`, which stands in for the compiled module `MultiScaleDeformableAttention`.

There is no limit on batch sizes: `im2col_step` has no effect. Half types are added up in float32.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

from torchkiln.compat.mmcv._common import function_class
from torchkiln.compat.mmcv._ops.multi_scale_deform_attn import (
    attend,
    multi_scale_deformable_attn_pytorch,
)
from torchkiln.nn.multi_scale_deformable_attention import Projections

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "install",
    "ms_deform_attn_backward",
    "ms_deform_attn_core_pytorch",
    "ms_deform_attn_forward",
    "uninstall",
]

EXTENSION = "MultiScaleDeformableAttention"

MSDeformAttnFunction = function_class("MSDeformAttnFunction", attend)
ms_deform_attn_core_pytorch = multi_scale_deformable_attn_pytorch


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """The extension's forward: (B, Q, M * D), without a gradient."""
    with torch.no_grad():
        return attend(
            value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step
        )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The extension's backward: gradients of `value`, `sampling_loc` and `attn_weight`."""
    leaves = [x.detach().requires_grad_() for x in (value, sampling_loc, attn_weight)]
    with torch.enable_grad():
        output = attend(
            leaves[0], spatial_shapes, level_start_index, leaves[1], leaves[2], im2col_step
        )
    of_value, of_locations, of_weights = torch.autograd.grad(output, leaves, grad_output)
    return of_value, of_locations, of_weights


class MSDeformAttn(Projections):
    """Deformable DETR's layer, on the CPU too; its checkpoints load.

    Args:
        d_model: channels.
        n_levels: of the pyramid.
        n_heads: divides `d_model`.
        n_points: of a head on each level.

    Raises:
        ValueError: where `n_heads` does not divide `d_model`, or reference points have neither two
            nor four numbers.
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"MSDeformAttn: d_model must be divisible by n_heads; got {d_model} and {n_heads}"
            )
        of_head = d_model // n_heads
        if of_head & (of_head - 1):
            warnings.warn(
                f"MSDeformAttn: heads of a power of 2 of channels are faster; got {of_head}",
                stacklevel=2,
            )
        self.im2col_step = 64
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.add_projections(d_model, d_model, n_heads, n_levels, n_points)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        self.reset_projections()

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns (B, Q, C) of queries (B, Q, C) and pixels (B, S, C); True masks padding."""
        if input_spatial_shapes.is_cpu:
            # On a GPU this would wait for it.
            assert int(input_spatial_shapes.prod(1).sum()) == input_flatten.shape[1]
        if reference_points.shape[-1] not in (2, 4):
            raise ValueError(
                "MSDeformAttn: the last dimension of reference_points must be 2 or 4; "
                f"got {reference_points.shape[-1]}"
            )
        levels = (input_spatial_shapes, input_level_start_index)
        return self.attend(query, reference_points, input_flatten, *levels, input_padding_mask)


def install() -> ModuleType:
    """Lets `import MultiScaleDeformableAttention` find these functions; returns the module.

    Raises:
        RuntimeError: where the compiled extension is imported already.
    """
    there = sys.modules.get(EXTENSION)
    if there is not None and not hasattr(there, "__torchkiln__"):
        raise RuntimeError(
            f"deformable_detr.install: {EXTENSION} must not be imported yet; got {there!r}. "
            "Call install() first"
        )
    module = ModuleType(EXTENSION, __doc__)
    module.__spec__ = ModuleSpec(EXTENSION, None)  # find_spec raises without one
    module.__dict__["__torchkiln__"] = True
    for function in (ms_deform_attn_forward, ms_deform_attn_backward):
        setattr(module, function.__name__, function)
    sys.modules[EXTENSION] = module
    return module


def uninstall() -> None:
    """Takes it back."""
    if hasattr(sys.modules.get(EXTENSION), "__torchkiln__"):
        del sys.modules[EXTENSION]
