// Kernels of deformable aggregation (deformable_aggregation.h).
//
//   normalize  fused softmax: the normalizer of each query and group, logits read once
//   forward    one block, a part of a query's points and kChannels channels: points that no camera sees are left out before
//              anything is read for them, taps are worked out once, in shared memory, and read for all channels, 16 bytes each.
//              Blocks with the same channels of an image stand together: these then fit into L2
//   add_parts  adds up, in order, what the parts of a query make, where there are several
//   points     one block, kBlockSize points of a query in their cameras; a warp for each that is seen: the gradients of
//              its place and weights, summed in the warp; with kScatter that of the maps, by vector atomics on floats
// (without atomics: deformable_aggregation_gather.cuh)
// spills: some words where loads of two taps are in flight, for one more block on a multiprocessor
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/atomics.cuh"
#include "common/pack.cuh"
#include "common/scan.cuh"
#include "deformable/deformable_aggregation.h"

namespace torchkiln::deformable_aggregation {

// ---- what kernels share --------------------------------------------------------------------------------------------

// Points in cameras, of a query, that are seen.
template <class T, int kBlockSize>
struct Visible {
  T x[kBlockSize], y[kBlockSize];
  i32 pair[kBlockSize];  // point * cameras + camera
  int partial[kBlockSize / kWarpSize];
  Tap<T> taps[kBlockSize];
};

// With the sides of the map of each tap, which the gradient of a place is scaled by.
template <class T, int kBlockSize>
struct VisibleSides : Visible<T, kBlockSize> {
  T w[kBlockSize], h[kBlockSize];
};

// Lists, in order, which of the pairs [first, first + kBlockSize) before `end` are seen; returns how many. Every thread of
// the block must call.
template <int kBlockSize, class T>
__device__ __forceinline__ i32 list_visible(const Args& args, Visible<T, kBlockSize>& list,
                                            i64 query, i32 first, i32 end) {
  const i32 pairs = i32(args.points * args.cameras), pair = first + i32(threadIdx.x);
  T x = T(0), y = T(0);  // not seen
  if (pair < end) location_at(args, query * pairs + pair, x, y);
  const bool seen = is_seen(x, y);
  int total;
  const int place = block_exclusive_sum<kBlockSize>(seen, list.partial, total);
  if (seen) {
    list.x[place] = x;
    list.y[place] = y;
    list.pair[place] = pair;
  }
  __syncthreads();
  return total;
}

// The taps on all levels of listed pairs [begin, begin + count), which are at most kBlockSize; `tell(i, map)` for that of
// this thread. Every thread must call; a barrier ends it, and one before it is the caller's.
template <int kBlockSize, class T, class Tell>
__device__ __forceinline__ void fill_taps(const Args& args, Visible<T, kBlockSize>& list, i64 image,
                                          i32 begin, i32 count, const Tell& tell) {
  const i32 levels = i32(args.levels), cameras = i32(args.cameras), i = i32(threadIdx.x);
  if (i < count * levels) {
    const i32 listed = i / levels, level = i - listed * levels, pair = list.pair[begin + listed];
    const i32 point = pair / cameras, camera = pair - point * cameras;
    const Map map = map_of(args, image, camera, level);
    Tap<T> tap = tap_of(map, list.x[begin + listed], list.y[begin + listed]);
    tap.weight = weight_row(args, point, camera, level);
    list.taps[i] = tap;
    tell(i, map);
  }
  __syncthreads();
}

// ---- softmax -------------------------------------------------------------------------------------------------------

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) normalize(const Args args) {
  using T = Acc<Scalar>;
  __shared__ T most[kBlockSize], sum[kBlockSize];
  const i64 query = blockIdx.x;
  const i32 groups = i32(args.groups), rows = i32(args.points * args.cameras * args.levels);
  const i32 width = min_of(groups, kBlockSize), slices = kBlockSize / width;
  const i32 slice = i32(threadIdx.x) / width, lane = i32(threadIdx.x) - slice * width;
  const Scalar* logits = static_cast<const Scalar*>(args.weights) + query * rows * groups;
  T* to = static_cast<T*>(args.normalizer) + query * 2 * groups;
#pragma unroll 1
  for (i32 first = 0; first < groups; first += width) {
    const i32 group = first + lane;
    Softmax<T> own = empty_softmax<T>();
    if (group < groups && slice < slices) {
#pragma unroll 4
      for (i32 row = slice; row < rows; row += slices) {
        own.add(T(load(logits[i64(row) * groups + group])));
      }
    }
    most[threadIdx.x] = own.most;
    sum[threadIdx.x] = own.sum;
    __syncthreads();
    if (slice == 0 && group < groups) {
#pragma unroll 1
      for (i32 other = 1; other < slices; ++other) {
        own.add(Softmax<T>{most[other * width + lane], sum[other * width + lane]});
      }
      to[group] = own.most;
      to[groups + group] = own.inverse();
    }
    __syncthreads();
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

// What is read for a tap: its weight and kVector channels of its pixels, as they are. To convert is to wait.
template <class Scalar, class Weight, int kVector>
struct Sample {
  Weight weight;
  Pack<Scalar, kVector> pixels[4];

  // `maps` have `bytes` bytes a row, and weights begin at those of the query.
  template <class T>
  __device__ __forceinline__ void read(const Scalar* map, u32 bytes, const Weight* weights,
                                       const Tap<T>& tap) {
    weight = *row_at(weights, tap.weight, u32(sizeof(Weight)));
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      pixels[corner] = zero_pack<kVector, Scalar>();
      const i32 pixel = tap.pixels[corner];
      if (pixel >= 0) pixels[corner] = load_pack<kVector>(row_at(map, pixel, bytes));
    }
  }
};

// 64 registers: with fewer, the first load of a tap is waited for before the others begin.
template <class Scalar, class Weight, int kVector, int kChannels, int kTapsAtOnce, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 1024 / kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kLanes = kChannels / kVector, kSlices = kBlockSize / kLanes;
  static_assert(kSlices >= 1 && kSlices * kLanes == kBlockSize);
  __shared__ Visible<T, kBlockSize> list;
  __shared__ T partial[kSlices][kChannels];
  const i32 pairs = i32(args.points * args.cameras), levels = i32(args.levels);
  const u32 parts = u32(parts_of(args)), queries = u32(args.queries), part = blockIdx.x % parts;
  const u32 number = blockIdx.x / parts, rest = number / queries;
  const u32 chunks = (u32(args.channels) + kChannels - 1) / kChannels;
  const i64 image = rest / chunks, query = image * args.queries + number % queries;
  const i32 first_channel = i32(rest % chunks) * kChannels, channels = i32(args.channels);
  const i32 lane = i32(threadIdx.x) % kLanes, slice = i32(threadIdx.x) / kLanes;
  const i32 channel = first_channel + lane * kVector;
  const u32 row_bytes = worked_out(u32(channels) * u32(sizeof(Scalar)));
  const bool active = channel < channels;
  const i32 group = active ? channel / (channels / i32(args.groups)) : 0;
  const Normalizer<T> normalized = normalizer_of<T>(args, query, group);
  const Weight* weights =
      static_cast<const Weight*>(args.weights) + weights_of_query(args, query) + group;
  const i32 at_once = kBlockSize / levels;
  const i32 begin_of_part = i32(part) * i32(args.part);
  const i32 end = min_of(begin_of_part + i32(args.part), pairs);
  T sum[kVector] = {};
#pragma unroll 1
  for (i32 first = begin_of_part; first < end; first += kBlockSize) {
    const i32 total = list_visible<kBlockSize>(args, list, query, first, end);
#pragma unroll 1
    for (i32 begin = 0; begin < total; begin += at_once) {
      const i32 count = min_of(at_once, total - begin);
      fill_taps<kBlockSize>(args, list, image, begin, count, [](i32, const Map&) {});
      const i32 taps = active ? count * levels : 0;
#pragma unroll 1
      for (i32 i = slice; i < taps; i += kSlices * kTapsAtOnce) {
        Sample<Scalar, Weight, kVector> samples[kTapsAtOnce];
#pragma unroll
        for (int t = 0; t < kTapsAtOnce; ++t) {
          if (i + t * kSlices >= taps) break;
          const Tap<T>& tap = list.taps[i + t * kSlices];
          samples[t].read(static_cast<const Scalar*>(args.maps[tap.source]) + channel, row_bytes,
                          weights, tap);
        }
#pragma unroll
        for (int t = 0; t < kTapsAtOnce; ++t) {
          if (i + t * kSlices >= taps) break;
          const Tap<T>& tap = list.taps[i + t * kSlices];
          const T weight = normalized(T(load(samples[t].weight)));
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const T factor = weight * tap.share(corner);
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
              sum[c] += factor * load(samples[t].pixels[corner].at[c]);
            }
          }
        }
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) partial[slice][lane * kVector + i] = sum[i];
  __syncthreads();
#pragma unroll 1
  for (i32 c = threadIdx.x; c < min_of(kChannels, channels - first_channel); c += kBlockSize) {
    T all = T(0);
#pragma unroll
    for (int k = 0; k < kSlices; ++k) all += partial[k][c];
    const i64 at = query * channels + first_channel + c;
    if (parts == 1) {
      store_as(args.output, args.output_type, at, all);
    } else {
      static_cast<T*>(args.partials)[part * (args.batch * args.queries * channels) + at] = all;
    }
  }
}

