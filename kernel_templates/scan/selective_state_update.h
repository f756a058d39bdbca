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
using selective_scan::uneven_of;

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
  // 32 bits: a product with an index is one instruction then, and there are twenty of them.
  u32 x_strides[3], dt_strides[3], z_strides[3], A_strides[3], B_strides[3], C_strides[3];
  u32 D_strides[2], bias_strides[2];
  i64 batch, heads, places, states, groups, rows, slots;
  i32 softplus;
  i32 A_is_float, D_is_float, bias_is_float;
  u32 channels, group_heads;  // of a sequence; heads of a group
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

// An index times a stride.
template <class Stride>
TORCHKILN_HD i64 times(u32 index, Stride stride) {
  return i64(index) * i64(stride);
}

// One channel of one sequence. V: a state, real or complex.
template <class Scalar, class V, int kMethod>
struct Channel {
  using T = Acc<Scalar>;
  static constexpr int kBack = back_of(kMethod);

  const Args& args;
  u32 batch, head, place, group;
  i32 row;  // below 0: there is no state
  T step, ratio;
  T u[kBack + 1];         // samples, the own one first
  i64 sample[kBack + 1];  // of what is before it: index in B_history, below 0: the own one
  i64 slot;

  TORCHKILN_HD explicit Channel(const Args& a) : args(a) {}
  TORCHKILN_HD Channel(const Args& a, i64 b, i64 channel)
      : args(a), batch(u32(b)), head(u32(channel / a.places)), place(u32(channel % a.places)) {
    group = head / a.group_heads;
    row = a.indices != nullptr ? static_cast<const i32*>(a.indices)[b] : i32(b);
    if (row >= a.rows) row = -1;
    if (row < 0) return;
    step = load(static_cast<const Scalar*>(a.dt)[at(a.dt_strides)]);
    if (a.dt_bias != nullptr) {
      step += load_either<Scalar>(a.dt_bias, a.bias_is_float != 0, of_channel(a.bias_strides));
    }
    if (a.softplus != 0) step = softplus_of(step);
    u[0] = load(static_cast<const Scalar*>(a.x)[at(a.x_strides)]);
    ratio = T(1);
    if constexpr (kBack > 0) look_back(channel);
  }

  // Fills in the samples before the own one. Those before the first one repeat it.
  TORCHKILN_HD void look_back(i64 channel) {
    const i64 channels = args.heads * args.places;
    // A counter that wrapped, or was changed, must not lead before the rings.
    const i64 seen = max_of(i64(static_cast<const i32*>(args.seen)[row]), i64(0));
    slot = row * args.slots + seen % args.slots;
    for (int j = 1; j <= kBack; ++j) {
      const i64 index = max_of(seen - j, i64(0));
      sample[j] = seen == 0 ? -1 : row * args.slots + index % args.slots;
      u[j] = seen == 0
                 ? u[0]
                 : load(static_cast<const Scalar*>(args.x_history)[sample[j] * channels + channel]);
    }
    if constexpr (neighbour_of(kMethod) != 0) {
      T* steps = static_cast<T*>(args.dt_history);
      if (seen > 0) ratio = steps[sample[1] * channels + channel] / step;
    }
  }

  TORCHKILN_HD i64 at(const u32* strides) const {
    return times(batch, strides[0]) + of_channel(strides + 1);
  }
  template <class Stride>
  TORCHKILN_HD i64 of_channel(const Stride* strides) const {
    return times(head, strides[0]) + times(place, strides[1]);
  }
  TORCHKILN_HD i64 of_group(const u32* strides) const {
    return times(batch, strides[0]) + times(group, strides[1]);
  }
  TORCHKILN_HD i64 state_at(i64 n) const {
    return row * args.state_strides[0] + of_channel(args.state_strides + 1) +
           n * args.state_strides[3];
  }

  TORCHKILN_HD V A_of(i64 n) const {
    const i64 from = of_channel(args.A_strides) + n * args.A_strides[2];
    if constexpr (is_complex_type<V>)
      return load_number<V, T>(args.A, from);
    else
      return load_either<Scalar>(args.A, args.A_is_float != 0, from);
  }

  TORCHKILN_HD V B_of(i64 n) const {
    return load_number<V, Scalar>(args.B, of_group(args.B_strides) + n * args.B_strides[2]);
  }
  TORCHKILN_HD V C_of(i64 n) const {
    return load_number<V, Scalar>(args.C, of_group(args.C_strides) + n * args.C_strides[2]);
  }

  // State n from what it was; adds its part of the output to `sum`.
  TORCHKILN_HD V advance(V state, i64 n, T& sum) const { return advance(state, n, sum, *this); }
  // With A, B and C from elsewhere.
  template <class From>
  TORCHKILN_HD V advance(V state, i64 n, T& sum, const From& from) const {
    const auto c = coefficients<kMethod>(T(step) * from.A_of(n), uneven_of(ratio));
    const V b = from.B_of(n);
    V held = c.weight[kBack] * (u[0] * b);
    for (int j = 1; j <= kBack; ++j) {
      V before = b;
      if (sample[j] >= 0) {
        before = load_number<V, Scalar>(args.B_history,
                                        (sample[j] * args.groups + group) * args.states + n);
      }
      held = held + c.weight[kBack - j] * (u[j] * before);
    }
    state = c.alpha * state + step * held;
    const V out = from.C_of(n);
    sum += (is_complex_type<V> ? T(2) : T(1)) * inner(state, conjugate(out));
    if constexpr (kBack > 0) keep_B(b, n);
    return state;
  }

  // The first channel of a group keeps what all of them read.
  TORCHKILN_HD void keep_B(V b, i64 n) const {
    if (place != 0 || head != group * args.group_heads) return;
    store_number<V, Scalar>(args.B_history, (slot * args.groups + group) * args.states + n, b);
  }

  TORCHKILN_HD T own_D() const {
    return load_either<Scalar>(args.D, args.D_is_float != 0, of_channel(args.D_strides));
  }
  TORCHKILN_HD T own_z() const {
    return load(static_cast<const Scalar*>(args.z)[at(args.z_strides)]);
  }

  // Once a channel, with the whole sum.
  TORCHKILN_HD void finish(T sum) const { finish(sum, *this); }
  template <class From>
  TORCHKILN_HD void finish(T sum, const From& from) const {
    const i64 channels = args.heads * args.places, channel = head * args.places + place;
    Scalar& out = static_cast<Scalar*>(args.out)[batch * channels + channel];
    if (row < 0) {
      store(out, T(0));
      return;
    }
    if (args.D != nullptr) {
      sum += u[0] * from.own_D();
    }
    if (args.z != nullptr) sum *= silu_of(from.own_z());
    store(out, sum);
    if constexpr (kBack > 0) {
      store(static_cast<Scalar*>(args.x_history)[slot * channels + channel], u[0]);
      if constexpr (neighbour_of(kMethod) != 0) {
        static_cast<T*>(args.dt_history)[slot * channels + channel] = step;
      }
    }
  }
};

}  // namespace torchkiln::selective_state_update
