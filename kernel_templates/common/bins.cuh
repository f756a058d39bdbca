// A counting sort that leaves the host alone: items are counted by bin with atomics, `sum_bins` and `place_bins` make of the
// counts where each bin begins, items are put there with atomics, which moves that to its end, and `order_bins` sorts the items of each
// bin, which are all different. What comes out is the same every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/scan.cuh"

namespace torchkiln {

// The counts of a block's kBins bins, of which a thread has some neighbours; all blocks together have as many as there are.
template <int kBlockSize, int kBins>
struct Counts {
  static constexpr int kItems = kBins / kBlockSize;
  static_assert(kItems % 4 == 0);
  uint4* at;
  uint4 own[kItems / 4];
  i32 sum = 0;

  __device__ __forceinline__ explicit Counts(i32* counts)
      : at(reinterpret_cast<uint4*>(counts + i64(blockIdx.x) * kBins) +
           threadIdx.x * (kItems / 4)) {
#pragma unroll
    for (int i = 0; i < kItems / 4; ++i) {
      own[i] = at[i];
      sum += i32(own[i].x + own[i].y + own[i].z + own[i].w);
    }
  }
};

// The sum of the counts of each block's bins.
template <int kBlockSize, int kBins>
__device__ __forceinline__ void sum_bins(i32* counts, i32* sums) {
  __shared__ int partial[kBlockSize / kWarpSize];
  int total;
  block_exclusive_sum<kBlockSize>(Counts<kBlockSize, kBins>(counts).sum, partial, total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Counts become the sums of those before them.
template <int kBlockSize, int kBins>
__device__ __forceinline__ void place_bins(i32* counts, const i32* sums) {
  __shared__ int partial[kBlockSize / kWarpSize];
  const Counts<kBlockSize, kBins> counted(counts);
  i32 before = 0;
#pragma unroll 1
  for (u32 block = threadIdx.x; block < blockIdx.x; block += kBlockSize) before += sums[block];
  int placed, total;
  block_exclusive_sum<kBlockSize>(before, partial, placed);
  i32 place = placed + block_exclusive_sum<kBlockSize>(counted.sum, partial, total);
#pragma unroll
  for (int i = 0; i < Counts<kBlockSize, kBins>::kItems / 4; ++i) {
    const uint4 own = counted.own[i];
    const i32 y = place + i32(own.x), z = y + i32(own.y), w = z + i32(own.z);
    counted.at[i] = make_uint4(u32(place), u32(y), u32(z), u32(w));
    place = w + i32(own.w);
  }
}

// A number to be exchanged for a smaller one further on.
__device__ __forceinline__ void put_in_order(i32* items, i32 low, i32 high) {
  const i32 a = items[low], b = items[high];
  if (b >= a) return;
  items[low] = b;
  items[high] = a;
}

// Bitonic sort by the whole block, rising, of fewer than 2^29 items in shared or global memory. All stages compare
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

// A bin for each thread of `blocks` blocks. Where neighbours all have many items, these go to different blocks and, those of
// one block, to different warps.
template <int kBlockSize>
__device__ __forceinline__ i64 spread_bin(u32 block, u32 blocks) {
  constexpr u32 kWarps = kBlockSize / kWarpSize;
  const u32 own = threadIdx.x % kWarpSize * kWarps + threadIdx.x / kWarpSize;
  return i64(own) * blocks + block;
}

// More than every item; where one is missing.
constexpr i32 kNoItem = 2147483647;

// Sorts at most kMost items in the registers of one thread, by the stages of `sort_items`.
template <i32 kMost>
__device__ __forceinline__ void sort_few(i32* items, i32 count) {
  i32 own[kMost];
#pragma unroll
  for (i32 i = 0; i < kMost; ++i) own[i] = i < count ? items[i] : kNoItem;
#pragma unroll
  for (i32 size = 2; size <= kMost; size *= 2) {
#pragma unroll
    for (i32 stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (i32 pair = 0; pair < kMost / 2; ++pair) {
        const i32 inner = pair & (stride - 1), low = 2 * pair - inner;
        const i32 high = stride == size / 2 ? low + size - 1 - 2 * inner : low + stride;
        const i32 a = own[low], b = own[high];
        own[low] = min_of(a, b);
        own[high] = max_of(a, b);
      }
    }
  }
#pragma unroll
  for (i32 i = 0; i < kMost; ++i) {
    if (i < count) items[i] = own[i];
  }
}

// Sorts the bins of the lanes in `bins`, none of more than 32 items, by the whole warp, an item a lane, and some bins at once:
// what takes time is to read them.
__device__ __forceinline__ void sort_by_lanes(i32* items, i32 begin, i32 count, u32 bins) {
  constexpr int kAtOnce = 4;
  const i32 lane = i32(threadIdx.x) % kWarpSize;
#pragma unroll 1
  while (bins != 0) {
    i32 own[kAtOnce], numbers[kAtOnce];
    i32* from[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const i32 bin = bins != 0 ? __ffs(i32(bins)) - 1 : 0;
      const i32 number = __shfl_sync(0xffffffffu, count, bin);
      from[i] = items + __shfl_sync(0xffffffffu, begin, bin);
      numbers[i] = bins != 0 ? number : 0;
      own[i] = lane < numbers[i] ? from[i][lane] : kNoItem;
      bins &= bins - 1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      i32 rank = 0;
#pragma unroll 4
      for (i32 other = 0; other < numbers[i]; ++other) {
        rank += __shfl_sync(0xffffffffu, own[i], other) < own[i] ? 1 : 0;
      }
      if (lane < numbers[i]) from[i][rank] = own[i];
    }
  }
}

// A stage of a bitonic sort between lanes that differ in the bits of `mask`, the highest of which is `bit`.
template <int kOwn>
__device__ __forceinline__ void compare_lanes(i32 (&own)[kOwn], i32 mask, i32 bit) {
  const bool upper = (i32(threadIdx.x) & bit) != 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const i32 other = __shfl_xor_sync(0xffffffffu, own[i], mask);
    own[i] = (own[i] < other) != upper ? own[i] : other;
  }
}

// Sorts at most kOwn items for each lane in the registers of a warp, by the stages of `sort_items`; every lane must call, with
// the same bin. Stages between lanes are one loop: written out, they compile for twice as long.
template <int kOwn>
__device__ __forceinline__ void sort_in_warp(i32* items, i32 count) {
  const i32 lane = i32(threadIdx.x) % kWarpSize, after = count - lane;
  i32* at = items + lane;
  i32 own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own[i] = i * kWarpSize < after ? at[i * kWarpSize] : kNoItem;
#pragma unroll 1
  for (i32 size = 2; size <= kWarpSize; size *= 2) {
#pragma unroll 1
    for (i32 bit = size / 2; bit > 0; bit /= 2) {
      compare_lanes(own, bit == size / 2 ? size - 1 : bit, bit);
    }
  }
#pragma unroll
  for (int rows = 2; rows <= kOwn; rows *= 2) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int other = i ^ (rows - 1);
      if (other < i) continue;
      const i32 low = own[i], high = own[other];
      own[i] = min_of(low, __shfl_xor_sync(0xffffffffu, high, kWarpSize - 1));
      own[other] = max_of(high, __shfl_xor_sync(0xffffffffu, low, kWarpSize - 1));
    }
#pragma unroll
    for (int stride = rows / 4; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if ((i & stride) != 0) continue;
        const i32 low = own[i], high = own[i + stride];
        own[i] = min_of(low, high);
        own[i + stride] = max_of(low, high);
      }
    }
#pragma unroll 1
    for (i32 bit = kWarpSize / 2; bit > 0; bit /= 2) compare_lanes(own, bit, bit);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (i * kWarpSize < after) at[i * kWarpSize] = own[i];
  }
  __syncwarp();
}

