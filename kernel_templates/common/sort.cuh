// Sorting in two launches without any host synchronisation: each block sorts one tile in shared memory, then every
// element finds its final place by a binary search in each other tile. For keys that are all different; ties are broken
// by putting the element's index into the key, which also makes the sort stable.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

// An unsigned number of kWords * 64 bits, most significant word first.
template <int kWords>
struct SortKey {
  u64 word[kWords];
};

template <int kWords>
__device__ __forceinline__ bool operator<(const SortKey<kWords>& a, const SortKey<kWords>& b) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (a.word[i] != b.word[i]) return a.word[i] < b.word[i];
  }
  return false;
}

// A number that orders floats from the highest to the lowest, equal for -0 and 0, NaN last.
__device__ __forceinline__ u32 descending_key(float x) {
  if (is_nan(x)) return ~u32(0);
  const u32 bits = x == 0.0f ? 0u : float_bits(x);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ u64 descending_key(double x) {
  if (is_nan(x)) return ~u64(0);
  const u64 sign = u64(1) << 63;
  const u64 bits = x == 0.0 ? 0 : u64(__double_as_longlong(x));
  return bits & sign ? bits : ~(bits | sign);
}

// Bitonic sort, ascending, of kTile keys in shared memory; a power of two, at least 64. The whole block calls.
template <int kTile, int kBlockSize, class Key>
__device__ __forceinline__ void sort_tile(Key* keys) {
  // A warp's 32 pairs of a stage with stride <= 32 fill 64 neighbouring places, the same ones in each such stage.
  constexpr int kWarpStride = 32;
#pragma unroll 1
  for (int size = 2; size <= kTile; size *= 2) {
#pragma unroll 1
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll 1
      for (int pair = threadIdx.x; pair < kTile / 2; pair += kBlockSize) {
        const int low = 2 * pair - (pair & (stride - 1));
        const int high = low + stride;
        const Key a = keys[low], b = keys[high];
        const bool ascending = (low & size) == 0;
        if ((b < a) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      const int next_stride = stride > 1 ? stride / 2 : size;
      if (stride > kWarpStride || next_stride > kWarpStride) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

// How many of the `count` sorted keys are less than `key`.
template <class Key>
__device__ __forceinline__ int count_less(const Key* keys, int count, const Key& key) {
  int low = 0, high = count;
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace torchkiln
