// The differentiable overlap of rotated boxes on the GPU: one thread for each pair, forward and backward.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/diff_iou_rotated.h"

namespace torchkiln::diff_iou_rotated {

template <class Scalar, bool kSpace, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  const i64 i = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (i < args.n) forward_row<kSpace, Scalar>(args, i);
}

template <class Scalar, bool kSpace, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const BackwardArgs args) {
  const i64 i = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (i < args.n) backward_row<kSpace, Scalar>(args, i);
}

}  // namespace torchkiln::diff_iou_rotated
