// Multi-scale deformable attention on the GPU: the value gradient, the same bits every time, each pixel written once.
//
//   place     where the samples of each cell begin, out of their counts, which `backward` left
//   fill      puts samples there, in any order
//   order     sorts those of each cell
//   gather    kLanes lanes own a pixel and add up what it gets of the samples in the four cells around it, in order
//
// Floor: a list takes 20 bytes of each sample and one atomic for counting, one for placing it. What binds are rows of the
// gradient of the output through L1 and L2, 4 e b q m l p d bytes as in the forward pass. Sums in fixed point by atomics
// would move twice the bytes of a float's, and lose what is small beside the largest.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bins.cuh"
#include "common/pack.cuh"
#include "deformable/multi_scale_deformable_attention_samples.cuh"

namespace torchkiln::multi_scale_deformable_attention_gather {

using namespace torchkiln::multi_scale_deformable_attention;

// ---- samples by cells ----------------------------------------------------------------------------------------------

// Those of an image and head.
__device__ __forceinline__ i32 samples_of(const Args& args) {
  return i32(args.q * args.l * args.p);
}

__device__ __forceinline__ bool share_pixels(Level a, Level b) {
  const i64 end_of_a = i64(a.start) + i64(a.h) * a.w, end_of_b = i64(b.start) + i64(b.h) * b.w;
  return a.start < end_of_b && b.start < end_of_a && a.h > 0 && b.h > 0;
}

template <int kBlockSize>
__device__ __forceinline__ void mark_sharing(const Args& args) {
#pragma unroll 1
  for (i64 pair = threadIdx.x; pair < args.l * args.l; pair += kBlockSize) {
    const i64 a = pair / args.l, b = pair - a * args.l;
    if (a < b && share_pixels(level_of(args.shapes, args.starts, args.s, a),
                              level_of(args.shapes, args.starts, args.s, b))) {
      args.ends[args.b * args.m * cells_of(args)] = 1;
    }
  }
}

// A block for each image and head: counts become what stands before them. One more finds out whether levels share pixels.
template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) place(const Args args) {
  constexpr int kPacks = 8;  // of a thread, all under way at once: one turn for the pyramid of an image of 1024 by 1280
  constexpr i32 kStep = 4 * kWarpSize, kOfWarp = kPacks * kStep;
  __shared__ int partial[kBlockSize / kWarpSize];
  if (blockIdx.x == args.b * args.m) {
    mark_sharing<kBlockSize>(args);
    return;
  }
  const i32 cells = i32(cells_of(args)), lane = i32(threadIdx.x) % kWarpSize;
  i32* counts = args.ends + i64(blockIdx.x) * cells;
  i32 before = 0;
#pragma unroll 1
  for (i64 base = 0; base < cells; base += kPacks * 4 * kBlockSize) {
    const i64 first = base + i32(threadIdx.x) / kWarpSize * kOfWarp + 4 * lane;
    uint4 own[kPacks];
    i32 places[kPacks];
    i32 of_warp = 0;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const i64 at = first + i * kStep;
      own[i] = at < cells ? *reinterpret_cast<const uint4*>(counts + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const i32 sum = i32(own[i].x + own[i].y + own[i].z + own[i].w);
      const i32 inclusive = warp_inclusive_sum(sum);
      places[i] = of_warp + inclusive - sum;
      of_warp += __shfl_sync(0xffffffffu, inclusive, kWarpSize - 1);
    }
    // What the last lane alone has comes before the lanes of later warps only.
    const i32 given = lane == kWarpSize - 1 ? of_warp : 0;
    int total;
    const i32 start = before + block_exclusive_sum<kBlockSize>(given, partial, total);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const i64 at = first + i * kStep;
      const u32 x = u32(start + places[i]), y = x + own[i].x, z = y + own[i].y, w = z + own[i].z;
      if (at < cells) *reinterpret_cast<uint4*>(counts + at) = make_uint4(x, y, z, w);
    }
    before += total;
  }
}

// What a block of one image and head works on, where each has so many blocks.
struct Turn {
  i64 of_head;
  u32 block, blocks;

  __device__ __forceinline__ Turn(i64 items, int block_size)
      : blocks(u32((items + block_size - 1) / block_size)) {
    of_head = blockIdx.x / blocks;
    block = blockIdx.x - u32(of_head) * blocks;
  }
};

template <class T, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) fill(const Args args) {
  const i32 samples = samples_of(args);
  const Turn turn(samples, kBlockSize);
  const u32 own = turn.block * kBlockSize + threadIdx.x;
  if (own >= u32(samples)) return;
  const i64 first = turn.of_head * samples;
  const i32 cell = static_cast<const Placed<T>*>(args.placed)[first + own].cell;
  if (cell == kOutside) return;
  args.samples[first + atomicAdd(args.ends + turn.of_head * cells_of(args) + cell, 1)] = i32(own);
}

