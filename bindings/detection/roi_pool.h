// What the CUDA and the CPU half of roi_pool share: the checked inputs and their layout.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/support/layout.h"
#include "detection/roi_pool.h"

namespace torchkiln::bindings {

// The kernel arguments, and the tensors that keep their pointers alive.
struct RoiPoolPlan {
  Tensor input, boxes, output, argmax;
  bool channels_last;
  roi_pool::Args args;
};
struct RoiPoolBackwardPlan {
  Tensor grad_output, argmax, boxes, grad_input;
  bool channels_last;
  roi_pool::BackwardArgs args;
};

RoiPoolPlan plan_roi_pool(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                          std::int64_t pooled_width, double spatial_scale, bool rounding,
                          bool with_argmax);
RoiPoolBackwardPlan plan_roi_pool_backward(const Tensor& grad_output, const Tensor& argmax,
                                           const Tensor& boxes, std::int64_t images,
                                           std::int64_t height, std::int64_t width,
                                           double spatial_scale, bool rounding);

// Bytes of a cell's code.
std::int64_t roi_pool_code_bytes(const roi_pool::Shape& shape);

}  // namespace torchkiln::bindings
