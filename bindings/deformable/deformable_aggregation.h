// What the CUDA and the CPU half of deformable_aggregation share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <vector>

#include "bindings/support/any_float.h"
#include "bindings/support/check.h"
#include "deformable/deformable_aggregation.h"

namespace torchkiln::bindings {

// The tensors of a call: one map with `shapes` and `starts`, or levels one by one without them.
struct AggregationInputs {
  std::vector<Tensor> maps;
  std::optional<Tensor> shapes, starts;
  Tensor locations, weights;
};

// Everything by rows of channels, contiguous; optional tensors are undefined where they are not wanted.
struct AggregationPlan {
  bool one_by_one, is_empty;  // is_empty: nothing is added up
  std::vector<Tensor> maps;
  Tensor shapes, starts, locations, weights, normalizer, output;
  deformable_aggregation::Args args;
};

AggregationPlan plan_aggregation(const AggregationInputs& inputs, bool camera_first, bool softmax,
                                 bool wide_output);

// Of the gradient: `gradients` have the layout of their maps.
struct AggregationGradient {
  AggregationPlan plan;
  Tensor grad_output;
  std::vector<Tensor> gradients;  // none when not wanted
  Tensor grad_locations, grad_weights;
};

// The dtype that sums are in.
inline ScalarType sum_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

void run_aggregation_cpu(const AggregationPlan& plan);
void run_aggregation_backward_cpu(AggregationGradient& gradient);
void run_aggregation_cuda(const AggregationPlan& plan);
void run_aggregation_backward_cuda(AggregationGradient& gradient, bool deterministic);

}  // namespace torchkiln::bindings