// Where the samples of a cell end, or begin those of the next one.
__device__ __forceinline__ i32 end_of(const i32* ends, i32 cell) {
  return cell < 0 ? 0 : ends[cell];
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) order(const Args args) {
  const Turn turn(args.s, kBlockSize);
  const i64 cell = spread_bin<kBlockSize>(turn.block, turn.blocks);
  const i32* ends = args.ends + turn.of_head * cells_of(args);
  const i32 begin = cell < args.s ? end_of(ends, i32(cell) - 1) : 0;
  const i32 count = cell < args.s ? ends[cell] - begin : 0;
  order_bins<kBlockSize>(args.samples + turn.of_head * samples_of(args), begin, count);
}

// ---- samples around a pixel ----------------------------------------------------------------------------------------

// Numbers of samples: first those in the cells above, then those in the cells beside it.
struct Around {
  i32 above, count;
  i32 bases[2];  // what leads from a number to its place in the list: of those above, of the others
  i32 lefts[2];  // which is the first number of theirs that does not come from the left

  __device__ __forceinline__ i32 base(bool beside) const { return beside ? bases[1] : bases[0]; }
  __device__ __forceinline__ i32 left(bool beside) const { return beside ? lefts[1] : lefts[0]; }
};

// ends: of the image and head. A pixel that is not of the level has no samples.
__device__ __forceinline__ Around around_of(const i32* ends, Level size, i32 pixel) {
  Around around = {};
  const i32 own = pixel - size.start;
  if (pixel < 0 || u32(own) >= u32(size.h) * u32(size.w)) return around;
  const i32 left = u32(own) % u32(size.w) != 0 ? 1 : 0;
#pragma unroll
  for (int beside = 0; beside < 2; ++beside) {
    if (beside == 0 && own < size.w) continue;
    const i32 cell = beside != 0 ? pixel : pixel - size.w;
    const i32 middle = end_of(ends, cell - 1);
    const i32 begin = left != 0 ? end_of(ends, cell - 2) : middle;
    around.bases[beside] = begin - around.count;
    around.lefts[beside] = around.count + middle - begin;
    around.above = around.count;
    around.count += ends[cell] - begin;
  }
  return around;
}

// What pixels of a level get of samples.
template <class T>
struct Source {
  const Placed<T>* placed;  // of the image and head
  const i32* samples;
  u32 points, of_query;  // of a query: on a level, on all
  u32 levels, level;
  bool overlap;  // others may lie in the same cells
};

// What a pixel gets of a sample.
template <class T>
struct Share {
  i32 query;  // -1: nothing
  T weight;
};

