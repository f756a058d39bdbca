"""References of the operators for boxes."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.reference.detection.box_iou import *  # noqa: F403
from torchkiln.reference.detection.sigmoid_focal_loss import *  # noqa: F403
