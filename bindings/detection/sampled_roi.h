// What operators that pool bilinear samples share (roi_align_rotated, riroi_align_rotated, bezier_align, border_align,
// rotated_feature_align): the checked inputs, and their CUDA and CPU halves.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <optional>

#include "bindings/support/check.h"
#include "bindings/support/layout.h"
#include "detection/bezier_align.h"
#include "detection/border_align.h"
#include "detection/riroi_align_rotated.h"
#include "detection/roi_align_rotated.h"
#include "detection/rotated_feature_align.h"

namespace torchkiln::bindings {

// The numbers are those of the schema of the gradient.
enum class SampledKind : std::int64_t { kRotated, kOriented, kBezier, kBorder, kFeature };

// The numbers of a call, as in the schemas; each operator leaves those out that it does not know.
struct SampledSettings {
  SampledKind kind;
  std::int64_t pooled_height = 1, pooled_width = 1;
  double spatial_scale = 1;
  std::int64_t samples = 1;
  bool aligned = false, clockwise = false;
  std::int64_t orientations = 1;
};

// `maps` is the input and `output` the output, or both their gradients; argmax is undefined where nobody wants it. All
// have the layout that channels_last says.
struct SampledPlan {
  SampledKind kind;
  bool channels_last;
  Tensor maps, boxes, output, argmax;
  sampled_roi::Args args;
};

SampledPlan plan_sampled(const Tensor& input, const Tensor& boxes, const SampledSettings& settings,
                         bool with_argmax);
// `maps` stays undefined.
SampledPlan plan_sampled_backward(const Tensor& grad_output, const Tensor& boxes,
                                  const std::optional<Tensor>& argmax,
                                  const std::array<std::int64_t, 4>& shape,
                                  const SampledSettings& settings, bool channels_last);

void run_sampled_cpu(const SampledPlan& plan);
Tensor run_sampled_backward_cpu(SampledPlan plan);
void run_sampled_cuda(const SampledPlan& plan);
Tensor run_sampled_backward_cuda(SampledPlan plan, bool deterministic);

const char* name_of(SampledKind kind);

// Calls f.operator()<Op>() with the samples of an operator.
template <class F>
decltype(auto) with_samples(SampledKind kind, F&& f) {
  switch (kind) {
    case SampledKind::kRotated:
      return f.template operator()<roi_align_rotated::Pooled>();
    case SampledKind::kOriented:
      return f.template operator()<riroi_align_rotated::Pooled>();
    case SampledKind::kBezier:
      return f.template operator()<bezier_align::Pooled>();
    case SampledKind::kBorder:
      return f.template operator()<border_align::Pooled>();
    default:
      return f.template operator()<rotated_feature_align::Pooled>();
  }
}

}  // namespace torchkiln::bindings