template <class T>
__device__ __forceinline__ Share<T> share_of(const Source<T>& source, const Around& around,
                                             i32 number) {
  if (number >= around.count) return {-1, T(0)};
  const bool beside = number >= around.above;
  const u32 sample = u32(source.samples[around.base(beside) + number]);
  if (source.overlap && sample / source.points % source.levels != source.level) return {-1, T(0)};
  const Placed<T> at = source.placed[sample];
  const T y = beside ? T(1) - abs_of(at.y) : max_of(at.y, T(0));
  const T x = number < around.left(beside) ? max_of(at.x, T(0)) : T(1) - abs_of(at.x);
  return {i32(sample / source.of_query), y * x * at.weight};
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// What becomes of samples is worked out by a lane each, and then told to the kLanes lanes of a pixel, or, for a pixel with
// more samples than this, to all lanes of the warp.
constexpr i32 kMany = 64;

template <class T>
__device__ __forceinline__ T of_lane(T value, i32 lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ __forceinline__ Around told(const Around& own, i32 lane) {
  return {of_lane(own.above, lane),
          of_lane(own.count, lane),
          {of_lane(own.bases[0], lane), of_lane(own.bases[1], lane)},
          {of_lane(own.lefts[0], lane), of_lane(own.lefts[1], lane)}};
}

template <class Scalar, int kVector, int kLanes>
struct Gatherer {
  using T = Acc<Scalar>;
  static constexpr i32 kGroups = kWarpSize / kLanes;
  static constexpr int kAtOnce = 4;  // rows under way

  const Scalar* gradients;  // of the image, head and this lane's channels; null for none
  i32 stride;
  T sums[kVector] = {};

  // Adds the first `count` of the shares of lanes `from`, `from + step`...; every lane of the warp must call.
  __device__ __forceinline__ void add(const Share<T>& share, i32 count, i32 from, i32 step,
                                      T* to) const {
#pragma unroll 1
    for (i32 first = 0; first < count; first += kAtOnce) {
      Pack<Scalar, kVector> rows[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const i32 query = of_lane(share.query, from + (first + i) * step);
        rows[i] = query >= 0 && gradients != nullptr
                      ? load_pack<kVector>(apart(gradients, query, stride))
                      : zero_pack<kVector, Scalar>();
      }
      // Only now: weights come from memory, and rows are under way meanwhile.
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const T weight = of_lane(share.weight, from + (first + i) * step);
        if (weight == T(0)) continue;
#pragma unroll
        for (int c = 0; c < kVector; ++c) to[c] += weight * load(rows[i].at[c]);
      }
    }
  }

  // Adds what the pixel of each group of lanes gets: all at once, or, where one gets much, all groups together that of one
  // after the other. Every lane of the warp must call.
  __device__ __forceinline__ void add_level(const Source<T>& source, const Around& own) {
    const i32 most = most_of_groups(own.count);
    if (most == 0) return;
    const bool together = most > kMany && kGroups > 1;
    const i32 lane = i32(threadIdx.x) % kWarpSize, group = lane / kLanes;
    const i32 number = together ? lane : lane % kLanes, each = together ? kWarpSize : kLanes;
    const i32 from = together ? group : group * kLanes, step = together ? kGroups : 1;
#pragma unroll 1
    for (i32 owner = 0; owner < step; ++owner) {
      const Around around = told(own, (together ? owner : group) * kLanes);
      const i32 count = together ? around.count : most;
      T parts[kVector] = {};
#pragma unroll 1
      for (i32 begin = 0; begin < count; begin += each) {
        const i32 left = min_of(each, count - begin);
        add(share_of(source, around, begin + number),
            together ? (left + kGroups - 1) / kGroups : left, from, step, parts);
      }
      if (together) add_groups(parts);
#pragma unroll
      for (int c = 0; c < kVector; ++c) sums[c] += !together || group == owner ? parts[c] : T(0);
    }
  }

 private:
  __device__ __forceinline__ static i32 most_of_groups(i32 number) {
#pragma unroll
    for (int offset = kLanes; offset < kWarpSize; offset *= 2) {
      number = max_of(number, __shfl_xor_sync(0xffffffffu, number, offset));
    }
    return number;
  }
  __device__ __forceinline__ static void add_groups(T* parts) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
#pragma unroll
      for (int offset = kLanes; offset < kWarpSize; offset *= 2) {
        parts[c] += __shfl_xor_sync(0xffffffffu, parts[c], offset);
      }
    }
  }
};

// Grid: chunks of channels, heads, images, then patches of pixels, those of the coarse levels first: most samples fall on
// them.
template <class Scalar, int kVector, int kLanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) gather(const Args args) {
  using T = Acc<Scalar>;
  constexpr u32 kPixels = kBlockSize / kLanes;
  __shared__ Levels levels;
  levels.fill(args);
  __syncthreads();
  const u32 chunks = u32((args.d + kLanes * kVector - 1) / (kLanes * kVector));
  const u32 patches = (u32(args.s) + kPixels - 1) / kPixels, heads = u32(args.b * args.m);
  const u32 chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  const u32 of_head = rest % heads, image = of_head / u32(args.m);
  const u32 place = (patches - 1 - rest / heads) * kPixels + threadIdx.x / kLanes;
  const bool exists = place < u32(args.s);
  const i32 pixel = exists ? in_patches<band_of(kPixels)>(args, levels, args.s, i32(place)) : -1;
  const bool counts = exists && (args.mask == nullptr || args.mask[image * args.s + pixel] == 0);
  const i32 channel = i32(chunk) * kLanes * kVector + i32(threadIdx.x) % kLanes * kVector;
  const i64 head = of_head - image * u32(args.m), samples = i64(of_head) * samples_of(args);
  const Scalar* gradients =
      static_cast<const Scalar*>(args.output) + (image * args.q * args.m + head) * args.d + channel;
  Gatherer<Scalar, kVector, kLanes> gatherer = {channel < args.d ? gradients : nullptr,
                                                i32(args.m * args.d * i64(sizeof(Scalar)))};
  Source<T> source = {static_cast<const Placed<T>*>(args.placed) + samples,
                      args.samples + samples,
                      u32(args.p),
                      u32(args.l * args.p),
                      u32(args.l),
                      0,
                      args.ends[i64(heads) * cells_of(args)] != 0};
#pragma unroll 1
  for (; source.level < source.levels; ++source.level) {
    const Around around = around_of(args.ends + of_head * cells_of(args),
                                    levels.at(args, i32(source.level)), counts ? pixel : -1);
    gatherer.add_level(source, around);
  }
  if (!exists || channel >= args.d) return;
  Pack<Scalar, kVector> result;
#pragma unroll
  for (int c = 0; c < kVector; ++c) store(result.at[c], gatherer.sums[c]);
  const i64 row = (image * args.s + pixel) * args.m + head;
  store_pack<kVector>(static_cast<Scalar*>(args.grad_value) + row * args.d + channel, result);
}

}  // namespace torchkiln::multi_scale_deformable_attention_gather
