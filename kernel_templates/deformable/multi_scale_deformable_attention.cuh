// Multi-scale deformable attention on the GPU.
//
//   forward   kLanes lanes per query and head, lanes on channels, 16 bytes each. What the samples take is worked out once
//             for all channels, a sample a lane, and stands in shared memory. Warps talk to themselves only
//   backward  the same lanes: gradients of places and weights. The products with the four pixels of a sample are summed
//             over the lanes so that each quarter of them ends with one. kScatter: value gradients too, by vector atomics
//             of 16 bytes of sums, so that an instruction fills sectors; else the first pixel of each sample is left
//             for those below
//   bound     the least and last pixel of each run of kRun samples
//   gather    the value gradient, the same bits every time: a block owns a strip of neighbouring pixels and a chunk of
//             channels of a head, looks for runs, then samples, that touch it, and each group of its lanes sums, in
//             registers, what falls on kPixels pixels
//
// spills: what the loops around the innermost ones keep; with registers for it, fewer warps would wait for memory at once
// Queries of one head are neighbours in the grid: those of an encoder read pixels that its neighbours read, too.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/atomics.cuh"
#include "common/pack.cuh"
#include "common/scan.cuh"
#include "deformable/multi_scale_deformable_attention.h"

namespace torchkiln::multi_scale_deformable_attention {

// ---- queries -------------------------------------------------------------------------------------------------------

template <class Scalar>
struct ByteOf {
  using Type = u8;
};
template <class Scalar>
struct ByteOf<const Scalar> {
  using Type = const u8;
};

// What the kLanes lanes of one query and head work on.
struct Item {
  Query query;
  i64 value;         // its image's and head's first element of the value
  i64 output;        // its element of the output
  i64 of_head, row;  // image and head; the query
  const u8* mask;    // of its image
  bool active;
};

template <int kLanes, int kBlockSize>
__device__ __forceinline__ Item item_of(const Args& args) {
  const i64 at = i64(blockIdx.x) * (kBlockSize / kLanes) + threadIdx.x / kLanes;
  const i64 queries = args.b * args.m * args.q;
  Item item = {};
  item.active = at < queries;
  if (!item.active) return item;
  // A division of 64 bits takes a hundred instructions.
  item.of_head = queries >> 32 == 0 ? i64(u32(at) / u32(args.q)) : at / args.q;
  item.row = at - item.of_head * args.q;
  const i64 image = u32(item.of_head) / u32(args.m), head = item.of_head - image * args.m;
  item.query = query_at(args, image, head, item.row);
  item.value = (image * args.s * args.m + head) * args.d;
  item.output = ((image * args.q + item.row) * args.m + head) * args.d;
  item.mask = args.mask == nullptr ? nullptr : args.mask + image * args.s;
  return item;
}

// Elements i * step apart: one instruction, where 64 bits by 64 take four.
template <class Scalar>
__device__ __forceinline__ Scalar* apart(Scalar* from, i32 i, i32 step_bytes) {
  using Byte = typename ByteOf<Scalar>::Type;
  return reinterpret_cast<Scalar*>(reinterpret_cast<Byte*>(from) + i64(i) * step_bytes);
}

// Over the kLanes lanes of a query; every lane of the warp must call.
template <int kLanes, class T, class F>
__device__ __forceinline__ T over_lanes(T value, const F& join) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

template <class T, class Place, int kLanes>
__device__ __forceinline__ Softmax<T> softmax_of(const Args& args, const Item& item) {
  if (args.references == nullptr) return {T(0), T(1)};
  const Place* logits = static_cast<const Place*>(args.weights) + item.query.first;
  const i32 lane = threadIdx.x % kLanes, samples = item.active ? i32(args.l * args.p) : 0;
  T greatest = kLowest<T>, sum = T(0);
#pragma unroll 1
  for (i32 s = lane; s < samples; s += kLanes) greatest = max_of(load(logits[s]), greatest);
  greatest = over_lanes<kLanes>(greatest, [](T a, T b) { return max_of(a, b); });
#pragma unroll 1
  for (i32 s = lane; s < samples; s += kLanes) sum += exp_of(load(logits[s]) - greatest);
  sum = over_lanes<kLanes>(sum, [](T a, T b) { return a + b; });
  return {greatest, fast_quotient(T(1), sum)};
}

// ---- samples in shared memory ---------------------------------------------------------------------------------------

// kPoints samples of each of kGroups queries.
template <class T, int kGroups, int kPoints>
struct Table {
  Pixels pixels[kGroups * kPoints];
  Weights<T> weights[kGroups * kPoints];

