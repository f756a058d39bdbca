// What the CUDA and the CPU half of ps_roi_align and ps_roi_pool share: the checked inputs and their layout.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/detection/roi_align.h"
#include "detection/ps_roi_pool.h"

namespace torchkiln::bindings {

// What is pooled: samples or cells. As torchvision: its last rows and columns are no cells of the forward, and the
// average of no sample is not a number.
struct PsRoiPoolKind {
  ps_roi_pool::Pooling pooling;
  bool as_torchvision = false;

  const char* op() const {
    return pooling == ps_roi_pool::kSamples ? "ps_roi_align" : "ps_roi_pool";
  }
};

// `maps` is the input and `bins` the output, or both their gradients; `channels` is undefined unless asked for.
struct PsRoiPoolPlan {
  PsRoiPoolKind kind;
  bool channels_last;
  Tensor maps, boxes, bins, channels;
  ps_roi_pool::Args args;
};

PsRoiPoolPlan plan_ps_roi_pool(const Tensor& input, const Tensor& boxes,
                               const RoiAlignOptions& options, PsRoiPoolKind kind,
                               bool with_channels);
PsRoiPoolPlan plan_ps_roi_pool_backward(const Tensor& grad_output, const Tensor& boxes,
                                        const RoiAlignShape& shape, const RoiAlignOptions& options,
                                        PsRoiPoolKind kind, bool channels_last);
PsRoiPoolKind ps_roi_pool_kind(std::int64_t pooling, bool as_torchvision);

}  // namespace torchkiln::bindings
