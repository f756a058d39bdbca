// points_in_polygons on the GPU: one thread keeps kVector neighbouring polygons in registers and walks over points; what
// it writes is one vector, and the point comes from one broadcast load.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "detection/points_in_polygons.h"

namespace torchkiln::points_in_polygons {

template <int kPeer>
struct ResultOf {
  using Type = u8;
};
template <>
struct ResultOf<1> {
  using Type = float;
};

// Grid: one-dimensional; thread i takes vector i % (m / kVector) of the columns, and every row_step-th row.
template <class Scalar, int kPeer, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  using Result = typename ResultOf<kPeer>::Type;
  const Scalar* points = static_cast<const Scalar*>(args.points);
  const i64 vectors = args.m / kVector;
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i64 row_step = divided(i64(gridDim.x) * kBlockSize, vectors);
  if (item >= row_step * vectors) return;
  const i64 first_row = divided(item, vectors), column = (item - first_row * vectors) * kVector;
  Polygon<T> polygons[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    polygons[i] = load_polygon(static_cast<const Scalar*>(args.polygons), column + i);
  }
  Result* out = static_cast<Result*>(args.out) + first_row * args.m + column;
  Point<T> next = load_point(points, min_of(first_row, args.n - 1));
#pragma unroll 1
  for (i64 row = first_row; row < args.n; row += row_step, out += row_step * args.m) {
    const Point<T> point = next;
    // Its latency is the longest here.
    next = load_point(points, min_of(row + row_step, args.n - 1));
    Pack<Result, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      result.at[i] =
          kPeer != 0 ? contains_as_mmcv(polygons[i], point) : contains(polygons[i], point);
    }
    store_pack<kVector>(out, result);
  }
}

}  // namespace torchkiln::points_in_polygons
