// What the CUDA and the CPU half of sigmoid_focal_loss share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "bindings/support/tensor.h"
#include "detection/sigmoid_focal_loss.h"

namespace torchkiln::bindings {

// torch's numbers.
enum Reduction : std::int64_t { kNone = 0, kMean = 1, kReduceSum = 2 };

// The kernel arguments, and the tensors that keep their pointers alive.
struct FocalPlan {
  Tensor inputs, targets, loss, gradient;
  std::optional<Tensor> weight, grad_output, partials;
  bool labels;
  sigmoid_focal_loss::Args args;

  ScalarType dtype() const { return inputs.scalar_type(); }
  std::int64_t numel() const { return args.rows * args.columns; }
};

FocalPlan plan_focal_forward(const Tensor& inputs, const Tensor& targets,
                             const std::optional<Tensor>& weight, double alpha, double gamma,
                             std::int64_t reduction, bool with_gradient);
FocalPlan plan_focal_backward(const Tensor& grad_output, const Tensor& inputs,
                              const Tensor& targets, const std::optional<Tensor>& weight,
                              double alpha, double gamma, std::int64_t reduction);
// The loss of no elements: 0, or NaN for the mean of nothing.
inline double empty_focal_loss(const FocalPlan& p) { return 0.0 * p.args.scale; }

// Multiplies in place; not at all when the factor is 1.
struct FocalScalePlan {
  Tensor gradient, grad_output;
  sigmoid_focal_loss::ScaleArgs args;
};

FocalScalePlan plan_focal_scale(const Tensor& gradient, const Tensor& grad_output);

}  // namespace torchkiln::bindings
