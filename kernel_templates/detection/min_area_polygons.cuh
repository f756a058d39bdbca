// min_area_polygons on the GPU: one thread for each row.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/min_area_polygons.h"

namespace torchkiln::min_area_polygons {

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  const i64 row = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (row >= args.n) return;
  double corners[kCorners];
  polygon(static_cast<const Scalar*>(args.pointsets) + row * kRow, corners);
  for (int i = 0; i < kCorners; ++i) {
    store(static_cast<Scalar*>(args.polygons)[row * kCorners + i], Acc<Scalar>(corners[i]));
  }
}

}  // namespace torchkiln::min_area_polygons
