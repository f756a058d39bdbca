// What the CUDA and the CPU half of roi_align share: the checked inputs and their layout.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "bindings/support/check.h"
#include "bindings/support/layout.h"
#include "detection/roi_align.h"

namespace torchkiln::bindings {

// The numbers of a call, as in the schema.
struct RoiAlignOptions {
  std::int64_t pooled_height, pooled_width;
  double spatial_scale;
  std::int64_t sampling_ratio;
  bool aligned;
};

// The sizes of a map that is not there: backward needs no input, only where its gradient goes.
struct RoiAlignShape {
  std::int64_t n, c, h, w;
};

// `maps` is the input and `bins` the output, or both their gradients; argmax is undefined when averaging. All have the
// layout that channels_last says.
struct RoiAlignPlan {
  bool channels_last, maximum;
  Tensor maps, boxes, bins, argmax;
  roi_align::Args args;
};

// `op`: whose errors they are.
RoiAlignPlan plan_roi_align(const char* op, const Tensor& input, const Tensor& boxes,
                            const RoiAlignOptions& options, bool maximum);
RoiAlignPlan plan_roi_align_backward(const char* op, const Tensor& grad_output, const Tensor& boxes,
                                     const std::optional<Tensor>& argmax,
                                     const RoiAlignShape& shape, const RoiAlignOptions& options,
                                     bool channels_last);
void check_pooling(std::int64_t pooling);

// For every operator that pools regions: boxes, bins and options; the sizes of maps.
void check_regions(const char* op, const Tensor& boxes, const RoiAlignOptions& options);
void check_shape_of_maps(const char* op, const RoiAlignShape& shape);
roi_align::Regions regions_of(const Tensor& boxes, const RoiAlignShape& shape,
                              const RoiAlignOptions& options);

}  // namespace torchkiln::bindings