  // Turned by the sample, so that neither lanes on samples nor groups on one sample meet in a bank.
  __device__ __forceinline__ static i32 slot(i32 group, i32 sample) {
    return i32(u32(sample) * kGroups + u32(group + sample) % kGroups);
  }
};

// One sample, worked out.
template <class T>
struct Sample {
  Taps<T> taps;
  T weight;
};

template <class T, class Place>
__device__ __forceinline__ Sample<T> sample_at(const Args& args, const Item& item, i32 sample,
                                               Softmax<T> softmax) {
  const i32 level = sample / i32(args.p);
  const Level size = level_of(args.shapes, args.starts, args.s, level);
  const auto at = position_of<T, Place>(args, item.query, sample, level, size);
  return {taps_at(at, size, item.mask), weight_of<T, Place>(args, item.query, sample, softmax)};
}

// Lists the samples [begin, begin + count) that exist, in order; returns how many. Each element of the weights has the
// sample's own in it, but for double, where it stands apart: sums are then those of the definition, term by term.
template <class Place, int kLanes, class T, class AnyTable>
__device__ __forceinline__ i32 list_samples(AnyTable& table, T* shares, const Args& args,
                                            const Item& item, i32 begin, i32 count,
                                            Softmax<T> softmax) {
  const i32 lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const u32 own = (kLanes == 32 ? ~0u : (1u << kLanes) - 1u) << (threadIdx.x % kWarpSize - lane);
  i32 listed = 0;
#pragma unroll 1
  for (i32 first = 0; first < count; first += kLanes) {
    Sample<T> sample = {};
    if (item.active && first + lane < count) {
      sample = sample_at<T, Place>(args, item, begin + first + lane, softmax);
    }
    const bool live = sample.taps.live != 0;
    const u32 all = __ballot_sync(0xffffffffu, live) & own;
    if (live) {
      const i32 before = __popc(all & ((1u << threadIdx.x % kWarpSize) - 1u));
      const i32 slot = AnyTable::slot(group, listed + before);
      if constexpr (sizeof(T) == 8) {
        shares[slot] = sample.weight;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) sample.taps.weights.at[i] *= sample.weight;
      }
      table.pixels[slot] = sample.taps.pixels;
      table.weights[slot] = sample.taps.weights;
    }
    listed += __popc(all);
  }
  return listed;
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class Scalar, class Place, int kVector, int kLanes, int kPoints, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kGroups = kBlockSize / kLanes;
  constexpr bool kApart = sizeof(T) == 8;
  // Eight loads of 16 bytes in flight are enough, and fill the registers.
  constexpr int kUnrolled = kVector == 8 ? 1 : 2;
  using Samples = Table<T, kGroups, kPoints>;
  __shared__ Samples table;
  __shared__ T shares[kApart ? kGroups * kPoints : 1];
  const auto item = item_of<kLanes, kBlockSize>(args);
  const i32 lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const i32 samples = i32(args.l * args.p), channels = i32(args.d);
  const i32 stride = i32(args.m * args.d * i64(sizeof(Scalar)));
  const auto softmax = softmax_of<T, Place, kLanes>(args, item);
  i32 listed = 0;
#pragma unroll 1
  for (i32 first = 0; first < channels; first += kLanes * kVector) {
    const i32 channel = first + lane * kVector;
    const bool active = item.active && channel < channels;
    const Scalar* map = static_cast<const Scalar*>(args.value) + item.value + channel;
    T sums[kVector] = {};
#pragma unroll 1
    for (i32 begin = 0; begin < samples; begin += kPoints) {
      if (first == 0 || samples > kPoints) {
        __syncwarp();
        listed = list_samples<Place, kLanes>(table, shares, args, item, begin,
                                             min_of(kPoints, samples - begin), softmax);
        __syncwarp();
      }
      if (!active) continue;
#pragma unroll kUnrolled
      for (i32 sample = 0; sample < listed; ++sample) {
        const i32 slot = Samples::slot(group, sample);
        const Pixels pixels = table.pixels[slot];
        const Weights<T> weights = table.weights[slot];
        T own[kVector] = {};
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const auto values = load_pack<kVector>(apart(map, pixels.at[corner], stride));
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            (kApart ? own : sums)[i] += weights.at[corner] * load(values.at[i]);
          }
        }
        if constexpr (kApart) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[i] += own[i] * shares[slot];
        }
      }
    }
    if (!active) continue;
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(result.at[i], sums[i]);
    store_pack<kVector>(static_cast<Scalar*>(args.output) + item.output + channel, result);
  }
}

