// Multi-scale deformable attention on the GPU: the value gradient, the same bits every time, each pixel written once.
//
//   gather    kLanes lanes own a pixel, or several in turn where most get little, and add up what it gets of the samples in
//             the four cells around it, in order
//
// For few samples, and for levels that share pixels: each sample is read by four pixels, and its row of the gradient of the
// output by as many, 4 e b q m l p d bytes through L1 and L2 as in the forward pass.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "deformable/multi_scale_deformable_attention_cells.cuh"

namespace torchkiln::multi_scale_deformable_attention_gather {

using namespace torchkiln::multi_scale_deformable_attention;
using namespace torchkiln::multi_scale_deformable_attention_cells;

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
  i32 bounds[2][3];  // of the cell to the left and of the pixel's own, which follows in the list
#pragma unroll
  for (int beside = 0; beside < 2; ++beside) {
    const i32 cell = beside != 0 ? pixel : pixel - size.w;
    const bool exists = beside != 0 || own >= size.w;
    bounds[beside][0] = exists && cell > left ? ends[cell - left - 1] : 0;
    bounds[beside][1] = exists && cell > 0 ? ends[cell - 1] : 0;
    bounds[beside][2] = exists ? ends[cell] : 0;
  }
#pragma unroll
  for (int beside = 0; beside < 2; ++beside) {
    around.above = around.count;
    around.bases[beside] = bounds[beside][0] - around.count;
    around.lefts[beside] = around.count + bounds[beside][1] - bounds[beside][0];
    around.count += bounds[beside][2] - bounds[beside][0];
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

// Less than 0 where there is none.
template <class T>
__device__ __forceinline__ i32 sample_of(const Source<T>& source, const Around& around,
                                         i32 number) {
  const bool beside = number >= around.above;
  return number < around.count ? source.samples[around.base(beside) + number] : -1;
}
template <class T>
__device__ __forceinline__ Share<T> share_of(const Source<T>& source, const Around& around,
                                             i32 number, i32 sample, const Placed<T>& at) {
  if (sample < 0) return {-1, T(0)};
  const bool beside = number >= around.above, is_left = number < around.left(beside);
  // Before the first row or column of a level: 0, also of a weight that is no finite number.
  if ((!beside && at.y < T(0)) || (is_left && at.x < T(0))) return {-1, T(0)};
  const T y = beside ? T(1) - abs_of(at.y) : at.y;
  const T x = is_left ? at.x : T(1) - abs_of(at.x);
  return {i32(u32(sample) / source.of_query), y * x * at.weight};
}
template <class T>
__device__ __forceinline__ Share<T> share_of(const Source<T>& source, const Around& around,
                                             i32 number) {
  const i32 sample = sample_of(source, around, number);
  if (sample < 0) return {-1, T(0)};
  if (source.overlap && u32(sample) / source.points % source.levels != source.level) {
    return {-1, T(0)};
  }
  return share_of(source, around, number, sample, source.placed[sample]);
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

// The first kLanes shares of the pixel of each turn, a lane each, into its own slots. Reads of one turn do not wait for
// those of another. Every lane of the warp must call.
template <int kTurns, int kLanes, int kBlockSize, class T>
__device__ __forceinline__ void list_first(const Source<T>& source, const Around& own,
                                           Share<T> (*first)[kBlockSize]) {
  const i32 lane = i32(threadIdx.x) % kWarpSize, number = lane % kLanes;
  i32 samples[kTurns];
  Placed<T> placed[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    samples[turn] = sample_of(source, told(own, lane - number + turn), number);
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    placed[turn] = samples[turn] >= 0 ? source.placed[samples[turn]] : Placed<T>{};
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    first[turn][threadIdx.x] =
        share_of(source, told(own, lane - number + turn), number, samples[turn], placed[turn]);
  }
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

  // Adds what the pixel gets that lane `turn` of each group of lanes knows: all at once, or, where one gets much, all groups
  // together that of one after the other. first: this lane's of `list_first`, or null. Every lane of the warp must call.
  __device__ __forceinline__ void add_level(const Source<T>& source, const Around& own, i32 turn,
                                            const Share<T>* first) {
    const i32 lane = i32(threadIdx.x) % kWarpSize, group = lane / kLanes;
    const i32 most = most_of_groups(of_lane(own.count, group * kLanes + turn));
    if (most == 0) return;
    const bool together = most > kMany && kGroups > 1;
    const i32 number = together ? lane : lane % kLanes, each = together ? kWarpSize : kLanes;
    const i32 from = together ? group : group * kLanes, step = together ? kGroups : 1;
#pragma unroll 1
    for (i32 owner = 0; owner < step; ++owner) {
      const Around around = told(own, (together ? owner : group) * kLanes + turn);
      const i32 count = together ? around.count : most;
      T parts[kVector] = {};
#pragma unroll 1
      for (i32 begin = 0; begin < count; begin += each) {
        const i32 left = min_of(each, count - begin);
        const bool listed = first != nullptr && !together && begin == 0;
        add(listed ? *first : share_of(source, around, begin + number),
            together ? (left + kGroups - 1) / kGroups : left, from, step, parts);
      }
      if (together) add_groups(parts);
#pragma unroll
      for (int c = 0; c < kVector; ++c) sums[c] += !together || group == owner ? parts[c] : T(0);
    }
  }

  // Leaves the sums of a pixel, if there is one, and begins anew.
  __device__ __forceinline__ void write(const Args& args, i64 image, i64 head, i32 channel,
                                        i32 pixel) {
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      store(result.at[c], sums[c]);
      sums[c] = T(0);
    }
    if (pixel < 0 || channel >= args.d) return;
    const i64 row = (image * args.s + pixel) * args.m + head;
    store_pack<kVector>(static_cast<Scalar*>(args.grad_value) + row * args.d + channel, result);
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
// them. A block has kTurns patches, far from each other: few of those of one block have many samples. Lane i of a group
// knows the pixel of turn i.
template <class Scalar, int kVector, int kLanes, int kTurns, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) gather(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kPixels = kBlockSize / kLanes;
  static_assert(kTurns <= kLanes);
  __shared__ Levels levels;
  __shared__ Share<T> first[kTurns][kBlockSize];
  const bool overlap = args.ends[args.b * args.m * cells_of(args)] != 0;
  if (args.sums != nullptr && !overlap) return;  // `join` has written it
  levels.fill(args);
  __syncthreads();
  const u32 chunks = u32((args.d + kLanes * kVector - 1) / (kLanes * kVector));
  const u32 patches = (u32(args.s) + kPixels - 1) / kPixels, heads = u32(args.b * args.m);
  const u32 chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  const u32 of_head = rest % heads, image = of_head / u32(args.m);
  const i32 lane = i32(threadIdx.x) % kLanes;
  const u32 patch = rest / heads + u32(lane % kTurns) * ((patches + kTurns - 1) / kTurns);
  const i64 place = (i64(patches) - 1 - patch) * kPixels + i32(threadIdx.x) / kLanes;
  const bool exists = place >= 0 && place < args.s;
  const i32 pixel = exists ? in_patches<band_of(kPixels)>(args, levels, args.s, i32(place)) : -1;
  const bool counts = exists && (args.mask == nullptr || args.mask[image * args.s + pixel] == 0);
  const i32 channel = i32(chunk) * kLanes * kVector + lane * kVector;
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
                      overlap};
  const i32* ends = args.ends + of_head * cells_of(args);
  const i32 counted = counts ? pixel : -1;
  Around own = around_of(ends, level_around(args, levels, counted), counted);
  const bool listed = kTurns > 1 && !source.overlap;
  if (listed) list_first<kTurns, kLanes>(source, own, first);
#pragma unroll 1
  for (i32 turn = 0; turn < kTurns; ++turn) {
#pragma unroll 1
    for (source.level = 0; source.level < (source.overlap ? source.levels : 1); ++source.level) {
      if (source.overlap) own = around_of(ends, levels.at(args, i32(source.level)), counted);
      gatherer.add_level(source, own, turn, listed ? &first[turn][threadIdx.x] : nullptr);
    }
    gatherer.write(args, image, head, channel,
                   of_lane(pixel, i32(threadIdx.x) % kWarpSize - lane + turn));
  }
}

}  // namespace torchkiln::multi_scale_deformable_attention_gather
