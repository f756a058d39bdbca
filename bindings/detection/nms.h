// What the CUDA and the CPU half of the nms family share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "bindings/support/check.h"
#include "bindings/support/tensor.h"
#include "detection/nms.h"

namespace torchkiln::bindings {

// Rows are numbered with 32 bits in the kernels.
inline constexpr std::int64_t kMaxBoxes = std::int64_t{1} << 30;

// The arguments that are inputs, and the tensors that keep their pointers alive.
struct NmsPlan {
  Tensor boxes, scores, idxs;
  nms::Args args;
};

NmsPlan plan_nms(const char* op, const Tensor& boxes, const Tensor& scores,
                 const std::optional<Tensor>& idxs, double iou_threshold);
// Size of one class; fails unless it is an integer.
std::int64_t class_bytes(const char* op, const Tensor& idxs);
void check_max_output(std::int64_t max_output);

}  // namespace torchkiln::bindings
