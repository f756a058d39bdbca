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

// States lie next to each other and are a multiple of kVector, unless that is 1. Grid: one-dimensional.
template <class Scalar, class State, bool kComplex, int kMethod, int kVector, int kBlockSize,
          int kLanes>
__global__ void __launch_bounds__(kBlockSize) update(const Args args) {
  using T = Acc<Scalar>;
  using V = typename StateOf<Scalar, kComplex>::Type;
  constexpr int kParts = kComplex ? 2 : 1;  // real numbers of a state
  const i64 channels = args.heads * args.places;
  const i64 at = i64(blockIdx.x) * (kBlockSize / kLanes) + threadIdx.x / kLanes;
  const bool is_channel = at < args.batch * channels;  // the others only take part in the shuffles
  const i64 batch = is_channel ? at / channels : 0;
  const Channel<Scalar, V, kMethod> channel(args, batch, is_channel ? at - batch * channels : 0);
  T sum = T(0);
  if (is_channel && channel.row >= 0) {
#pragma unroll 1
    for (i64 n = threadIdx.x % kLanes * kVector; n < args.states; n += kLanes * kVector) {
      State* from = static_cast<State*>(args.state) + channel.state_at(n) * kParts;
      if constexpr (kVector == 1) {
        const V state = channel.advance(load_number<V, State>(from, 0), n, sum);
        store_number<V, State>(from, 0, state);
      } else {
        Pack<State, kVector * kParts> pack = load_own<kVector * kParts>(from);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const V state = channel.advance(load_number<V, State>(pack.at, i), n + i, sum);
          store_number<V, State>(pack.at, i, state);
        }
        store_pack<kVector * kParts>(from, pack);
      }
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (is_channel && threadIdx.x % kLanes == 0) channel.finish(sum);
}

}  // namespace torchkiln::selective_state_update
