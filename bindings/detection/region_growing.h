// What the CUDA and the CPU half of contour_expand and pixel_group share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "bindings/support/tensor.h"
#include "detection/region_growing.h"

namespace torchkiln::bindings {

// The kernel arguments, and the tensors that keep their pointers alive.
struct GrowthPlan {
  Tensor planes, kernels, labels;
  std::optional<Tensor> contour, scores, embeddings, means, confidence, counts;
  region_growing::Args args;

  std::int64_t pixels() const { return kernels.numel(); }
};

GrowthPlan plan_expand(const Tensor& masks, const Tensor& labels, std::int64_t min_area,
                       std::int64_t num_labels);
GrowthPlan plan_group(const Tensor& scores, const Tensor& mask, const Tensor& embeddings,
                      const Tensor& labels, const Tensor& contour, std::int64_t num_labels,
                      double threshold);
region_growing::MeanArgs mean_args(const GrowthPlan& p, const Tensor& labels, const Tensor& values,
                                   const Tensor& means, const std::optional<Tensor>& counts,
                                   std::int64_t channels);

// The largest of contiguous int32 labels on the CPU; 0 without any.
std::int32_t largest_label(const Tensor& labels);

}  // namespace torchkiln::bindings
