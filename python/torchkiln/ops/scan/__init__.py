"""Operators for selective scans."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.ops.scan.causal_conv1d import *  # noqa: F403
from torchkiln.ops.scan.causal_conv1d_update import *  # noqa: F403
from torchkiln.ops.scan.mamba_inner import *  # noqa: F403
from torchkiln.ops.scan.selective_scan import *  # noqa: F403
from torchkiln.ops.scan.selective_state_update import *  # noqa: F403