template <class T, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) add_parts(const Args args) {
  const i64 count = args.batch * args.queries * args.channels;
  const i64 at = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (at >= count) return;
  const T* partials = static_cast<const T*>(args.partials) + at;
  const i32 parts = parts_of(args);
  T sum = T(0);
#pragma unroll 8
  for (i32 part = 0; part < parts; ++part) sum += partials[part * count];
  store_as(args.output, args.output_type, at, sum);
}

// ---- gradient of places and weights --------------------------------------------------------------------------------

// Of shared memory, at an address that is a multiple of the bytes wanted.
template <int kCount, class T>
__device__ __forceinline__ void load_shared(const T* from, T* to) {
  constexpr int kWords = int(sizeof(uint4) / sizeof(T));
  if constexpr (kCount % kWords == 0) {
#pragma unroll
    for (int first = 0; first < kCount; first += kWords) {
      Pack<T, kWords> pack;
      const uint4 words = *reinterpret_cast<const uint4*>(from + first);
      pack.words[0] = words.x;
      pack.words[1] = words.y;
      pack.words[2] = words.z;
      pack.words[3] = words.w;
#pragma unroll
      for (int i = 0; i < kWords; ++i) to[first + i] = pack.at[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// How the lanes of a warp share the channels of groups: several whole groups at a time, or one that takes several steps.
struct Lanes {
  i32 per_group;  // packs of channels of a group
  i32 span;       // neighbouring lanes that work on one group
  i32 at_once;    // groups
  i32 group, inner;

  __device__ __forceinline__ Lanes(i32 channels, i32 groups, i32 vector)
      : per_group(channels / groups / vector),
        span(min_of(per_group, kWarpSize)),
        at_once(kWarpSize / span),
        group(i32(threadIdx.x) % kWarpSize / span),
        inner(i32(threadIdx.x) % kWarpSize - group * span) {}

  // Sums over the lanes of a group, in its first lane.
  template <int kCount, class T>
  __device__ __forceinline__ void sum(T (&values)[kCount]) const {
#pragma unroll 1
    for (i32 distance = 1; distance < span; distance *= 2) {
      const bool adds = inner + distance < span;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T other = __shfl_down_sync(0xffffffffu, values[i], distance);
        if (adds) values[i] += other;
      }
    }
  }
};

// The sides of the maps of neighbouring taps.
template <class T>
struct Sides {
  const T *w, *h;
};

// A query's gradient, and what softmax takes off each of its group's.
template <class Weight, class T>
struct Query {
  i64 number;
  const Weight* weights;  // of its samples
  Weight* grad_weights;
  const T* gradient;
  const T* mean;
};

// Adds kVector channels of a query's gradient to the pixels of a sample.
template <int kVector, class T>
__device__ __forceinline__ void add_taps(const Args& args, const Tap<T>& tap, T weight, i32 channel,
                                         const T* gradient) {
  constexpr int kWords = kVector % 4 == 0 ? 4 : 1;
  T* sums = static_cast<T*>(args.gradients[tap.source]) + channel;
  const u32 bytes = u32(args.channels) * u32(sizeof(T));
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    if (tap.pixels[corner] < 0) continue;
    T* to = row_at(sums, tap.pixels[corner], bytes);
#pragma unroll
    for (int i = 0; i < kVector; i += kWords) {
      add_atomically<kWords>(to + i, weight * tap.share(corner), gradient + i);
    }
  }
}

// `count` levels of a pair, kTaps at most, whose loads are in flight together: stores the gradients of their weights, and adds to
// (dx, dy), of which each lane has a part. `sides` are the w and h of their maps. The whole warp must call.
template <class Scalar, class Weight, int kVector, bool kScatter, int kTaps, class T>
__device__ __forceinline__ void differentiate(const Args& args, const Tap<T>* taps, i32 count,
                                              const Sides<T>& sides, const Query<Weight, T>& query,
                                              const Lanes& lanes, T& dx, T& dy) {
  const i32 channels = i32(args.channels), groups = i32(args.groups);
  const i32 channels_per_group = lanes.per_group * kVector;
  const u32 row_bytes = u32(channels) * u32(sizeof(Scalar));
#pragma unroll 1
  for (i32 first = 0; first < groups; first += lanes.at_once) {
    const i32 group = first + lanes.group;
    const bool active = lanes.group < lanes.at_once && group < groups;
    Sample<Scalar, Weight, kVector> samples[kTaps];
    T dots[kTaps][4] = {};
    if (active) {
      const Weight* weights = query.weights + group;
#pragma unroll 1
      for (i32 pack = lanes.inner; pack < lanes.per_group; pack += kWarpSize) {
        const i32 channel = group * channels_per_group + pack * kVector;
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          if (t >= count) break;
          samples[t].read(static_cast<const Scalar*>(args.maps[taps[t].source]) + channel,
                          row_bytes, weights, taps[t]);
        }
        T gradient[kVector];
        load_shared<kVector>(query.gradient + channel, gradient);
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              dots[t][corner] += gradient[i] * T(load(samples[t].pixels[corner].at[i]));
            }
          }
        }
        if constexpr (kScatter) {
          static_assert(kTaps == 1);
          const T weight = normalizer_of<T>(args, query.number, group)(T(load(samples[0].weight)));
          add_taps<kVector>(args, taps[0], weight, channel, gradient);
        }
      }
    }
    const Normalizer<T> normalized = normalizer_of<T>(args, query.number, active ? group : 0);
    T weights[kTaps], values[kTaps] = {};
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (t >= count) break;
      const T right = taps[t].right, down = taps[t].down;
      const T weight = active ? normalized(T(load(samples[t].weight))) : T(0);
      const T top = dots[t][1] - dots[t][0], bottom = dots[t][3] - dots[t][2];
      const T upper = dots[t][0] + right * top, lower = dots[t][2] + right * bottom;
      dx += weight * sides.w[t] * (top + down * (bottom - top));
      dy += weight * sides.h[t] * (lower - upper);
      weights[t] = weight;
      values[t] = upper + down * (lower - upper);
    }
    lanes.sum(values);
    if (!active || lanes.inner != 0) continue;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (t >= count) break;
      if (normalized.used) values[t] = weights[t] * (values[t] - query.mean[group]);
      store(row_at(query.grad_weights, taps[t].weight, u32(sizeof(Weight)))[group], values[t]);
    }
  }
}