// Sorts a bin of each thread of the block, `count` items from `begin` on; every thread must call. Bins of few items are sorted
// by their thread, others by its warp, in registers, those of very many by the block, in shared memory if they fit.
template <int kBlockSize>
__device__ __forceinline__ void order_bins(i32* items, i32 begin, i32 count) {
  constexpr i32 kFew = 8, kOfWarp = 16 * kWarpSize, kOfBlock = 2048;
  __shared__ i32 copies[kOfBlock];
  __shared__ i32 begins[kBlockSize], counts[kBlockSize], waiting;
  if (threadIdx.x == 0) waiting = 0;
  __syncthreads();
  if (count > kOfWarp) {
    const i32 at = atomicAdd(&waiting, 1);
    begins[at] = begin;
    counts[at] = count;
  } else if (count > 1 && count <= kFew) {
    sort_few<kFew>(items + begin, count);
  }
  __syncwarp();
  sort_by_lanes(items, begin, count,
                __ballot_sync(0xffffffffu, count > kFew && count <= kWarpSize));
  u32 left = __ballot_sync(0xffffffffu, count > kWarpSize && count <= kOfWarp);
#pragma unroll 1
  for (; left != 0; left &= left - 1) {
    const i32 bin = __ffs(i32(left)) - 1, number = __shfl_sync(0xffffffffu, count, bin);
    i32* from = items + __shfl_sync(0xffffffffu, begin, bin);
    if (number <= 2 * kWarpSize) {
      sort_in_warp<2>(from, number);
    } else if (number <= 4 * kWarpSize) {
      sort_in_warp<4>(from, number);
    } else if (number <= 8 * kWarpSize) {
      sort_in_warp<8>(from, number);
    } else {
      sort_in_warp<16>(from, number);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (i32 bin = 0; bin < waiting; ++bin) {
    i32* from = items + begins[bin];
    const i32 own = counts[bin];
    const bool fits = own <= kOfBlock;
#pragma unroll 1
    for (i32 i = threadIdx.x; fits && i < own; i += kBlockSize) copies[i] = from[i];
    __syncthreads();
    sort_items<kBlockSize>(fits ? copies : from, own);
#pragma unroll 1
    for (i32 i = threadIdx.x; fits && i < own; i += kBlockSize) from[i] = copies[i];
    __syncthreads();
  }
}

}  // namespace torchkiln
