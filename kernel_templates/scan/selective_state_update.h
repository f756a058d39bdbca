// Arguments and the step of selective_state_update, shared by CPU and GPU: one position of a selective scan, from a
// state that is kept. Rules that take in earlier samples find them in rings of the last inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/discretization.h"
#include "scan/gate.h"

namespace torchkiln::selective_state_update {

using selective_scan::back_of;
using selective_scan::coefficients;
using selective_scan::neighbour_of;

// Tensors by strides, in elements; a complex number counts as one. A channel is a place of a head; heads share B and C
// in groups. Rings are contiguous: sample k of a sequence lies in slot k modulo `slots`, of which there is one more
// than a rule looks back, so that no thread writes what another one reads.
struct Args {
  void* state;          // (rows, heads, places, states), changed
  const void* x;        // (batch, heads, places)
  const void* dt;       // (batch, heads, places)
  const void* A;        // (heads, places, states)
  const void* B;        // (batch, groups, states)
  const void* C;        // (batch, groups, states)
  const void* D;        // (heads, places) or null
  const void* z;        // (batch, heads, places) or null
  const void* dt_bias;  // (heads, places) or null
  const void* indices;  // (batch,) i32 row of the state, below 0: none; or null
  const void* seen;     // (rows,) i32 samples before this one, or null
  void* x_history;      // (rows, slots, heads * places), changed, or null
  void* B_history;      // (rows, slots, groups, states), changed, or null
  void* dt_history;     // (rows, slots, heads * places) steps in the type of sums, changed, or null
  void* out;            // (batch, heads, places), contiguous
  i64 state_strides[4];
  i64 x_strides[3], dt_strides[3], z_strides[3], A_strides[3], B_strides[3], C_strides[3];
  i64 D_strides[2], bias_strides[2];
  i64 states, rows, slots;
  u32 all_channels;  // of all sequences, below 2^31
  u32 channels;      // of a sequence: heads * places
  u32 places;
  u32 groups, group_heads;  // how many, and heads of each
  i32 softplus;
  i32 A_is_float, D_is_float, bias_is_float;
};

// Element `at` of a tensor of real numbers, or of pairs of them.
template <class V, class Scalar>
TORCHKILN_HD V load_number(const void* values, i64 at) {
  const Scalar* from = static_cast<const Scalar*>(values);
  if constexpr (is_complex_type<V>) {
    return {load(from[2 * at]), load(from[2 * at + 1])};
  } else {
    return load(from[at]);
  }
}
template <class V, class Scalar>
TORCHKILN_HD void store_number(void* values, i64 at, V value) {
  Scalar* to = static_cast<Scalar*>(values);
  if constexpr (is_complex_type<V>) {
    store(to[2 * at], value.re);
    store(to[2 * at + 1], value.im);
  } else {
    store(to[at], value);
  }
}

// What a step reads of one state.
template <class V>
struct Terms {
  V A, B, C;
};

// One channel of one sequence. V: a state, real or complex. What is read when it is made is first used by `start`, so
// that states may be on their way with it.
template <class Scalar, class V, int kMethod>
struct Channel {
  using T = Acc<Scalar>;
  static constexpr int kBack = back_of(kMethod);

  const Args& args;
  u32 batch, channel, head, place, group;
  i32 row;                                 // below 0: there is no state
  i64 state_from, A_from, B_from, C_from;  // of state 0
  Scalar dt, x, z{};
  Either<Scalar> D, bias;
  T step, ratio;
  T u[kBack + 1];         // samples, the own one first
  i64 sample[kBack + 1];  // of what is before it: index in B_history, below 0: the own one
  i64 slot;

  // `index`: among the channels of all sequences.
  TORCHKILN_HD Channel(const Args& a, u32 index) : args(a) {
    batch = index / a.channels;
    channel = index - batch * a.channels;
    head = a.places == 1 ? channel : channel / a.places;
    place = channel - head * a.places;
    group = a.groups == 1 ? 0 : head / a.group_heads;
    row = a.indices != nullptr ? static_cast<const i32*>(a.indices)[batch] : i32(batch);
    if (row >= a.rows) row = -1;
    dt = static_cast<const Scalar*>(a.dt)[at(a.dt_strides)];
    x = static_cast<const Scalar*>(a.x)[at(a.x_strides)];
    if (a.z != nullptr) z = static_cast<const Scalar*>(a.z)[at(a.z_strides)];
    if (a.dt_bias != nullptr)
      bias.read(a.dt_bias, a.bias_is_float != 0, of_channel(a.bias_strides));
    if (a.D != nullptr) D.read(a.D, a.D_is_float != 0, of_channel(a.D_strides));
    state_from = u32(row) * a.state_strides[0] + of_channel(a.state_strides + 1);
    A_from = of_channel(a.A_strides);
    B_from = batch * a.B_strides[0] + group * a.B_strides[1];
    C_from = batch * a.C_strides[0] + group * a.C_strides[1];
  }