// ---- gradients of places and weights ----------------------------------------------------------------------------------

// Sums four numbers over kLanes lanes: lane i of a quarter ends with number `lane / (kLanes / 4)`. Every lane of the warp
// must call.
template <int kLanes, class T>
__device__ __forceinline__ T quarter_sum(const T* numbers) {
  const bool upper = (threadIdx.x & (kLanes / 2)) != 0, odd = (threadIdx.x & (kLanes / 4)) != 0;
  T pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T other = __shfl_xor_sync(0xffffffffu, upper ? numbers[i] : numbers[i + 2], kLanes / 2);
    pair[i] = (upper ? numbers[i + 2] : numbers[i]) + other;
  }
  T sum =
      (odd ? pair[1] : pair[0]) + __shfl_xor_sync(0xffffffffu, odd ? pair[0] : pair[1], kLanes / 4);
#pragma unroll
  for (int offset = kLanes / 8; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  return sum;
}

template <int kVector, class T>
__device__ __forceinline__ void scatter(T* to, T weight, const T* values) {
  constexpr int kNumbers = kVector % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < kVector; i += kNumbers) add_atomically<kNumbers>(to + i, weight, values + i);
}

// The products of the gradient of the output with the pixels of all samples of a chunk, into `products`; with kScatter,
// what falls on the pixels. Every lane of the warp must call.
template <class Scalar, bool kScatter, int kVector, int kLanes, class AnyTable, class T>
__device__ __forceinline__ void multiply(const AnyTable& table, Weights<T>* products,
                                         const Args& args, const Item& item, i32 count, i32 first,
                                         bool scatters) {
  const i32 lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const i32 channel = first + lane * kVector;
  const i32 elements = i32(args.m * args.d);
  const bool active = item.active && channel < args.d;
  const Scalar* map = static_cast<const Scalar*>(args.value) + item.value + channel;
  T* sums_of_map = kScatter ? static_cast<T*>(args.grad_value) + item.value + channel : nullptr;
  constexpr int kUnrolled = kVector == 8 ? 1 : 2;
  T gradient[kVector] = {};
  if (active) {
    const auto given =
        load_pack<kVector>(static_cast<const Scalar*>(args.output) + item.output + channel);
#pragma unroll
    for (int i = 0; i < kVector; ++i) gradient[i] = load(given.at[i]);
  }
#pragma unroll kUnrolled
  for (i32 sample = 0; sample < count; ++sample) {
    const i32 slot = AnyTable::slot(group, sample);
    const Pixels pixels = table.pixels[slot];
    T sums[4] = {};
    if (active) {
      Weights<T> weights;
      if constexpr (kScatter) weights = table.weights[slot];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const auto values =
            load_pack<kVector>(apart(map, pixels.at[corner], elements * i32(sizeof(Scalar))));
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[corner] += gradient[i] * load(values.at[i]);
        if constexpr (kScatter) {
          if (scatters && weights.at[corner] != T(0)) {
            scatter<kVector>(apart(sums_of_map, pixels.at[corner], elements * i32(sizeof(T))),
                             weights.at[corner], gradient);
          }
        }
      }
    }
    const T sum = quarter_sum<kLanes>(sums);
    constexpr int kQuarter = kLanes / 4;
    if (lane % kQuarter == 0) {
      T& to = products[slot].at[lane / kQuarter];
      to = first == 0 ? sum : to + sum;
    }
  }
}

