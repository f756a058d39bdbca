// What the CPU and CUDA halves of multi-scale deformable attention share: the checked inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "bindings/support/check.h"
#include "bindings/support/tensor.h"
#include "deformable/multi_scale_deformable_attention.h"

namespace torchkiln::bindings {

namespace msda = multi_scale_deformable_attention;

// All contiguous; `references` and `mask` are undefined where there are none.
struct MsdaPlan {
  const char* op;
  Tensor value, shapes, starts, places, weights, references, mask;
  Tensor output;  // or its gradient
  msda::Args args;

  bool has_references() const { return args.references != nullptr; }
  bool has_mask() const { return args.mask != nullptr; }
  // Whether there is anything to add up.
  bool is_empty() const {
    return value.numel() == 0 || output.numel() == 0 || weights.numel() == 0;
  }
};

struct MsdaGradients {
  Tensor value, places, weights;
};

// Of a plan whose output is the gradient of the output; nothing in it is written yet. positions: that of places is one of
// positions in pixels, in the accumulator's type.
MsdaGradients empty_gradients(const MsdaPlan& plan, bool positions);

void run_msda_cpu(const MsdaPlan& plan);
void run_msda_backward_cpu(const MsdaPlan& plan, const MsdaGradients& gradients);
void run_msda_cuda(const MsdaPlan& plan);
// Returns the value's gradient, which may be another tensor than that of `gradients`.
Tensor run_msda_backward_cuda(const MsdaPlan& plan, const MsdaGradients& gradients,
                              bool deterministic);

}  // namespace torchkiln::bindings
