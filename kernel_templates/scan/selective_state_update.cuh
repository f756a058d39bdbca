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

// A channel whose inputs are read when it is made and first used by `start`, so that states may be on their way with them.
template <class Scalar, class V, int kMethod>
struct Ahead : Channel<Scalar, V, kMethod> {
  using Base = Channel<Scalar, V, kMethod>;
  using T = Acc<Scalar>;
  u32 channel;                             // of the sequence
  i64 state_from, A_from, B_from, C_from;  // of state 0
  Scalar dt, x, z{};
  Either<Scalar> D, bias;

  __device__ __forceinline__ Ahead(const Args& a, u32 b, u32 own) : Base(a), channel(own) {
    const u32 places = u32(a.places);
    const u32 h = places == 1 ? channel : channel / places;
    this->batch = b;
    this->head = h;
    this->place = channel - h * places;
    this->group = a.groups == 1 ? 0 : h / a.group_heads;
    this->row = a.indices != nullptr ? static_cast<const i32*>(a.indices)[b] : i32(b);
    if (this->row >= a.rows) this->row = -1;
    dt = static_cast<const Scalar*>(a.dt)[this->at(a.dt_strides)];
    x = static_cast<const Scalar*>(a.x)[this->at(a.x_strides)];
    if (a.z != nullptr) z = static_cast<const Scalar*>(a.z)[this->at(a.z_strides)];
    if (a.dt_bias != nullptr)
      bias.read(a.dt_bias, a.bias_is_float != 0, this->of_channel(a.bias_strides));
    if (a.D != nullptr) D.read(a.D, a.D_is_float != 0, this->of_channel(a.D_strides));
    state_from = times(u32(this->row), a.state_strides[0]) + this->of_channel(a.state_strides + 1);
    A_from = this->of_channel(a.A_strides);
    B_from = this->of_group(a.B_strides);
    C_from = this->of_group(a.C_strides);
  }

  // Only where there is a state.
  __device__ __forceinline__ void start() {
    T step = load(dt);
    if (this->args.dt_bias != nullptr) step += bias.value(this->args.bias_is_float != 0);
    this->step = this->args.softplus != 0 ? softplus_of(step) : step;
    this->u[0] = load(x);
    this->ratio = T(1);
    if constexpr (Base::kBack > 0) this->look_back(channel);
  }
  __device__ __forceinline__ T own_D() const { return D.value(this->args.D_is_float != 0); }
  __device__ __forceinline__ T own_z() const { return load(z); }
};

// Neighbouring states of a channel, and A, B and C of them, as they lie in memory.
template <class Scalar, class State, class V, int kVector>
struct Lane {
  using T = Acc<Scalar>;
  State* from;
  Pack<State, kVector> states;
  Pack<float, kVector> wide_A;
  Pack<Scalar, kVector> A, B, C;

  template <class Of>
  __device__ __forceinline__ void read(const Of& channel, u32 n) {
    const Args& args = channel.args;
    from = static_cast<State*>(args.state) + (channel.state_from + n);
    states = read_pack<kVector>(from);
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
                                                i64 from, u32 n) {
    const Number* values = static_cast<const Number*>(args.A) + from;
    if (args.A_strides[2] == 0) {
      to.at[0] = *values;
    } else {
      to = load_pack<kVector>(values + n);
    }
  }
  __device__ __forceinline__ T number_of_A(const Args& args, int i) const {
    return sizeof(Scalar) == 2 && args.A_is_float != 0 ? T(wide_A.at[i]) : load(A.at[i]);
  }

  struct Numbers {
    T A, B, C;
    __device__ __forceinline__ T A_of(i64) const { return A; }
    __device__ __forceinline__ T B_of(i64) const { return B; }
    __device__ __forceinline__ T C_of(i64) const { return C; }
  };
  template <class Of>
  __device__ __forceinline__ void advance(const Of& channel, i64 n, T& sum) {
    const bool is_tied = channel.args.A_strides[2] == 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const T rate = number_of_A(channel.args, i);
      const Numbers numbers = {is_tied ? number_of_A(channel.args, 0) : rate, load(B.at[i]),
                               load(C.at[i])};
      store(states.at[i], channel.advance(load(states.at[i]), n + i, sum, numbers));
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

  template <class Of>
  __device__ __forceinline__ void read(const Of& channel, u32 n) {
    from = channel.state_from + n * channel.args.state_strides[3];
    state = load_number<V, State>(channel.args.state, from);
  }
  template <class Of>
  __device__ __forceinline__ void advance(const Of& channel, i64 n, T& sum) {
    store_number<V, State>(channel.args.state, from, channel.advance(state, n, sum));
  }
};

// Unless kVector is 1, states, A (or a single number), B and C lie next to each other along states, aligned to kVector of
// them, which divides their number. Grid: blocks of a sequence's channels, and sequences in two dimensions; what belongs to
// the sequence is then the same for all threads of a block.
template <class Scalar, class State, bool kComplex, int kMethod, int kVector, int kBlockSize,
          int kLanes>
__global__ void __launch_bounds__(kBlockSize) update(const Args args) {
  using T = Acc<Scalar>;
  using V = typename StateOf<Scalar, kComplex>::Type;
  constexpr int kStep = kLanes * kVector;
  const u32 sequence = blockIdx.z * gridDim.y + blockIdx.y;
  if (sequence >= args.batch) return;
  const u32 at = blockIdx.x * (kBlockSize / kLanes) + threadIdx.x / kLanes;
  const bool is_channel = at < args.channels;  // the others only take part in the shuffles
  Ahead<Scalar, V, kMethod> channel(args, sequence, is_channel ? at : 0);
  T sum = T(0);
  if (is_channel && channel.row >= 0) {
    const u32 states = u32(args.states);
    u32 n = threadIdx.x % kLanes * kVector;
    Lane<Scalar, State, V, kVector> lane;
    if (n < states) lane.read(channel, n);
    channel.start();
#pragma unroll 1
    while (n < states) {
      lane.advance(channel, n, sum);
      n += kStep;
      if (n < states) lane.read(channel, n);
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (is_channel && threadIdx.x % kLanes == 0) channel.finish(sum, channel);
}

}  // namespace torchkiln::selective_state_update
