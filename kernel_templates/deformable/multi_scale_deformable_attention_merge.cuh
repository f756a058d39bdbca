// Multi-scale deformable attention on the GPU: the value gradient, added up in the block before it goes out.
//
//   merge     a block owns a patch of neighbouring queries of one head. Level by level, it sorts what its samples give to
//             pixels by the pixel, by counting, in shared memory; then each group of kLanes lanes sums an equal part of
//             them in registers and adds atomically where the pixel changes
//
// At 256 queries of an encoder, about ten samples of a patch meet on a pixel; the L2 cache, which takes one sector of an
// atomic sum at a time, binds where each sample is added by itself.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/atomics.cuh"
#include "common/scan.cuh"
#include "deformable/multi_scale_deformable_attention_samples.cuh"

namespace torchkiln::multi_scale_deformable_attention_merge {

using namespace torchkiln::multi_scale_deformable_attention;

// What a sample gives to one pixel: weight times the gradient of a query of the block.
struct alignas(8) Share {
  float weight;
  u32 place;  // pixel << 8 | query
};

template <class Scalar, int kChannels, int kQueries, int kBlockSize>
struct alignas(16) Patch {
  static constexpr int kSamples = kSamplesOfThread * kBlockSize;  // sorted at once
  static constexpr int kWarps = kBlockSize / kWarpSize;
  Scalar rows[kQueries * kChannels];  // of the gradient of the output
  Share shares[4 * kSamples];
  i32 counts[kWindow *
             kWindow];  // of shares of a pixel of the window; then how many stand before them
  Position<float> sums[kWarps];  // of the samples' positions
  i32 sampled[kWarps];
  i32 partial[kWarps];
  i32 outside;            // shares of pixels outside of the window
  i32 queries[kQueries];  // -1: there is none
  Softmax<float> softmaxes[kQueries];
  Levels levels;
};

// What a block works on.
struct Owner {
  i64 image, head;
  const u8* mask;
};

template <class Place>
__device__ __forceinline__ Softmax<float> whole_softmax(const Args& args, Query query) {
  if (args.references == nullptr) return {0.0f, 1.0f};
  const Place* logits = static_cast<const Place*>(args.weights) + query.first;
  const i32 samples = i32(args.l * args.p);
  float greatest = kLowest<float>, sum = 0.0f;
#pragma unroll 1
  for (i32 s = 0; s < samples; ++s) greatest = max_of(load(logits[s]), greatest);
#pragma unroll 1
  for (i32 s = 0; s < samples; ++s) sum += exp_of(load(logits[s]) - greatest);
  return {greatest, fast_quotient(1.0f, sum)};
}

// The queries of the block. Barriers must stand before and behind.
template <class Place, int kQueries, int kBlockSize, class AnyPatch>
__device__ __forceinline__ void fill_queries(AnyPatch& patch, const Args& args, const Owner& owner,
                                             i32 first) {
#pragma unroll 1
  for (i32 i = threadIdx.x; i < kQueries; i += kBlockSize) {
    const bool exists = first + i < args.q;
    const i32 query =
        exists ? in_patches<band_of(kQueries)>(args, patch.levels, args.q, first + i) : -1;
    patch.queries[i] = query;
    if (exists) {
      patch.softmaxes[i] =
          whole_softmax<Place>(args, query_at(args, owner.image, owner.head, query));
    }
  }
}

template <int kVector, int kLanes, int kQueries, int kBlockSize, class Scalar>
__device__ __forceinline__ void fill_rows(Scalar* rows, const i32* queries, const Args& args,
                                          const Owner& owner, i32 first_channel) {
  const i32 part = i32(threadIdx.x) % kLanes * kVector, channel = first_channel + part;
  if (channel >= args.d) return;
  const i64 stride = args.m * args.d;
  const Scalar* gradients = static_cast<const Scalar*>(args.output) +
                            owner.image * args.q * stride + owner.head * args.d + channel;
#pragma unroll 4
  for (i32 i = i32(threadIdx.x) / kLanes; i < kQueries; i += kBlockSize / kLanes) {
    if (queries[i] < 0) continue;
    store_pack<kVector>(rows + i * (kLanes * kVector) + part,
                        load_pack<kVector>(gradients + queries[i] * stride));
  }
}

// The samples of one thread.
struct OwnSample {
  i32 first;   // Taps::first
  i32 corner;  // in the window: row * kWindow + column of the upper left pixel; -1 outside
  u32 live;
  i32 query;
  float y, x, weight;
  Position<float> at;
};

template <class Place, int kQueries, class AnyPatch>
__device__ __forceinline__ OwnSample own_sample(const AnyPatch& patch, const Args& args,
                                                const Owner& owner, i32 level, Level size,
                                                i32 number, const Points& points) {
  OwnSample own = {};
  // Of the level: numbers go through the points of a query first.
  own.query = points.quotient_of(number);
  if (own.query >= kQueries || patch.queries[own.query] < 0) return own;
  const Query query = query_at(args, owner.image, owner.head, patch.queries[own.query]);
  const i32 sample = level * points.points + number - own.query * points.points;
  own.at = position_of<float, Place>(args, query, sample, level, size);
  const Taps<float> taps = taps_at(own.at, size, owner.mask);
  own.first = taps.first;
  own.live = taps.live;
  own.y = taps.fraction_y;
  own.x = taps.fraction_x;
  own.weight = weight_of<float, Place>(args, query, sample, patch.softmaxes[own.query]);
  return own;
}

// The corner of a window around the mean of the samples' positions; within the level, but for the pixel before it.
template <int kBlockSize, class AnyPatch>
__device__ __forceinline__ Position<float> window_of(const AnyPatch& patch, Level size) {
  Position<float> sum = {0.0f, 0.0f};
  i32 count = 0;
#pragma unroll
  for (int w = 0; w < kBlockSize / kWarpSize; ++w) {
    sum.y += patch.sums[w].y;
    sum.x += patch.sums[w].x;
    count += patch.sampled[w];
  }
  const float share = count == 0 ? 0.0f : fast_quotient(1.0f, float(count));
  const auto begin = [&](float mean, i32 pixels) {
    return max_of(min_of(floor_of(mean * share) - float(kWindow / 2), float(pixels - kWindow)),
                  -1.0f);
  };
  return {begin(sum.y, size.h), begin(sum.x, size.w)};
}

// Sorts the shares of kSamples samples of a level; returns how many there are. Every thread must call.
template <class Place, int kQueries, int kBlockSize, class AnyPatch>
__device__ __forceinline__ i32 sort_shares(AnyPatch& patch, const Args& args, const Owner& owner,
                                           i32 level, i32 begin) {
  constexpr int kPixels = kWindow * kWindow, kOwn = (kPixels + kBlockSize - 1) / kBlockSize;
  const Points points(args);
  const i32 warp = threadIdx.x / kWarpSize;
  const Level size = patch.levels.at(args, level);
  OwnSample own[kSamplesOfThread];
  Position<float> sum = {0.0f, 0.0f};
  i32 sampled = 0;
#pragma unroll
  for (int i = 0; i < kSamplesOfThread; ++i) {
    own[i] = own_sample<Place, kQueries>(patch, args, owner, level, size,
                                         begin + i * kBlockSize + i32(threadIdx.x), points);
    if (own[i].live == 0) continue;
    sum.y += own[i].at.y;
    sum.x += own[i].at.x;
    ++sampled;
  }
  sum = {warp_sum(sum.y), warp_sum(sum.x)};
  sampled = warp_sum(sampled);
  if (threadIdx.x % kWarpSize == 0) {
    patch.sums[warp] = sum;
    patch.sampled[warp] = sampled;
  }
  if (threadIdx.x == 0) patch.outside = 0;
  for (i32 i = threadIdx.x; i < kPixels; i += kBlockSize) patch.counts[i] = 0;
  __syncthreads();
  const Position<float> window = window_of<kBlockSize>(patch, size);
  i32 ranks[kSamplesOfThread][4];
#pragma unroll
  for (int i = 0; i < kSamplesOfThread; ++i) {
    const i32 y = i32(floor_of(own[i].at.y) - window.y), x = i32(floor_of(own[i].at.x) - window.x);
    const bool within = own[i].live != 0 && u32(y) < kWindow - 1 && u32(x) < kWindow - 1;
    own[i].corner = within ? y * kWindow + x : -1;
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      if ((own[i].live >> pixel & 1u) == 0) continue;
      const i32 at = own[i].corner + pixel / 2 * kWindow + pixel % 2;
      ranks[i][pixel] = atomicAdd(within ? &patch.counts[at] : &patch.outside, 1);
    }
  }
  __syncthreads();
  const i32 outside = patch.outside;
  i32 counts[kOwn];
  i32 counted = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const i32 at = i32(threadIdx.x) * kOwn + i;
    counts[i] = at < kPixels ? patch.counts[at] : 0;
    counted += counts[i];
  }
  int total;
  i32 before = block_exclusive_sum<kBlockSize>(counted, patch.partial, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const i32 at = i32(threadIdx.x) * kOwn + i;
    if (at < kPixels) patch.counts[at] = before;
    before += counts[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSamplesOfThread; ++i) {
    const Blend<float> blend = {own[i].y, own[i].x, own[i].live};
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      if (!blend.has(pixel)) continue;
      const i32 at = own[i].corner + pixel / 2 * kWindow + pixel % 2;
      const i32 place = (own[i].corner >= 0 ? patch.counts[at] : total) + ranks[i][pixel];
      const u32 of = u32(own[i].first + pixel / 2 * size.w + pixel % 2);
      patch.shares[place] = {blend.weight(pixel) * own[i].weight, of << 8 | u32(own[i].query)};
    }
  }
  __syncthreads();
  return total + outside;
}

