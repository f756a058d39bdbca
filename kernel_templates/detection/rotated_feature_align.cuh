// rotated_feature_align on the GPU: the kernels of sampled_roi.cuh on its samples.
// spills: up to 40 bytes in float64, by ptxas' own choice: no kernel asks for a number of blocks.
// compile time: around 250 ms for vectors of channels, whose four taps a sample are unrolled
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/rotated_feature_align.h"
#include "detection/sampled_roi.cuh"

namespace torchkiln::rotated_feature_align {

TORCHKILN_SAMPLED_ROI_KERNELS(Pooled)

}  // namespace torchkiln::rotated_feature_align
