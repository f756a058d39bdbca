// What the CUDA and the CPU half of soft_nms share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/detection/nms.h"
#include "detection/soft_nms.h"

namespace torchkiln::bindings {

// What lowers scores, as the schemas have it.
struct Softness {
  double iou_threshold, sigma, min_score;
  std::int64_t method;
  double offset;
};

struct SoftPlan {
  NmsPlan nms;
  soft_nms::Args args;
};

SoftPlan plan_soft_nms(const char* op, const Tensor& boxes, const Tensor& scores,
                       const Softness& softness, const std::optional<Tensor>& idxs);

}  // namespace torchkiln::bindings