// Each group adds an equal part of the shares to the pixels, from `sums_of_map` on.
template <int kVector, int kLanes, int kBlockSize, class AnyPatch>
__device__ __forceinline__ void add_shares(const AnyPatch& patch, const Args& args, i32 count,
                                           float* sums_of_map) {
  constexpr int kGroups = kBlockSize / kLanes, kAtOnce = 4;
  constexpr u32 kNone = 1;  // no share's
  const i32 group = i32(threadIdx.x) / kLanes, part = i32(threadIdx.x) % kLanes * kVector;
  const i32 stride = i32(args.m * args.d * i64(sizeof(float)));
  const i32 first = count * group / kGroups, last = count * (group + 1) / kGroups;
  u32 current = kNone;
  float sums[kVector] = {};
#pragma unroll 1
  for (i32 begin = first; begin < last; begin += kAtOnce) {
    Share shares[kAtOnce];
    float values[kAtOnce][kVector];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      shares[i] = patch.shares[min_of(begin + i, last - 1)];
      if (begin + i >= last) shares[i].weight = 0.0f;
      const auto row =
          read_pack<kVector>(patch.rows + (shares[i].place & 255u) * (kLanes * kVector) + part);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[i][j] = load(row.at[j]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const u32 pixel = shares[i].place & ~255u;
      if (pixel != current) {
        if (current != kNone) {
          add_atomically<kVector>(apart(sums_of_map, i32(current >> 8), stride), 1.0f, sums);
        }
        current = pixel;
#pragma unroll
        for (int j = 0; j < kVector; ++j) sums[j] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] += shares[i].weight * values[i][j];
    }
  }
  if (current != kNone) {
    add_atomically<kVector>(apart(sums_of_map, i32(current >> 8), stride), 1.0f, sums);
  }
}

