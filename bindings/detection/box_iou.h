// What the CUDA and the CPU half of box_iou share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "bindings/support/tensor.h"
#include "detection/box_iou.h"

namespace torchkiln::bindings {

// What the operator is asked for beside its tensors.
struct BoxIouOptions {
  std::int64_t mode;
  double eps;
  bool aligned;
  double offset;
};

// The kernel arguments, and the tensors that keep their pointers alive.
struct BoxIouPlan {
  Tensor boxes1, boxes2, out;
  box_iou::Args args;
};

// One side of the gradient; the other one is the same call with the sets and the strides swapped.
struct BoxIouSide {
  Tensor grad_output, boxes, others, grad_boxes;
  box_iou::BackwardArgs args;
};

struct AlignedBoxIouPlan {
  Tensor grad_output, boxes1, boxes2, grad_boxes1, grad_boxes2;
  box_iou::AlignedBackwardArgs args;
};

BoxIouPlan plan_box_iou(const Tensor& boxes1, const Tensor& boxes2, const BoxIouOptions& options);
void check_box_iou_backward(const Tensor& grad_output, const Tensor& boxes1, const Tensor& boxes2,
                            const BoxIouOptions& options);
std::pair<BoxIouSide, BoxIouSide> plan_box_iou_sides(const Tensor& grad_output,
                                                     const Tensor& boxes1, const Tensor& boxes2,
                                                     const BoxIouOptions& options);
AlignedBoxIouPlan plan_aligned_box_iou(const Tensor& grad_output, const Tensor& boxes1,
                                       const Tensor& boxes2, const BoxIouOptions& options);

}  // namespace torchkiln::bindings
