// selective_state_update on the GPU: kLanes neighbouring threads share a channel, each with kVector neighbouring states
// at a time.
// spills: up to 44 bytes in complex float64, up to 20 for rules that look back, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "scan/selective_state_update.h"

namespace torchkiln::selective_state_update {

template <class Scalar, bool kComplex>
struct StateOf {
  using Type = Acc<Scalar>;
};
template <class Scalar>
struct StateOf<Scalar, true> {
  using Type = Complex<Acc<Scalar>>;
};

// Of memory that this thread writes afterwards: not through the cache for what is only read.
template <int kCount, class Scalar>
__device__ __forceinline__ Pack<Scalar, kCount> load_own(const Scalar* from) {
  Pack<Scalar, kCount> pack;
  if constexpr (sizeof(pack) == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    pack.words[0] = words.x;
    pack.words[1] = words.y;
    pack.words[2] = words.z;
    pack.words[3] = words.w;
  } else {
    static_assert(sizeof(pack) == 8);
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    pack.words[0] = words.x;
    pack.words[1] = words.y;
  }
  return pack;
}

// Neighbouring states of a channel, and A, B and C of them, as they lie in memory.
template <class Scalar, class State, class V, int kVector>
struct Lane {
  using T = Acc<Scalar>;
  State* from;
  Pack<State, kVector> states;
  Pack<float, kVector> wide_A;
  Pack<Scalar, kVector> A, B, C;

  template <class Of>
  __device__ __forceinline__ void read(const Of& channel, i64 n) {
    const Args& args = channel.args;
    from = static_cast<State*>(args.state) + (channel.state_from + n);
    states = load_own<kVector>(from);
    B = load_pack<kVector>(static_cast<const Scalar*>(args.B) + (channel.B_from + n));
    C = load_pack<kVector>(static_cast<const Scalar*>(args.C) + (channel.C_from + n));
    if (sizeof(Scalar) == 2 && args.A_is_float != 0) {
      read_A(wide_A, args, channel.A_from, n);
    } else {
      read_A(A, args, channel.A_from, n);
    }
  }
  // Heads of Mamba-2 have one number for all states: a stride of 0.
  template <class Number>
  __device__ __forceinline__ static void read_A(Pack<Number, kVector>& to, const Args& args,
                                                i64 from, i64 n) {
    const Number* values = static_cast<const Number*>(args.A) + from;
    if (args.A_strides[2] == 0) {
      to.at[0] = *values;
    } else {
      to = load_pack<kVector>(values + n);
    }
  }
  __device__ __forceinline__ T A_of(const Args& args, int i) const {
    return sizeof(Scalar) == 2 && args.A_is_float != 0 ? T(wide_A.at[i]) : load(A.at[i]);
  }

  template <class Of>
  __device__ __forceinline__ void advance(const Of& channel, i64 n, T& sum) {
    const bool is_tied = channel.args.A_strides[2] == 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const T rate = A_of(channel.args, i);
      const Terms<V> of = {is_tied ? A_of(channel.args, 0) : rate, load(B.at[i]), load(C.at[i])};
      store(states.at[i], channel.advance(load(states.at[i]), of, n + i, sum));
    }
    store_pack<kVector>(from, states);
  }
};
// One state, at any strides, real or complex.
template <class Scalar, class State, class V>
struct Lane<Scalar, State, V, 1> {
  using T = Acc<Scalar>;
  i64 from;
  V state;
  Terms<V> of;

  template <class Of>
  __device__ __forceinline__ void read(const Of& channel, i64 n) {
    from = channel.state_at(n);
    state = load_number<V, State>(channel.args.state, from);
    of = channel.terms(n);
  }
  template <class Of>
  __device__ __forceinline__ void advance(const Of& channel, i64 n, T& sum) {
    store_number<V, State>(channel.args.state, from, channel.advance(state, of, n, sum));
  }
};

// Unless kVector is 1, states, A (or a single number), B and C lie next to each other along states, aligned to kVector of
// them, which divides their number. Grid: one-dimensional.
template <class Scalar, class State, bool kComplex, int kMethod, int kVector, int kBlockSize,
          int kLanes>
__global__ void __launch_bounds__(kBlockSize) update(const Args args) {
  using T = Acc<Scalar>;
  using V = typename StateOf<Scalar, kComplex>::Type;
  constexpr int kStep = kLanes * kVector;
  const u32 at = blockIdx.x * (kBlockSize / kLanes) + threadIdx.x / kLanes;
  const bool is_channel = at < args.all_channels;  // the others only take part in the shuffles
  Channel<Scalar, V, kMethod> channel(args, is_channel ? at : 0);
  T sum = T(0);
  if (is_channel && channel.row >= 0) {
    i64 n = threadIdx.x % kLanes * kVector;
    Lane<Scalar, State, V, kVector> lane;
    if (n < args.states) lane.read(channel, n);
    channel.start();
#pragma unroll 1
    while (n < args.states) {
      lane.advance(channel, n, sum);
      n += kStep;
      if (n < args.states) lane.read(channel, n);
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (is_channel && threadIdx.x % kLanes == 0) channel.finish(sum);
}

}  // namespace torchkiln::selective_state_update
