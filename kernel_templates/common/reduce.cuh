// Sums over a warp and a block, in a fixed order, so that results repeat bit for bit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

constexpr int kWarpSize = 32;

// The warp of a thread, as a number that the compiler sees to be that of all lanes: it need not fear that some are missing
// where the number decides, so a shuffle there is one instruction and not ten. All lanes must call.
__device__ __forceinline__ int warp_number() {
  return __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpSize, 0);
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum of `value` over the block, valid in thread 0. `shared` holds one T per warp; every thread must call.
template <int kBlockSize, class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  value = warp_sum(value);
  if constexpr (kWarps > 1) {
    __syncthreads();  // the caller may still be reading the previous sum's slots
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    // By every warp: in a branch, where the compiler must fear that lanes are missing, a shuffle is thirty instructions.
    const int lane = threadIdx.x % kWarpSize;
    value = warp_sum(lane < kWarps ? shared[lane] : T(0));
  }
  return value;
}

}  // namespace torchkiln