// What `gather` needs of a sample, by level.
template <class T>
__device__ __forceinline__ void leave(const Args& args, const Item& item, i32 sample,
                                      const Sample<T>& of) {
  const i32 points = i32(args.p), level = sample / points;
  const i64 at = (item.of_head * args.l + level) * args.q * args.p + item.row * points + sample -
                 level * points;
  args.firsts[at] = of.taps.first;
  if (args.shares != nullptr) static_cast<T*>(args.shares)[at] = of.weight;
}

// Turns the products of samples [begin, begin + count) into gradients; returns this lane's part of the sum of their
// weights times the gradients of these.
template <class AnyTable, class Place, int kLanes, class T>
__device__ __forceinline__ T conclude(Weights<T>* products, const Args& args, const Item& item,
                                      i32 begin, i32 count, Softmax<T> softmax) {
  T part = T(0);
#pragma unroll 1
  for (i32 s = threadIdx.x % kLanes; s < count && item.active; s += kLanes) {
    const auto sample = sample_at<T, Place>(args, item, begin + s, softmax);
    Weights<T>& own = products[AnyTable::slot(threadIdx.x / kLanes, s)];
    const auto gradient = gradient_of(sample.taps, own);
    own = {{gradient.at.y * sample.weight, gradient.at.x * sample.weight, gradient.weight,
            sample.weight}};
    part += sample.weight * gradient.weight;
  }
  return part;
}

// Writes what `conclude` left; total: the sum of its parts over the lanes, of all samples.
template <class AnyTable, class Place, int kLanes, class T>
__device__ __forceinline__ void write(const Weights<T>* products, const Args& args,
                                      const Item& item, i32 begin, i32 count, T total) {
#pragma unroll 1
  for (i32 s = threadIdx.x % kLanes; s < count && item.active; s += kLanes) {
    const i32 own = begin + s, level = own / i32(args.p);
    const Weights<T> left = products[AnyTable::slot(threadIdx.x / kLanes, s)];
    const Level size = level_of(args.shapes, args.starts, args.s, level);
    write_places<T, Place>(args, item.query, own, level, size, {left.at[0], left.at[1]});
    store(static_cast<Place*>(args.grad_weights)[item.query.first + own],
          args.references != nullptr ? left.at[3] * (left.at[2] - total) : left.at[2]);
  }
}

template <class Scalar, class Place, bool kScatter, int kVector, int kLanes, int kPoints,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kGroups = kBlockSize / kLanes;
  using Samples = Table<T, kGroups, kPoints>;
  __shared__ Samples table;
  __shared__ Weights<T> products[kGroups * kPoints];
  const auto item = item_of<kLanes, kBlockSize>(args);
  const i32 lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const i32 samples = i32(args.l * args.p), channels = i32(args.d);
  const auto softmax = softmax_of<T, Place, kLanes>(args, item);
  T total = T(0);
  // The gradient of a softmax needs all samples before it can be written: twice, where they do not fit at once.
  const bool fused = args.references != nullptr;
  const i32 rounds = fused && samples > kPoints ? 2 : 1;
