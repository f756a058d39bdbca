"""Operators for deformable convolution, attention and aggregation."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.ops.deformable.deformable_aggregation import *  # noqa: F403
from torchkiln.ops.deformable.multi_scale_deformable_attention import *  # noqa: F403
