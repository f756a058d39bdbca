// border_align on the GPU: the kernels of sampled_roi.cuh on its samples.
// compile time: above 250 ms for vectors of channels, each with its maximum and the number of its sample
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/border_align.h"
#include "detection/sampled_roi.cuh"

namespace torchkiln::border_align {

TORCHKILN_SAMPLED_ROI_KERNELS(Pooled)

}  // namespace torchkiln::border_align