#pragma unroll 1
  for (i32 begin = 0, round = 0; round < rounds;) {
    const i32 count = min_of(kPoints, samples - begin);
    const bool writes = round + 1 == rounds;
    __syncwarp();
#pragma unroll 1
    for (i32 s = lane; s < count; s += kLanes) {
      Sample<T> sample = {};
      if (item.active) sample = sample_at<T, Place>(args, item, begin + s, softmax);
      const i32 slot = Samples::slot(group, s);
      table.pixels[slot] = sample.taps.pixels;
      if constexpr (kScatter) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sample.taps.weights.at[i] *= sample.weight;
        table.weights[slot] = sample.taps.weights;
      } else if (item.active) {
        leave<T>(args, item, begin + s, sample);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (i32 first = 0; first < channels; first += kLanes * kVector) {
      multiply<Scalar, kScatter, kVector, kLanes>(table, products, args, item, count, first,
                                                  writes);
    }
    __syncwarp();
    const T part = conclude<Samples, Place, kLanes>(products, args, item, begin, count, softmax);
    if (fused && (rounds == 1 || !writes)) {
      total += over_lanes<kLanes>(part, [](T a, T b) { return a + b; });
    }
    if (writes) write<Samples, Place, kLanes>(products, args, item, begin, count, total);
    begin += kPoints;
    if (begin < samples) continue;
    begin = 0;
    ++round;
  }
}

// ---- gradient of the value, owned by pixels ---------------------------------------------------------------------------

// The least and last pixel of each run of samples, a warp a run.
template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) bound(const Args args) {
  const i64 per_row = args.q * args.p, runs = (per_row + kRun - 1) / kRun;
  const i64 warp = i64(blockIdx.x) * (kBlockSize / kWarpSize) + threadIdx.x / kWarpSize;
  const i64 row = warp / runs, run = warp - row * runs;
  if (row >= args.b * args.m * args.l) return;
  const Level size = level_of(args.shapes, args.starts, args.s, row % args.l);
  const i64 lane = threadIdx.x % kWarpSize, own = run * kRun + lane;
  const i32 first = own < per_row ? args.firsts[row * per_row + own] : kOutside;
  i32 least = first == kOutside ? 2147483647 : first;
  i32 last = first == kOutside ? -1 : first + size.w + 1;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    least = min_of(least, __shfl_xor_sync(0xffffffffu, least, offset));
    last = max_of(last, __shfl_xor_sync(0xffffffffu, last, offset));
  }
  if (lane == 0) {
    args.spans[2 * warp] = least;
    args.spans[2 * warp + 1] = last;
  }
}

// What two neighbouring pixels get of a sample.
template <class T>
struct alignas(2 * sizeof(T)) Hit {
  T left, right;
};

// What the threads of a block of `gather` are to each other: kSets sets of groups of kLanes lanes. The groups of a set
// share the strip, kPixels pixels each; the sets share the samples, and their sums are added up in the end.
template <class Scalar, int kVector, int kLanes, int kPixels, int kSets, int kBlockSize>
struct Split {
  static constexpr int kGroups = kBlockSize / kLanes / kSets;  // of a set
  static constexpr int kStrip = kGroups * kPixels;
  static constexpr int kChannels = kLanes * kVector;
  static constexpr int kBytes = 16384;
  // Samples that are added up at once: so many as have room for their rows of the gradient.
  static constexpr int kRows = kBytes / int(sizeof(Scalar)) / kChannels;
  static constexpr int kBatch = kRows < kBlockSize ? kRows : kBlockSize;
  static_assert(kGroups % (kWarpSize / kLanes) == 0, "a warp belongs to one set");

  __device__ __forceinline__ static i32 set() { return i32(threadIdx.x) / kLanes / kGroups; }
  __device__ __forceinline__ static i32 group() { return i32(threadIdx.x) / kLanes % kGroups; }
};

// Samples are collected until they are worth being added up.
template <class Scalar, class AnySplit, int kBlockSize>
struct Collected {
  using T = Acc<Scalar>;
  union alignas(16) {
    Scalar rows[AnySplit::kBatch * AnySplit::kChannels];  // of the gradient of the output
    T partial_sums[AnySplit::kBytes / int(sizeof(T))];    // in the end
  };
  Hit<T> hits[2 * AnySplit::kBatch];
  i32 pixels[2 * AnySplit::kBatch];  // of hits: the left one, from the strip's first; or kOutside
  i32 samples[2 * kBlockSize];       // of the row
  i32 runs[kBlockSize];
  i32 counts[2][kBlockSize / kWarpSize];
  int partial[kBlockSize / kWarpSize];
};

