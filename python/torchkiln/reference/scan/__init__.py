"""References of the operators for selective scans."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.reference.scan.causal_conv1d import *  # noqa: F403
from torchkiln.reference.scan.causal_conv1d_update import *  # noqa: F403
from torchkiln.reference.scan.selective_scan import *  # noqa: F403
from torchkiln.reference.scan.selective_state_update import *  # noqa: F403
