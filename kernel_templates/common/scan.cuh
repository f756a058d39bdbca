// Prefix sums over a warp and a block.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"

namespace torchkiln {

// Adds the value of the lane `offset` before this one, if there is one: which the instruction tells.
__device__ __forceinline__ void add_from_below(int& value, int offset) {
#if defined(__CUDACC_RTC__)
  asm volatile(
      "{.reg .b32 other; .reg .pred exists; "
      "shfl.sync.up.b32 other|exists, %0, %1, 0, 0xffffffff; @exists add.s32 %0, %0, other;}"
      : "+r"(value)
      : "r"(offset));
#else
  const int other = __shfl_up_sync(0xffffffffu, value, offset);
  if (int(threadIdx.x) % kWarpSize >= offset) value += other;
#endif
}

// The sum of `value` over the lanes before this one and this one; of the first kLanes lanes.
template <int kLanes = kWarpSize>
__device__ __forceinline__ int warp_inclusive_sum(int value) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    add_from_below(value, offset);
  }
  return value;
}

// The sum over the warps before this one of what the last lane of each has; `total` becomes that over all. `shared` holds
// one int per warp; every thread must call. At most 1024 threads.
template <int kBlockSize>
__device__ __forceinline__ int sum_of_warps_before(int of_warp, int* shared, int& total) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  __syncthreads();  // the caller may still be reading the previous sum's slots
  if (lane == kWarpSize - 1) shared[warp] = of_warp;
  __syncthreads();
  const int sum = warp_inclusive_sum<kWarps>(lane < kWarps ? shared[lane] : 0);
  total = __shfl_sync(0xffffffffu, sum, kWarps - 1);
  const int before = __shfl_sync(0xffffffffu, sum, warp > 0 ? warp - 1 : 0);
  return warp > 0 ? before : 0;
}

// The sum of `value` over the threads before this one; the rest as above.
template <int kBlockSize>
__device__ __forceinline__ int block_exclusive_sum(int value, int* shared, int& total) {
  const int inclusive = warp_inclusive_sum(value);
  return sum_of_warps_before<kBlockSize>(inclusive, shared, total) + inclusive - value;
}

// The same of flags: how many threads before this one have it.
template <int kBlockSize>
__device__ __forceinline__ int block_exclusive_count(bool flag, int* shared, int& total) {
  const u32 flags = __ballot_sync(0xffffffffu, flag);
  const u32 earlier = (u32(1) << threadIdx.x % kWarpSize) - 1;
  return sum_of_warps_before<kBlockSize>(__popc(flags), shared, total) + __popc(flags & earlier);
}

}  // namespace torchkiln
