// riroi_align_rotated on the GPU: the kernels of sampled_roi.cuh on its samples.
// spills: up to 12 bytes for half types, by ptxas' own choice: no kernel asks for a number of blocks.
// compile time: above 250 ms for vectors of channels, whose four taps a sample are unrolled
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/riroi_align_rotated.h"
#include "detection/sampled_roi.cuh"

namespace torchkiln::riroi_align_rotated {

TORCHKILN_SAMPLED_ROI_KERNELS(Pooled)

}  // namespace torchkiln::riroi_align_rotated
