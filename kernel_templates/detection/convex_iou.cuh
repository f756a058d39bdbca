// convex_iou and convex_giou on the GPU. convex_iou: a block finds the hulls of kRows pointsets once, tests the bounds of
// its pairs, and computes those that are not apart side by side, however they lie in the matrix: few are left of most
// matrices, and a warp that met them where they stand would wait for each one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "detection/convex_iou.h"

namespace torchkiln::convex_iou {

// Grid: (blocks of kRows pointsets, blocks of kBlockSize polygons).
template <class Scalar, int kRows, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  static_assert(kRows <= kBlockSize && kBlockSize <= 256);
  __shared__ PointHull hulls[kRows];
  __shared__ Bounds bounds[kRows];
  __shared__ u16 pairs[kRows * kBlockSize];
  __shared__ int count;
  const i64 first_row = i64(blockIdx.x) * kRows, first_column = i64(blockIdx.y) * kBlockSize;
  const int rows = int(min_of(args.n - first_row, i64(kRows)));
  const auto* polygons = static_cast<const Scalar*>(args.polygons) + first_column * kCorners;
  Scalar* out = static_cast<Scalar*>(args.out) + first_row * args.m + first_column;
  const int thread = threadIdx.x;
  if (thread == 0) count = 0;
  if (thread < rows) {
    const auto* pointsets = static_cast<const Scalar*>(args.pointsets);
    hull_of(pointsets + (first_row + thread) * kRow, hulls[thread]);
    bounds[thread] = bounds_of(hulls[thread], hulls[thread].count, hulls[thread].area);
  }
  __syncthreads();
  if (first_column + thread < args.m) {
    const auto q = load_outline<double>(polygons + thread * kCorners);
    const Bounds own = bounds_of(q, 4, q.twice);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      if (apart(bounds[row], own)) {
        store(out[row * args.m + thread], Acc<Scalar>(0));
      } else {
        pairs[atomicAdd(&count, 1)] = u16(row * kBlockSize + thread);
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < count; i += kBlockSize) {
    const int row = pairs[i] / kBlockSize, column = pairs[i] % kBlockSize;
    const auto q = load_outline<double>(polygons + column * kCorners);
    store(out[row * args.m + column], Acc<Scalar>(iou(hulls[row], q)));
  }
}

// One thread for each row.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) giou_forward(const GiouArgs args) {
  const i64 row = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (row >= args.n) return;
  double gradient[kRow];
  const double value = giou(static_cast<const Scalar*>(args.pointsets) + row * kRow,
                            static_cast<const Scalar*>(args.polygons) + row * kCorners, gradient);
  store(static_cast<Scalar*>(args.giou)[row], Acc<Scalar>(value));
  for (int i = 0; i < kRow; ++i) {
    store(static_cast<Scalar*>(args.gradient)[row * kRow + i], Acc<Scalar>(gradient[i]));
  }
}

}  // namespace torchkiln::convex_iou