// What points get that no camera sees: nothing; under softmax, their weight's share of the mean.
template <class Weight, int kBlockSize, class T>
__device__ __forceinline__ void fill_unseen(const Args& args, const Query<Weight, T>& query,
                                            i32 first, i32 count) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const i32 lane = i32(threadIdx.x) % kWarpSize, warp = i32(threadIdx.x) / kWarpSize;
  const i32 cameras = i32(args.cameras), groups = i32(args.groups), levels = i32(args.levels);
  Weight* weights = query.grad_weights;
  const bool neighbours = args.camera_stride <= args.point_stride || count == args.points * cameras;
  const bool zeros = args.normalizer == nullptr && neighbours;
  const i32 each = levels * groups;
#pragma unroll 4
  for (i32 i = threadIdx.x; zeros && i < count * each; i += kBlockSize) {
    store(weights[first * each + i], T(0));
  }
#pragma unroll 1
  for (i32 i = lane; !zeros && i < each; i += kWarpSize) {
    const i32 level = i / groups, group = i - level * groups;
    const Normalizer<T> normalized = normalizer_of<T>(args, query.number, group);
#pragma unroll 1
    for (i32 pair = first + warp; pair < first + count; pair += kWarps) {
      const i32 point = pair / cameras, camera = pair - point * cameras;
      const i32 at = weight_row(args, point, camera, level) + group;
      T value = T(0);
      if (normalized.used) {
        value = -normalized(T(load(query.weights[at]))) * query.mean[group];
      }
      store(weights[at], value);
    }
  }
  const i64 locations = (query.number * args.points * cameras + first) * 2;