  // Only where there is a state.
  TORCHKILN_HD void start() {
    step = load(dt);
    if (args.dt_bias != nullptr) step += bias.value(args.bias_is_float != 0);
    if (args.softplus != 0) step = softplus_of(step);
    u[0] = load(x);
    ratio = T(1);
    if constexpr (kBack > 0) look_back();
  }

  // Fills in the samples before the own one. Those before the first one repeat it.
  TORCHKILN_HD void look_back() {
    const i64 seen = static_cast<const i32*>(args.seen)[row];
    slot = row * args.slots + seen % args.slots;
    for (int j = 1; j <= kBack; ++j) {
      const i64 index = max_of(seen - j, i64(0));
      sample[j] = seen == 0 ? -1 : row * args.slots + index % args.slots;
      u[j] = seen == 0 ? u[0]
                       : load(static_cast<const Scalar*>(
                             args.x_history)[sample[j] * args.channels + channel]);
    }
    if constexpr (neighbour_of(kMethod) != 0) {
      T* steps = static_cast<T*>(args.dt_history);
      if (seen > 0) ratio = steps[sample[1] * args.channels + channel] / step;
    }
  }

  TORCHKILN_HD i64 at(const i64* strides) const {
    return batch * strides[0] + of_channel(strides + 1);
  }
  TORCHKILN_HD i64 of_channel(const i64* strides) const {
    return head * strides[0] + place * strides[1];
  }
  TORCHKILN_HD i64 state_at(i64 n) const { return state_from + n * args.state_strides[3]; }

  TORCHKILN_HD Terms<V> terms(i64 n) const {
    const i64 from = A_from + n * args.A_strides[2];
    Terms<V> of;
    if constexpr (is_complex_type<V>) {
      of.A = load_number<V, T>(args.A, from);
    } else {
      of.A = load_either<Scalar>(args.A, args.A_is_float != 0, from);
    }
    of.B = load_number<V, Scalar>(args.B, B_from + n * args.B_strides[2]);
    of.C = load_number<V, Scalar>(args.C, C_from + n * args.C_strides[2]);
    return of;
  }

  // State n from what it was; adds its part of the output to `sum`.
  TORCHKILN_HD V advance(V state, const Terms<V>& of, i64 n, T& sum) const {
    const auto c = coefficients<kMethod>(T(step) * of.A, ratio);
    V held = c.weight[kBack] * (u[0] * of.B);
    for (int j = 1; j <= kBack; ++j) {
      V before = of.B;
      if (sample[j] >= 0) {
        before = load_number<V, Scalar>(args.B_history,
                                        (sample[j] * args.groups + group) * args.states + n);
      }
      held = held + c.weight[kBack - j] * (u[j] * before);
    }
    state = c.alpha * state + step * held;
    sum += (is_complex_type<V> ? T(2) : T(1)) * inner(state, conjugate(of.C));
    if constexpr (kBack > 0) keep_B(of.B, n);
    return state;
  }

  // The first channel of a group keeps what all of them read.
  TORCHKILN_HD void keep_B(V b, i64 n) const {
    if (place != 0 || head != group * args.group_heads) return;
    store_number<V, Scalar>(args.B_history, (slot * args.groups + group) * args.states + n, b);
  }

  // Once a channel, with the whole sum.
  TORCHKILN_HD void finish(T sum) const {
    Scalar& out = static_cast<Scalar*>(args.out)[i64(batch) * args.channels + channel];
    if (row < 0) {
      store(out, T(0));
      return;
    }
    if (args.D != nullptr) sum += u[0] * D.value(args.D_is_float != 0);
    if (args.z != nullptr) sum *= silu_of(load(z));
    store(out, sum);
    if constexpr (kBack > 0) {
      store(static_cast<Scalar*>(args.x_history)[slot * args.channels + channel], u[0]);
      if constexpr (neighbour_of(kMethod) != 0) {
        static_cast<T*>(args.dt_history)[slot * args.channels + channel] = step;
      }
    }
  }
};

}  // namespace torchkiln::selective_state_update
