// corner_pool on the GPU, forward and backward: a scan in one pass over the data. Each thread keeps a few items, folds
// them, learns from its neighbours what comes before them, and goes through them again.
// spills: up to 24 bytes for wide types and indices, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "detection/corner_pool.h"

namespace torchkiln::corner_pool {

template <class T>
__device__ __forceinline__ T shuffle_up(T carry, int offset, int width) {
  return __shfl_up_sync(0xffffffffu, carry, offset, width);
}
template <class T>
__device__ __forceinline__ Pending<T> shuffle_up(const Pending<T>& carry, int offset, int width) {
  return {shuffle_up(carry.sum, offset, width), shuffle_up(int(carry.found), offset, width) != 0};
}
template <class T>
__device__ __forceinline__ T shuffle_last(T carry, int width) {
  return __shfl_sync(0xffffffffu, carry, width - 1, width);
}
template <class T>
__device__ __forceinline__ Pending<T> shuffle_last(const Pending<T>& carry, int width) {
  return {shuffle_last(carry.sum, width), shuffle_last(int(carry.found), width) != 0};
}

// The address `bytes` behind another one: in loops that are unrolled an index would be multiplied anew each time.
template <class Value>
__device__ __forceinline__ const Value* at_bytes(const void* from, i64 bytes) {
  return reinterpret_cast<const Value*>(static_cast<const char*>(from) + bytes);
}

// kVector neighbouring elements, `bytes` behind the first one, as items.
template <int kVector, class Scalar, class T>
__device__ __forceinline__ void load_items(const Args& args, i64 bytes,
                                           typename Forward<T>::Item* items) {
  const auto x = load_pack<kVector>(at_bytes<Scalar>(args.input, bytes));
#pragma unroll
  for (int i = 0; i < kVector; ++i) items[i] = {load(x.at[i])};
}
template <int kVector, class Scalar, class T>
__device__ __forceinline__ void load_items(const Args& args, i64 bytes,
                                           typename Backward<T>::Item* items) {
  const auto x = load_pack<kVector>(at_bytes<Scalar>(args.input, bytes));
  const auto pooled = load_pack<kVector>(at_bytes<Scalar>(args.pooled, bytes));
  const auto grad = load_pack<kVector>(at_bytes<Scalar>(args.grad_output, bytes));
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    items[i] = {load(grad.at[i]), Backward<T>::is_maximum(load(x.at[i]), load(pooled.at[i]))};
  }
}

template <bool kBackward, class T>
struct PassOf {
  using Type = Forward<T>;
};
template <class T>
struct PassOf<true, T> {
  using Type = Backward<T>;
};

// inner == 1: kLanes neighbouring threads scan one row, kVector elements each at a time. length is a multiple of
// kVector. Grid: one-dimensional, kBlockSize / kLanes rows a block.
template <class Scalar, bool kBackward, bool kReverse, int kVector, int kBlockSize, int kLanes>
__global__ void __launch_bounds__(kBlockSize) rows(const Args args) {
  using T = Acc<Scalar>;
  using Pass = typename PassOf<kBackward, T>::Type;
  const int lane = threadIdx.x % kLanes;
  const i64 row = i64(blockIdx.x) * (kBlockSize / kLanes) + threadIdx.x / kLanes;
  const bool is_row = row < args.outer;  // the others only take part in the shuffles
  const i64 begin = row * args.length;
  auto carry = Pass::none();
#pragma unroll 1
  for (i64 base = 0; base < args.length; base += kLanes * kVector) {
    const i64 first = base + lane * kVector;
    const bool is_item = is_row && first < args.length;
    const i64 offset = begin + (kReverse ? args.length - first - kVector : first);
    typename Pass::Item items[kVector];
    for (int i = 0; i < kVector; ++i) items[i] = Pass::no_item();
    if (is_item) load_items<kVector, Scalar, T>(args, offset * i64(sizeof(Scalar)), items);

    auto folded = Pass::none();
#pragma unroll
    for (int i = 0; i < kVector; ++i) Pass::fold(folded, items[kReverse ? kVector - 1 - i : i]);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const auto earlier = shuffle_up(folded, step, kLanes);
      if (lane >= step) folded = Pass::combine(earlier, folded);
    }
    const auto before = shuffle_up(folded, 1, kLanes);
    T running = Pass::running(lane > 0 ? Pass::combine(carry, before) : carry);
    carry = Pass::combine(carry, shuffle_last(folded, kLanes));

    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int at = kReverse ? kVector - 1 - i : i;
      store(result.at[at], Pass::step(running, items[at]));
    }
    if (is_item) store_pack<kVector>(static_cast<Scalar*>(args.out) + offset, result);
  }
}

// inner > 1: a warp's lanes stand on neighbouring columns, kVector each; each of the block's kSegments warps keeps
// kSteps places along the length. inner is a multiple of kVector. Grid: one-dimensional, 32 * kVector columns a block.
template <class Scalar, class Index, bool kBackward, bool kReverse, int kVector, int kSegments,
          int kSteps>
__global__ void __launch_bounds__(kSegments* kWarpSize) columns(const Args args) {
  using T = Acc<Scalar>;
  using Pass = typename PassOf<kBackward, T>::Type;
  using Carry = typename Pass::Carry;
  __shared__ Carry folded[kSegments][kVector][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, segment = threadIdx.x / kWarpSize;
  const Index per_outer = Index(args.inner / kVector);
  const Index column = Index(blockIdx.x) * kWarpSize + lane;
  const Index outer = divided(column, per_outer);
  const bool is_column = outer < Index(args.outer);  // the others only take part in the barriers
  const i64 begin =
      i64(outer) * args.length * args.inner + i64(column - outer * per_outer) * kVector;
  const i64 step = (kReverse ? -args.inner : args.inner) * i64(sizeof(Scalar));
  Carry carry[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) carry[i] = Pass::none();
#pragma unroll 1
  for (i64 base = 0; base < args.length; base += kSegments * kSteps) {
    const i64 first = base + segment * kSteps;
    const int count = is_column ? int(min_of(args.length - first, i64(kSteps))) : 0;
    // Behind the last place, loads go to it again, or to the first element: what they bring comes before nothing.
    const i64 place = begin + (kReverse ? args.length - 1 - first : first) * args.inner;
    const i64 start = count > 0 ? place * i64(sizeof(Scalar)) : 0;
    i64 bytes = start;
    typename Pass::Item items[kSteps][kVector];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_items<kVector, Scalar, T>(args, bytes, items[k]);
      bytes += k + 1 < count ? step : 0;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      Carry own = Pass::none();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) Pass::fold(own, items[k][i]);
      folded[segment][i][lane] = own;
    }
    __syncthreads();
    Carry before[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) before[i] = carry[i];
    const auto add_segments = [&](int from, int to) {
#pragma unroll 1
      for (int s = from; s < to; ++s) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          before[i] = Pass::combine(before[i], folded[s][i][lane]);
        }
      }
    };
    add_segments(0, segment);
    T running[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) running[i] = Pass::running(before[i]);
    if (base + kSegments * kSteps < args.length) {
      add_segments(segment, kSegments);
#pragma unroll
      for (int i = 0; i < kVector; ++i) carry[i] = before[i];
      __syncthreads();  // the next round writes `folded`
    }
    char* out = static_cast<char*>(args.out) + start;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Pack<Scalar, kVector> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) store(result.at[i], Pass::step(running[i], items[k][i]));
      if (k < count) store_pack<kVector>(reinterpret_cast<Scalar*>(out), result);
      out += step;
    }
  }
}

}  // namespace torchkiln::corner_pool