#pragma unroll 1
  for (i32 i = threadIdx.x; i < 2 * count; i += kBlockSize) {
    store_as(args.grad_locations, args.location_type, locations + i, T(0));
  }
}

// Dynamic shared memory: a number for each channel and group.
template <class Scalar, class Weight, int kVector, bool kScatter, int kTapsAtOnce, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) points(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize;
  extern __shared__ uint4 memory[];
  __shared__ VisibleSides<T, kBlockSize> list;
  const i32 channels = i32(args.channels), groups = i32(args.groups), levels = i32(args.levels);
  const i32 cameras = i32(args.cameras), pairs = i32(args.points) * cameras;
  const u32 parts = u32((pairs + kBlockSize - 1) / kBlockSize);
  const i32 first = i32(blockIdx.x % parts) * kBlockSize;
  const i32 lane = i32(threadIdx.x) % kWarpSize, warp = i32(threadIdx.x) / kWarpSize;
  T* gradient = reinterpret_cast<T*>(memory);
  T* mean = gradient + channels;
  const i64 number = blockIdx.x / parts;
  const i64 weights = weights_of_query(args, number);
  const Query<Weight, T> query = {number, static_cast<const Weight*>(args.weights) + weights,
                                  static_cast<Weight*>(args.grad_weights) + weights, gradient,
                                  mean};
#pragma unroll 1
  for (i32 c = threadIdx.x; c < channels; c += kBlockSize) {
    gradient[c] = load_as<T>(args.grad_output, args.gradient_type, query.number * channels + c);
  }
  __syncthreads();
  if (args.normalizer != nullptr) {
    // The mean of the gradients of weights, by weight: what it sums to over samples is the output.
    const i32 per_group = channels / groups;
#pragma unroll 1
    for (i32 group = warp; group < groups; group += kWarps) {
      T sum = T(0);
#pragma unroll 1
      for (i32 c = group * per_group + lane; c < (group + 1) * per_group; c += kWarpSize) {
        const i64 at = query.number * channels + c;
        sum += gradient[c] * load_as<T>(args.output, args.output_type, at);
      }
      sum = warp_sum(sum);
      if (lane == 0) mean[group] = sum;
    }
    __syncthreads();
  }
  fill_unseen<Weight, kBlockSize>(args, query, first, min_of(kBlockSize, pairs - first));
  // Its barriers also order what was stored above before what is stored below.
  const i32 total = list_visible<kBlockSize, T>(args, list, query.number, first, pairs);
  const Lanes lanes(channels, groups, kVector);
  const i64 image = i32(query.number) / i32(args.queries);
  const i32 at_once = kBlockSize / levels;
#pragma unroll 1
  for (i32 begin = 0; begin < total; begin += at_once) {
    const i32 count = min_of(at_once, total - begin);
    fill_taps<kBlockSize, T>(args, list, image, begin, count, [&](i32 tap, const Map& map) {
      list.w[tap] = T(map.w);
      list.h[tap] = T(map.h);
    });
#pragma unroll 1
    for (i32 i = warp; i < count; i += kWarps) {
      const i32 pair = list.pair[begin + i];
      T dx = T(0), dy = T(0);
#pragma unroll 1
      for (i32 level = 0; level < levels; level += kTapsAtOnce) {
        const i32 tap = i * levels + level;
        const Sides<T> sides = {list.w + tap, list.h + tap};
        differentiate<Scalar, Weight, kVector, kScatter, kTapsAtOnce>(
            args, list.taps + tap, levels - level, sides, query, lanes, dx, dy);
      }
      dx = warp_sum(dx);
      dy = warp_sum(dy);
      if (lane == 0) {
        const i64 at = (query.number * pairs + pair) * 2;
        store_as(args.grad_locations, args.location_type, at, dx);
        store_as(args.grad_locations, args.location_type, at + 1, dy);
      }
    }
    __syncthreads();
  }
}

}  // namespace torchkiln::deformable_aggregation
