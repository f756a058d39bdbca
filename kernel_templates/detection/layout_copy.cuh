// Channels first to channels last and back: the transpose of many matrices, and of floats to half types on the way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "detection/layout_copy.h"

namespace torchkiln::layout_copy {

template <class From, class To>
__device__ __forceinline__ To converted(From value) {
  if constexpr (sizeof(From) == sizeof(To)) {
    return value;
  } else {
    To result;
    store(result, load(value));
    return result;
  }
}

// 64 x 64 elements a block: neighbouring threads read neighbouring columns and write neighbouring rows. Neighbouring
// blocks take neighbouring columns.
template <class From, class To, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) transpose(const Args args) {
  constexpr i32 kWarps = kBlockSize / kWarpSize;
  __shared__ To tile[kSide][kSide + 1];
  const i32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const u32 across = u32((args.columns + kSide - 1) / kSide);
  const u32 down = u32((args.rows + kSide - 1) / kSide);
  const u32 strip = blockIdx.x / across;
  const i64 first_column = i64(blockIdx.x - strip * across) * kSide;
  const i64 first_row = i64(strip % down) * kSide, matrix = i64(strip / down);
  const i32 rows = i32(min_of(args.rows - first_row, i64(kSide)));
  const i32 columns = i32(min_of(args.columns - first_column, i64(kSide)));
  const i64 base = matrix * args.rows * args.columns;
  const From* from =
      static_cast<const From*>(args.from) + base + first_row * args.columns + first_column;
  To* to = static_cast<To*>(args.to) + base + first_column * args.rows + first_row;
  if (columns == args.columns) {  // one piece of memory
    const float inverse = 1.0f / static_cast<float>(columns);
#pragma unroll 4
    for (i32 i = threadIdx.x; i < rows * columns; i += kBlockSize) {
      const i32 row = quotient(i, inverse);
      tile[row][i - row * columns] = converted<From, To>(from[i]);
    }
  } else {
#pragma unroll 4
    for (i32 row = warp; row < rows; row += kWarps) {
      for (i32 column = lane; column < columns; column += kWarpSize) {
        tile[row][column] = converted<From, To>(from[row * args.columns + column]);
      }
    }
  }
  __syncthreads();
#pragma unroll 4
  for (i32 column = warp; column < columns; column += kWarps) {
    for (i32 row = lane; row < rows; row += kWarpSize) {
      to[column * args.rows + row] = tile[row][column];
    }
  }
}

}  // namespace torchkiln::layout_copy