// Samples of one level, head and image, and the strip of pixels of a block.
struct Target {
  i64 image, head, row;
  i32 level, begin, pixels;
  Level size;

  // Whether a sample whose first pixel is this one may touch the strip.
  __device__ __forceinline__ bool meets(i32 first) const {
    return u32(first) - u32(begin) + 1 <= u32(pixels) ||
           u32(first + size.w) - u32(begin) + 1 <= u32(pixels);
  }
};

// Two hits of a sample, on its upper and its lower pixels.
template <class T, class Place>
__device__ __forceinline__ void expand(const Args& args, const Target& to, i32 sample, Hit<T>* hits,
                                       i32* pixels) {
  const i32 points = i32(args.p), query = sample / points;
  const i32 own = to.level * points + sample - query * points;
  const auto at = query_at(args, to.image, to.head, query);
  const auto position = position_of<T, Place>(args, at, own, to.level, to.size);
  const u8* mask = args.mask == nullptr ? nullptr : args.mask + to.image * args.s;
  const Taps<T> taps = taps_at(position, to.size, mask);
  const T share = args.shares != nullptr
                      ? static_cast<const T*>(args.shares)[to.row * args.q * args.p + sample]
                      : T(load(static_cast<const Place*>(args.weights)[at.first + own]));
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const i32 pixel = taps.first + lower * to.size.w - to.begin;
    const bool hit = (taps.live >> 2 * lower & 3u) != 0 && pixel >= -1 && pixel < to.pixels;
    pixels[lower] = hit ? pixel : kOutside;
    hits[lower] = {taps.weights.at[2 * lower] * share, taps.weights.at[2 * lower + 1] * share};
  }
}

// What falls on the kPixels pixels of a group of lanes, for kVector channels of a lane.
template <int kPixels, int kVector, class T>
struct Sums {
  T at[kPixels][kVector];

  __device__ __forceinline__ void add(i32 pixel, Hit<T> hit, const T* gradient) {
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const T weight = pixel == j ? hit.left : (pixel + 1 == j ? hit.right : T(0));
      if (weight == T(0)) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) at[j][i] += weight * gradient[i];
    }
  }
};

// Reads the gradients of a batch: all at once, because those who add them have to wait for each.
template <class Scalar, int kVector, int kLanes, int kBlockSize>
__device__ __forceinline__ void load_rows(Scalar* rows, const i32* samples, i32 count,
                                          const Args& args, const Target& to, i32 first_channel) {
  const i32 stride = i32(args.m * args.d * i64(sizeof(Scalar))), points = i32(args.p);
  const i32 part = i32(threadIdx.x) % kLanes * kVector;
  if (first_channel + part >= args.d) return;
  const Scalar* gradients = static_cast<const Scalar*>(args.output) +
                            (to.image * args.q * args.m + to.head) * args.d + first_channel + part;
#pragma unroll 4
  for (i32 row = i32(threadIdx.x) / kLanes; row < count; row += kBlockSize / kLanes) {
    const auto values = load_pack<kVector>(apart(gradients, samples[row] / points, stride));
    store_pack<kVector>(rows + row * (kLanes * kVector) + part, values);
  }
}

// Of shared memory: 16 bytes at once, or one element.
template <int kCount, class Scalar>
__device__ __forceinline__ Pack<Scalar, kCount> read_pack(const Scalar* from) {
  Pack<Scalar, kCount> result;
  if constexpr (kCount == 1) {
    result.at[0] = *from;
  } else {
    static_assert(Pack<Scalar, kCount>::kBytes == 16);
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    result.words[0] = words.x;
    result.words[1] = words.y;
    result.words[2] = words.z;
    result.words[3] = words.w;
  }
  return result;
}

