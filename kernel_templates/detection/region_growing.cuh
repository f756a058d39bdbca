// contour_expand and pixel_group on the GPU.
//
//   count  areas of labels
//   seed   the labels to start with, and the list of pixels at their borders
//   grow   one block, all pixels at one distance at a time: those that are reached twice keep the first source
//   means  one block for each label, in a fixed order
//
// grow is one block because a step is short: some thousand pixels at most, between two barriers. The lists hold every
// pixel once, so its work is that of the region that grows, not that of the image.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "detection/region_growing.h"

namespace torchkiln::region_growing {

// One atomic for the lanes of a warp that have the same label.
template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) count(const CountArgs args) {
  const i64 pixel = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i32 label = pixel < args.pixels ? args.kernels[pixel] : 0;
  const u32 same = __match_any_sync(0xffffffffu, label);
  const bool is_first = (same & ((1u << (threadIdx.x % kWarpSize)) - 1)) == 0;
  if (label > 0 && label <= args.num_labels && is_first) {
    atomicAdd(args.areas + label, __popc(same));
  }
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) seed(const Args args) {
  const i64 pixels = i64(args.height) * args.width;
  const i64 pixel = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  bool is_source = false;
  if (pixel < pixels) {
    const i32 label = kept(args, pixel);
    args.labels[pixel] = label;
    args.claims[pixel] = kFree;
    if (label > 0 && (args.contour == nullptr || args.contour[pixel] != 0)) {
      for_neighbours(i32(pixel), args.height, args.width,
                     [&](i32 other) { is_source = is_source || kept(args, other) == 0; });
    }
  }
  const u32 sources = __ballot_sync(0xffffffffu, is_source);
  if (sources == 0) return;
  const int lane = threadIdx.x % kWarpSize;
  int base = 0;
  if (lane == 0) base = atomicAdd(args.count, __popc(sources));
  base = __shfl_sync(0xffffffffu, base, 0);
  const int place = base + __popc(sources & ((1u << lane) - 1));
  if (is_source && place < pixels)
    args.lists[place] = i32(pixel);  // a counter that began at 0 fits
}

// Claims the free neighbours of a pixel for its source, and appends those that nobody had claimed.
template <class Scalar, bool kGroup>
__device__ __forceinline__ void visit(const Args& args, const u8* plane, i32 pixel, i32 source,
                                      i32* list, i32* end) {
  const i32 label = args.labels[pixel];
  for_neighbours(pixel, args.height, args.width, [&](i32 other) {
    if (args.labels[other] != 0 || plane[other] == 0) return;
    if constexpr (kGroup) {
      if (!is_near<Scalar>(args, label, other)) return;
    }
    if (atomicMin(args.claims + other, source) == kFree) list[atomicAdd(end, 1)] = other;
  });
}

// Grid: one block.
template <class Scalar, bool kGroup, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) grow(const Args args) {
  __shared__ i32 end;
  const i64 pixels = i64(args.height) * args.width;
  i32 *list = args.lists, *other = args.lists + pixels;
  i32 count = i32(min_of(i64(*args.count), pixels));
#pragma unroll 1
  for (i64 round = 0; round < args.rounds; ++round) {
    const u8* plane = args.planes + (args.rounds - 1 - round) * pixels;
    if (threadIdx.x == 0) end = count;
    __syncthreads();
    i32 begin = 0, stop = count;
#pragma unroll 1
    while (begin < stop) {
#pragma unroll 1
      for (i32 i = begin + i32(threadIdx.x); i < stop; i += kBlockSize) {
        const i32 pixel = list[i], source = i < count ? pixel : args.claims[pixel];
        visit<Scalar, kGroup>(args, plane, pixel, source, list, &end);
      }
      __syncthreads();
      begin = stop;
      stop = end;
      for (i32 i = begin + i32(threadIdx.x); i < stop; i += kBlockSize) {
        args.labels[list[i]] = args.labels[args.claims[list[i]]];
      }
      __syncthreads();  // before anyone appends again
    }
    if (round + 1 == args.rounds) return;
    // The next round starts from all that still have a free neighbour.
    if (threadIdx.x == 0) end = 0;
    __syncthreads();
#pragma unroll 1
    for (i32 i = i32(threadIdx.x); i < stop; i += kBlockSize) {
      const i32 pixel = list[i];
      bool has_free = false;
      for_neighbours(pixel, args.height, args.width,
                     [&](i32 at) { has_free = has_free || args.labels[at] == 0; });
      if (has_free) other[atomicAdd(&end, 1)] = pixel;
    }
    __syncthreads();
    count = end;
    i32* const swapped = list;
    list = other;
    other = swapped;
    __syncthreads();  // before `end` is written again
  }
}

constexpr int kChunk = 4;  // channels of one block

// Grid: (labels with background, chunks of channels).
template <class Scalar, class Out, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) means(const MeanArgs args) {
  constexpr int kAhead = 8;
  __shared__ double partial[kBlockSize / kWarpSize];
  const i32 label = i32(blockIdx.x), first = i32(blockIdx.y) * kChunk;
  const auto* values = static_cast<const Scalar*>(args.values) + first;
  const int width = min_of(args.channels - first, kChunk);
  double sums[kChunk] = {}, number = 0;
#pragma unroll 1
  for (i64 base = threadIdx.x; base < args.pixels && label > 0; base += kAhead * kBlockSize) {
    i32 found[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const i64 pixel = base + i * kBlockSize;
      found[i] = pixel < args.pixels ? args.labels[pixel] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (found[i] != label) continue;
      number += 1;
      const Scalar* value = values + (base + i * kBlockSize) * args.channels;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (c < width) sums[c] += double(load(value[c]));
      }
    }
  }
  number = block_sum<kBlockSize>(number, partial);
#pragma unroll 1
  for (int c = 0; c < kChunk; ++c) {
    const double sum = block_sum<kBlockSize>(c == 0   ? sums[0]
                                             : c == 1 ? sums[1]
                                             : c == 2 ? sums[2]
                                                      : sums[3],
                                             partial);
    if (threadIdx.x != 0 || c >= width) continue;
    store(static_cast<Out*>(args.means)[i64(label) * args.channels + first + c],
          Acc<Out>(number > 0 ? sum / number : 0.0));
  }
  if (threadIdx.x == 0 && first == 0 && args.counts != nullptr) args.counts[label] = i64(number);
}

}  // namespace torchkiln::region_growing
