// What the CUDA and the CPU half of prroi_pool share: roi_align's plans, with its own name in their errors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/detection/roi_align.h"
#include "detection/prroi_pool.h"

namespace torchkiln::bindings {

inline constexpr const char* kPrRoiPool = "prroi_pool";

// The gradient of boxes: `bins` are gradients, in the layout of the input.
struct PrRoiPoolBoxPlan {
  RoiAlignPlan pooled;
  Tensor grad_boxes;
};

RoiAlignPlan plan_prroi_pool(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                             std::int64_t pooled_width, double spatial_scale);
RoiAlignPlan plan_prroi_pool_backward(const Tensor& grad_output, const Tensor& boxes,
                                      const RoiAlignShape& shape, double spatial_scale,
                                      bool channels_last);
PrRoiPoolBoxPlan plan_prroi_pool_boxes(const Tensor& grad_output, const Tensor& input,
                                       const Tensor& boxes, double spatial_scale);

}  // namespace torchkiln::bindings
