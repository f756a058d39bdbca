// Prefix sums over a warp and a block.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"

namespace torchkiln {

// The sum of `value` over the lanes before this one and this one.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// The sum of `value` over the threads before this one; `total` becomes the sum over the block. `shared` holds one int
// per warp; every thread must call. At most 1024 threads.
template <int kBlockSize>
__device__ __forceinline__ int block_exclusive_sum(int value, int* shared, int& total) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int inclusive = warp_inclusive_sum(value);
  __syncthreads();  // the caller may still be reading the previous sum's slots
  if (lane == kWarpSize - 1) shared[warp] = inclusive;
  __syncthreads();
  const int sum = warp_inclusive_sum(lane < kWarps ? shared[lane] : 0);
  total = __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
  const int before = __shfl_sync(0xffffffffu, sum, warp > 0 ? warp - 1 : 0);
  return (warp > 0 ? before : 0) + inclusive - value;
}

}  // namespace torchkiln
