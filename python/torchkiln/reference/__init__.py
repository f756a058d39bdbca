"""Plain PyTorch versions of the operators, written from their definitions, one flat namespace.

Each has the arguments of its schema, runs on any device and in float64, and is differentiated by
torch. They share no code with the kernels: the tests judge the kernels by them.
"""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.reference.deformable import *  # noqa: F403
from torchkiln.reference.detection import *  # noqa: F403
from torchkiln.reference.filtering import *  # noqa: F403
from torchkiln.reference.point_cloud import *  # noqa: F403
from torchkiln.reference.scan import *  # noqa: F403
from torchkiln.reference.sparse import *  # noqa: F403
