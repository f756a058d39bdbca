// Channels first to channels last and back: the transpose of many matrices, and of floats to half types on the way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
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

// kVector neighbours of the result, from as many rows of a tile.
template <int kVector, class To, int kPitch>
__device__ __forceinline__ Pack<To, kVector> column_of(const To (*tile)[kPitch], i32 row,
                                                       i32 column) {
  Pack<To, kVector> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result.at[i] = tile[row + i][column];
  return result;
}

// 64 x 64 elements a block: neighbouring threads read neighbouring columns and write neighbouring rows, kVector
// elements at a time; rows and columns are multiples of it. Neighbouring blocks take neighbouring columns.
template <class From, class To, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) transpose(const Args args) {
  constexpr i32 kAcross = kSide / kVector, kStep = kBlockSize / kAcross;
  __shared__ To tile[kSide][kSide + 1];
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
  const i32 inner = i32(threadIdx.x) % kAcross * kVector, outer = i32(threadIdx.x) / kAcross;
  if (columns == args.columns && columns < kSide) {  // one piece of memory: no lane without work
    const float inverse = count_quotient(1.0f, static_cast<float>(columns));
#pragma unroll 8
    for (i32 i = threadIdx.x; i < rows * columns; i += kBlockSize) {
      const i32 row = quotient(i, inverse);
      tile[row][i - row * columns] = converted<From, To>(from[i]);
    }
  } else if (inner < columns) {
    Pack<From, kVector> read[kSide / kStep];
    const From* next = from + outer * args.columns + inner;
#pragma unroll
    for (i32 i = 0; i < kSide / kStep; ++i) {
      const i32 row = outer + i * kStep;
      if (row < rows) read[i] = load_pack<kVector>(next);
      next += kStep * args.columns;
    }
#pragma unroll
    for (i32 i = 0; i < kSide / kStep; ++i) {
      const i32 row = outer + i * kStep;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (row < rows) tile[row][inner + k] = converted<From, To>(read[i].at[k]);
      }
    }
  }
  __syncthreads();
  if (inner >= rows) return;
  to += outer * args.rows + inner;
#pragma unroll
  for (i32 i = 0; i < kSide / kStep; ++i) {
    const i32 column = outer + i * kStep;
    if (column < columns) store_pack<kVector>(to, column_of<kVector>(tile, inner, column));
    to += kStep * args.rows;
  }
}

}  // namespace torchkiln::layout_copy