template <class Scalar, class Place, int kVector, int kLanes, int kQueries, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) merge(const Args args) {
  using AnyPatch = Patch<Scalar, kLanes * kVector, kQueries, kBlockSize>;
  static_assert(kQueries <= 256, "a share has eight bits for its query");
  static_assert(sizeof(AnyPatch) <=
                merge_bytes(sizeof(Scalar), kLanes * kVector, kQueries, kBlockSize));
  extern __shared__ uint4 memory[];
  AnyPatch& patch = *reinterpret_cast<AnyPatch*>(memory);
  patch.levels.fill(args);
  const u32 runs = (u32(args.q) + kQueries - 1) / kQueries, of_head = blockIdx.x / runs;
  Owner owner = {};
  owner.image = of_head / u32(args.m);
  owner.head = of_head - owner.image * args.m;
  owner.mask = args.mask == nullptr ? nullptr : args.mask + owner.image * args.s;
  __syncthreads();
  fill_queries<Place, kQueries, kBlockSize>(patch, args, owner,
                                            i32((blockIdx.x - of_head * runs) * kQueries));
  const i32 samples = kQueries * i32(args.p), channels = i32(args.d);
#pragma unroll 1
  for (i32 first = 0; first < channels; first += kLanes * kVector) {
    __syncthreads();
    fill_rows<kVector, kLanes, kQueries, kBlockSize>(patch.rows, patch.queries, args, owner, first);
    const i32 channel = first + i32(threadIdx.x) % kLanes * kVector;
    float* sums_of_map = static_cast<float*>(args.grad_value) +
                         (owner.image * args.s * args.m + owner.head) * args.d + channel;
#pragma unroll 1
    for (i32 level = 0; level < args.l; ++level) {
#pragma unroll 1
      for (i32 begin = 0; begin < samples; begin += AnyPatch::kSamples) {
        const i32 count =
            sort_shares<Place, kQueries, kBlockSize>(patch, args, owner, level, begin);
        if (channel < channels) {
          add_shares<kVector, kLanes, kBlockSize>(patch, args, count, sums_of_map);
        }
      }
    }
  }
}

}  // namespace torchkiln::multi_scale_deformable_attention_merge
