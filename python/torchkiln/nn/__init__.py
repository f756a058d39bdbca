"""Modules around the operators, for those that have parameters or settings worth keeping."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.nn.bezier_align import *  # noqa: F403
from torchkiln.nn.border_align import *  # noqa: F403
from torchkiln.nn.corner_pool import *  # noqa: F403
from torchkiln.nn.deformable_aggregation import *  # noqa: F403
from torchkiln.nn.mamba import *  # noqa: F403
from torchkiln.nn.multi_scale_deformable_attention import *  # noqa: F403
from torchkiln.nn.multi_scale_roi_align import *  # noqa: F403
from torchkiln.nn.prroi_pool import *  # noqa: F403
from torchkiln.nn.ps_roi_pool import *  # noqa: F403
from torchkiln.nn.riroi_align_rotated import *  # noqa: F403
from torchkiln.nn.roi_align import *  # noqa: F403
from torchkiln.nn.roi_align_rotated import *  # noqa: F403
from torchkiln.nn.roi_pool import *  # noqa: F403
from torchkiln.nn.sigmoid_focal_loss import *  # noqa: F403
from torchkiln.nn.simple_roi_align import *  # noqa: F403
from torchkiln.nn.softmax_focal_loss import *  # noqa: F403

# Without the modules that they stand in.
__all__ = sorted(
    name for name, value in globals().items() if callable(value) and not name.startswith("_")
)