// Adds the set's share of hits [0, n) to the group's pixels; each group goes through its own ones, in order. Every thread
// must call.
template <class AnySplit, int kLanes, int kSets, class Scalar, int kPixels, int kVector, class T>
__device__ __forceinline__ void add_hits(const Scalar* rows, const Hit<T>* hits, const i32* pixels,
                                         i32 n, Sums<kPixels, kVector, T>& sums) {
  constexpr int kWarpGroups = kWarpSize / kLanes;
  const i32 group = AnySplit::group(), lane = threadIdx.x % kWarpSize;
  const i32 first_group = group / kWarpGroups * kWarpGroups;
#pragma unroll 1
  for (i32 begin = AnySplit::set() * kWarpSize; begin < n; begin += kSets * kWarpSize) {
    const i32 pixel = begin + lane < n ? pixels[begin + lane] : kOutside;
    u32 own = 0;
#pragma unroll
    for (int j = 0; j < kWarpGroups; ++j) {
      const i32 first = (first_group + j) * kPixels;
      const u32 found = __ballot_sync(0xffffffffu, pixel >= first - 1 && pixel < first + kPixels);
      if (first_group + j == group) own = found;
    }
#pragma unroll 1
    for (; own != 0; own &= own - 1) {
      const i32 at = begin + __ffs(int(own)) - 1;
      const Scalar* row = rows + at / 2 * (kLanes * kVector) + lane % kLanes * kVector;
      const auto given = read_pack<kVector>(row);
      T gradient[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) gradient[i] = load(given.at[i]);
      sums.add(pixels[at] - group * kPixels, hits[at], gradient);
    }
  }
}

// Goes through the samples of a level that touch the strip. Every thread of the block must call.
template <class Place, class AnySplit, int kLanes, int kSets, int kBlockSize, class Scalar,
          int kPixels, int kVector, class T>
__device__ __forceinline__ void add_level(Collected<Scalar, AnySplit, kBlockSize>& collected,
                                          const Args& args, const Target& to, i32 first_channel,
                                          Sums<kPixels, kVector, T>& sums) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const i32 per_row = i32(args.q * args.p), runs = (per_row + kRun - 1) / kRun;
  const i32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const i32* firsts = args.firsts + to.row * per_row;
  const i32* spans = args.spans + to.row * runs * 2;
  i32 pending = 0, parity = 0;
#pragma unroll 1
  for (i32 base = 0; base < runs; base += kBlockSize) {
    const i32 candidate = base + i32(threadIdx.x);
    const bool listed = candidate < runs && spans[2 * candidate] < to.begin + to.pixels &&
                        spans[2 * candidate + 1] >= to.begin;
    int total;
    const int place = block_exclusive_sum<kBlockSize>(listed ? 1 : 0, collected.partial, total);
    if (listed) collected.runs[place] = candidate;
    __syncthreads();
    // The last round of all adds up what is left.
    const bool last = base + kBlockSize >= runs;
#pragma unroll 1
    for (i32 i = 0; i < total || (last && i == 0); i += kWarps) {
      const i32 own = i + warp < total ? collected.runs[i + warp] * kRun + lane : per_row;
      const bool meets = own < per_row && to.meets(firsts[own]);
      const u32 found = __ballot_sync(0xffffffffu, meets);
      if (lane == 0) collected.counts[parity][warp] = __popc(found);
      __syncthreads();
      i32 before = pending;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const i32 count = collected.counts[parity][w];
        if (w < warp) before += count;
        pending += count;
      }
      // The other counts are those of the next round, whose barrier all readers of these have reached before it ends.
      parity ^= 1;
      if (meets) collected.samples[before + __popc(found & ((1u << lane) - 1u))] = own;
      if (pending < kBlockSize && !(last && i + kWarps >= total)) continue;
#pragma unroll 1
      for (i32 first = 0; first < pending; first += AnySplit::kBatch) {
        const i32 count = min_of(i32(AnySplit::kBatch), pending - first);
        __syncthreads();
        const i32* samples = collected.samples + first;
        if (i32(threadIdx.x) < count) {
          expand<T, Place>(args, to, samples[threadIdx.x], collected.hits + 2 * threadIdx.x,
                           collected.pixels + 2 * threadIdx.x);
        }
        load_rows<Scalar, kVector, kLanes, kBlockSize>(collected.rows, samples, count, args, to,
                                                       first_channel);
        __syncthreads();
        add_hits<AnySplit, kLanes, kSets>(collected.rows, collected.hits, collected.pixels,
                                          2 * count, sums);
      }
      pending = 0;
    }
  }
}

