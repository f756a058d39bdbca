// causal_conv1d_update on the GPU: a thread for each channel of each sequence.
// spills: up to 8 bytes in float64, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/causal_conv1d_update.h"

namespace torchkiln::causal_conv1d_update {

// Grid: one-dimensional.
template <class Scalar, int kWidth, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) update(const Args args) {
  const i64 at = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (at >= args.batch * args.channels) return;
  const i64 batch = at / args.channels;
  Step<Scalar, kWidth>(args, batch, at - batch * args.channels).run();
}

}  // namespace torchkiln::causal_conv1d_update
