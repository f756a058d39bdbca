"""The operators, one flat namespace."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.ops.deformable import *  # noqa: F403
from torchkiln.ops.detection import *  # noqa: F403
from torchkiln.ops.filtering import *  # noqa: F403
from torchkiln.ops.point_cloud import *  # noqa: F403
from torchkiln.ops.scan import *  # noqa: F403
from torchkiln.ops.sparse import *  # noqa: F403

# Without the modules that they stand in.
__all__ = sorted(
    name for name, value in globals().items() if callable(value) and not name.startswith("_")
)