// Adds the sums of all sets to those of the first one, in order. Every thread of the block must call.
template <class AnySplit, int kSets, int kPixels, int kVector, class T>
__device__ __forceinline__ void join_sets(T* shared, Sums<kPixels, kVector, T>& sums) {
  constexpr int kThreads = AnySplit::kGroups * (AnySplit::kChannels / kVector);  // of a set
  const i32 set = AnySplit::set(), own = i32(threadIdx.x) % kThreads;
  // Neighbours of a set lie side by side.
  const auto at = [&](i32 of_set, int number) -> T& {
    return shared[((of_set - 1) * (kPixels * kVector) + number) * kThreads + own];
  };
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kPixels * kVector && set > 0; ++j)
    at(set, j) = sums.at[j / kVector][j % kVector];
  __syncthreads();
#pragma unroll 1
  for (i32 other = 1; other < kSets && set == 0; ++other) {
#pragma unroll
    for (int j = 0; j < kPixels * kVector; ++j) sums.at[j / kVector][j % kVector] += at(other, j);
  }
}

// Grid: chunks of channels, heads, images, then strips, those of the coarse levels first: most samples fall on them.
template <class Scalar, class Place, int kVector, int kLanes, int kPixels, int kSets,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, 768 / kBlockSize) gather(const Args args) {
  using T = Acc<Scalar>;
  using AnySplit = Split<Scalar, kVector, kLanes, kPixels, kSets, kBlockSize>;
  __shared__ Collected<Scalar, AnySplit, kBlockSize> collected;
  const u32 chunks = u32((args.d + AnySplit::kChannels - 1) / AnySplit::kChannels);
  const u32 strips = u32((args.s + AnySplit::kStrip - 1) / AnySplit::kStrip);
  u32 rest = blockIdx.x;
  const i32 first_channel = i32(rest % chunks) * AnySplit::kChannels;
  rest /= chunks;
  Target to = {};
  to.head = rest % u32(args.m);
  rest /= u32(args.m);
  to.image = rest % u32(args.b);
  to.begin = i32(strips - 1 - rest / u32(args.b)) * AnySplit::kStrip;
  to.pixels = i32(min_of(i64(AnySplit::kStrip), args.s - to.begin));
  Sums<kPixels, kVector, T> sums = {};
#pragma unroll 1
  for (to.level = 0; to.level < args.l; ++to.level) {
    to.size = level_of(args.shapes, args.starts, args.s, to.level);
    const i64 end = i64(to.size.start) + i64(to.size.h) * to.size.w;
    if (to.size.start >= to.begin + to.pixels || end <= to.begin) continue;
    to.row = (to.image * args.m + to.head) * args.l + to.level;
    add_level<Place, AnySplit, kLanes, kSets, kBlockSize, Scalar>(collected, args, to,
                                                                  first_channel, sums);
  }
  if constexpr (kSets > 1) join_sets<AnySplit, kSets>(collected.partial_sums, sums);
  const i32 channel = first_channel + i32(threadIdx.x) % kLanes * kVector;
  if (channel >= args.d || AnySplit::set() > 0) return;
  const i32 own = AnySplit::group() * kPixels;
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
    if (own + j >= to.pixels) return;
    const i64 pixel = to.image * args.s + to.begin + own + j;
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(result.at[i], sums.at[j][i]);
    store_pack<kVector>(
        static_cast<Scalar*>(args.grad_value) + (pixel * args.m + to.head) * args.d + channel,
        result);
  }
}

}  // namespace torchkiln::multi_scale_deformable_attention
