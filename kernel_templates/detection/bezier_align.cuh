// bezier_align on the GPU: the kernels of sampled_roi.cuh on its samples.
// spills: up to 8 bytes in float64, by ptxas' own choice: no kernel asks for a number of blocks.
// compile time: above 250 ms; a bin is four cubic curves, and is clipped in float64
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/bezier_align.h"
#include "detection/sampled_roi.cuh"

namespace torchkiln::bezier_align {

TORCHKILN_SAMPLED_ROI_KERNELS(Pooled)

}  // namespace torchkiln::bezier_align
