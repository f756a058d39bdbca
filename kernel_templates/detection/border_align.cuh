// border_align on the GPU: the kernels of sampled_roi.cuh on its samples.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/border_align.h"
#include "detection/sampled_roi.cuh"

namespace torchkiln::border_align {

TORCHKILN_SAMPLED_ROI_KERNELS(Pooled)

}  // namespace torchkiln::border_align
