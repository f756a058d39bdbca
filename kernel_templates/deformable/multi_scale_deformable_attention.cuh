// Multi-scale deformable attention on the GPU.
//
//   forward   kLanes lanes per query and head, lanes on channels, 16 bytes each. What the samples take is worked out once
//             for all channels, a sample a lane, and stands in shared memory. Warps talk to themselves only
//   backward  the same lanes: gradients of places and weights. The products with the four pixels of a sample are summed
//             over the lanes so that each quarter of them ends with one. kScatter: value gradients too, by vector atomics
//             of 16 bytes of sums, so that an instruction fills sectors; else, where pixels gather, each sample is left
//             for those, and counted
//
// spills: what the loops around the innermost ones keep; with registers for it, fewer warps would wait for memory at once
// Queries of one head are neighbours in the grid: those of an encoder read pixels that its neighbours read, too.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/atomics.cuh"
#include "common/reduce.cuh"
#include "deformable/multi_scale_deformable_attention_samples.cuh"

namespace torchkiln::multi_scale_deformable_attention {

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

// Lists the samples [begin, begin + count) that exist, in order; returns how many. Each element of the weights has the
// sample's own in it, but for double, where it stands apart: sums are then those of the definition, term by term.
template <class Place, int kLanes, class T, class AnyTable>
__device__ __forceinline__ i32 list_samples(AnyTable& table, T* shares, const Args& args,
                                            const Levels& levels, const Item& item, i32 begin,
                                            i32 count, Softmax<T> softmax) {
  const Points points(args);
  const i32 lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const u32 own = (kLanes == 32 ? ~0u : (1u << kLanes) - 1u) << (threadIdx.x % kWarpSize - lane);
  i32 listed = 0;
#pragma unroll 1
  for (i32 first = 0; first < count; first += kLanes) {
    Sample<T> sample = {};
    if (item.active && first + lane < count) {
      const i32 number = begin + first + lane;
      sample = sample_at<T, Place>(args, levels, item.query, item.mask, number,
                                   points.quotient_of(number), softmax);
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

// kCount channels of four pixels.
template <class Scalar, int kCount>
struct FourPacks {
  Pack<Scalar, kCount> at[4];
};

// All under way before one is needed.
template <int kCount, class Scalar>
__device__ __forceinline__ FourPacks<Scalar, kCount> load_pixels(const Scalar* map, Pixels pixels,
                                                                 i32 stride) {
  FourPacks<Scalar, kCount> result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result.at[i] = load_pack<kCount>(apart(map, pixels.at[i], stride));
  }
  return result;
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
  __shared__ Levels levels;
  levels.fill(args);
  __syncthreads();
  const auto item = item_of<kGroups>(args, levels, i32(threadIdx.x) / kLanes);
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
        listed = list_samples<Place, kLanes>(table, shares, args, levels, item, begin,
                                             min_of(kPoints, samples - begin), softmax);
        __syncwarp();
      }
      if (!active) continue;
#pragma unroll kUnrolled
      for (i32 sample = 0; sample < listed; ++sample) {
        const i32 slot = Samples::slot(group, sample);
        const Pixels pixels = table.pixels[slot];
        const Weights<T> weights = table.weights[slot];
        const auto values = load_pixels<kVector>(map, pixels, stride);
        T own[kVector] = {};
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            (kApart ? own : sums)[i] += weights.at[corner] * load(values.at[corner].at[i]);
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

// What `backward` keeps of a sample in the table's weights: fractions, weight, live pixels.
template <class T>
__device__ __forceinline__ Weights<T> facts_of(const Sample<T>& sample) {
  const Taps<T>& taps = sample.taps;
  return {{taps.fraction_y, taps.fraction_x, sample.weight, T(i32(taps.live))}};
}
template <class T>
__device__ __forceinline__ Blend<T> blend_of(const Weights<T>& facts) {
  return {facts.at[0], facts.at[1], u32(i32(facts.at[3]))};
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
      Weights<T> facts = {};
      if constexpr (kScatter) facts = table.weights[slot];
      const auto blend = blend_of(facts);
      const auto values = load_pixels<kVector>(map, pixels, elements * i32(sizeof(Scalar)));
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[corner] += gradient[i] * load(values.at[corner].at[i]);
        }
        if constexpr (kScatter) {
          if (scatters && blend.has(corner)) {
            scatter<kVector>(apart(sums_of_map, pixels.at[corner], elements * i32(sizeof(T))),
                             blend.weight(corner) * facts.at[2], gradient);
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

// Leaves a sample for those who add up what pixels get, and counts it, unless `count` does.
template <class T, class Place>
__device__ __forceinline__ void leave(const Args& args, const Item& item, i32 sample, i32 level,
                                      Level size, T weight) {
  const auto at = position_of<T, Place>(args, item.query, sample, level, size);
  const Placed<T> placed = placed_at(at, size, weight);
  const i64 own = (item.of_head * args.q + item.row) * args.l * args.p + sample;
  static_cast<Placed<T>*>(args.placed)[own] = placed;
  if (placed.cell == kOutside || args.ranks == nullptr) return;
  args.ranks[own] = atomicAdd(args.ends + item.of_head * cells_of(args) + placed.cell, 1);
}

// Turns the products of samples [begin, begin + count) into gradients; returns this lane's part of the sum of their
// weights times the gradients of these.
template <int kLanes, class AnyTable, class T>
__device__ __forceinline__ T conclude(const AnyTable& table, Weights<T>* products, i32 count) {
  T part = T(0);
#pragma unroll 1
  for (i32 s = threadIdx.x % kLanes; s < count; s += kLanes) {
    const i32 slot = AnyTable::slot(threadIdx.x / kLanes, s);
    const Weights<T> facts = table.weights[slot];
    const auto gradient = gradient_of(blend_of(facts), products[slot]);
    const T weight = facts.at[2];
    products[slot] = {{gradient.at.y * weight, gradient.at.x * weight, gradient.weight, weight}};
    part += weight * gradient.weight;
  }
  return part;
}

// Writes what `conclude` left; total: the sum of its parts over the lanes, of all samples.
template <class AnyTable, class Place, int kLanes, class T>
__device__ __forceinline__ void write(const Weights<T>* products, const Args& args,
                                      const Levels& levels, const Item& item, i32 begin, i32 count,
                                      T total) {
  const Points points(args);
#pragma unroll 1
  for (i32 s = threadIdx.x % kLanes; s < count && item.active; s += kLanes) {
    const i32 own = begin + s, level = points.quotient_of(own);
    const Weights<T> left = products[AnyTable::slot(threadIdx.x / kLanes, s)];
    write_places<T, Place>(args, item.query, own, level, levels.at(args, level),
                           {left.at[0], left.at[1]});
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
  __shared__ Levels levels;
  levels.fill(args);
  __syncthreads();
  const auto item = item_of<kGroups>(args, levels, i32(threadIdx.x) / kLanes);
  const Points points(args);
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
      if (item.active) {
        const i32 level = points.quotient_of(begin + s);
        sample =
            sample_at<T, Place>(args, levels, item.query, item.mask, begin + s, level, softmax);
        if (!kScatter && args.placed != nullptr && writes) {
          leave<T, Place>(args, item, begin + s, level, levels.at(args, level), sample.weight);
        }
      }
      const i32 slot = Samples::slot(group, s);
      table.pixels[slot] = sample.taps.pixels;
      table.weights[slot] = facts_of(sample);
    }
    __syncwarp();
#pragma unroll 1
    for (i32 first = 0; first < channels; first += kLanes * kVector) {
      multiply<Scalar, kScatter, kVector, kLanes>(table, products, args, item, count, first,
                                                  writes);
    }
    __syncwarp();
    const T part = conclude<kLanes>(table, products, count);
    if (fused && (rounds == 1 || !writes)) {
      total += over_lanes<kLanes>(part, [](T a, T b) { return a + b; });
    }
    if (writes) write<Samples, Place, kLanes>(products, args, levels, item, begin, count, total);
    begin += kPoints;
    if (begin < samples) continue;
    begin = 0;
    ++round;
  }
}

}  // namespace torchkiln::multi_scale_deformable_attention
