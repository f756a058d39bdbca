// A counting sort that leaves the host alone: items are counted by bin with atomics, `place_bins` makes of the counts where
// each bin begins, items are put there with atomics, which moves that to its end, and `order_bins` sorts the items of each
// bin, which are all different. What comes out is the same every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/scan.cuh"

namespace torchkiln {

// One block, one list: counts become the sums of those before them.
template <int kBlockSize>
__device__ __forceinline__ void place_bins(i32* counts, i32 bins) {
  constexpr int kItems = 8;
  __shared__ int partial[kBlockSize / kWarpSize];
  i32 placed = 0;
#pragma unroll 1
  for (i64 first = 0; first < bins; first += kBlockSize * kItems) {
    const i64 begin = first + i32(threadIdx.x) * kItems;
    i32 own[kItems], sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      own[i] = begin + i < bins ? counts[begin + i] : 0;
      sum += own[i];
    }
    int total;
    i32 place = placed + block_exclusive_sum<kBlockSize>(sum, partial, total);
    placed += total;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (begin + i < bins) counts[begin + i] = place;
      place += own[i];
    }
  }
}

// A number to be exchanged for a smaller one further on.
__device__ __forceinline__ void put_in_order(i32* items, i32 low, i32 high) {
  const i32 a = items[low], b = items[high];
  if (b >= a) return;
  items[low] = b;
  items[high] = a;
}

// Bitonic sort by the whole block, rising, of fewer than 2^30 items in shared or global memory. All stages compare
// upwards, so items that are missing from the last power of two are as good as infinite.
template <int kBlockSize>
__device__ __forceinline__ void sort_items(i32* items, i32 count) {
#pragma unroll 1
  for (i32 size = 2; size / 2 < count; size *= 2) {
    const i32 pairs = (count + size - 1) / size * (size / 2);
#pragma unroll 1
    for (i32 stride = size / 2; stride > 0; stride /= 2) {
      const bool mirrored = stride == size / 2;
#pragma unroll 1
      for (i32 pair = threadIdx.x; pair < pairs; pair += kBlockSize) {
        const i32 inner = pair & (stride - 1), low = 2 * pair - inner;
        const i32 high = mirrored ? low + size - 1 - 2 * inner : low + stride;
        if (high < count) put_in_order(items, low, high);
      }
      __syncthreads();
    }
  }
}

// Sorts a bin of each thread of the block; every thread must call. Bins of few items are sorted by their thread, others by
// the block.
template <int kBlockSize>
__device__ __forceinline__ void order_bins(i32* items, i32 count) {
  constexpr i32 kFew = 12, kShared = 2048;
  __shared__ i32* bins[kBlockSize];
  __shared__ i32 counts[kBlockSize];
  __shared__ i32 sorted[kShared];
  __shared__ i32 waiting;
  if (threadIdx.x == 0) waiting = 0;
  __syncthreads();
  if (count > kFew) {
    const i32 at = atomicAdd(&waiting, 1);
    bins[at] = items;
    counts[at] = count;
  } else {
#pragma unroll 1
    for (i32 end = 1; end < count; ++end) {
      const i32 item = items[end];
      i32 at = end;
#pragma unroll 1
      for (; at > 0 && items[at - 1] > item; --at) items[at] = items[at - 1];
      items[at] = item;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (i32 bin = 0; bin < waiting; ++bin) {
    i32* from = bins[bin];
    const i32 own = counts[bin];
    const bool fits = own <= kShared;
#pragma unroll 1
    for (i32 i = threadIdx.x; fits && i < own; i += kBlockSize) sorted[i] = from[i];
    __syncthreads();
    sort_items<kBlockSize>(fits ? sorted : from, own);
#pragma unroll 1
    for (i32 i = threadIdx.x; fits && i < own; i += kBlockSize) from[i] = sorted[i];
    __syncthreads();
  }
}

}  // namespace torchkiln
