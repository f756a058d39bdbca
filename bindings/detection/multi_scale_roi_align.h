// What the CUDA and the CPU half of multi_scale_roi_align share: the checked inputs and their layout.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "bindings/detection/roi_align.h"
#include "detection/multi_scale_roi_align.h"

namespace torchkiln::bindings {

// `maps` are the inputs and `bins` the output, or all their gradients. A level without pixels is one pixel of zeros here.
struct MultiScalePlan {
  bool channels_last;
  std::vector<Tensor> maps;
  Tensor boxes, bins;
  multi_scale_roi_align::Args args;
};

// How regions find their level and their place there.
struct MultiScaleLevels {
  const std::vector<double>& spatial_scales;
  const std::vector<double>& level_sides;
};

MultiScalePlan plan_multi_scale(const std::vector<Tensor>& inputs, const Tensor& boxes,
                                const RoiAlignOptions& options, const MultiScaleLevels& levels);
// `sizes`: height and width of each level.
MultiScalePlan plan_multi_scale_backward(const Tensor& grad_output, const Tensor& boxes,
                                         std::int64_t n, std::int64_t c,
                                         const std::vector<std::int64_t>& sizes,
                                         const RoiAlignOptions& options,
                                         const MultiScaleLevels& levels, bool channels_last);

// The gradients of the inputs, in their shapes.
std::vector<Tensor> gradients_of(const MultiScalePlan& p, const std::vector<std::int64_t>& sizes);

}  // namespace torchkiln::bindings
