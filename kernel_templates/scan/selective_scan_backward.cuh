// selective_scan on the GPU, backward: tiles from the last to the first. The states of a tile are computed again from the
// one before it, which the forward kept or is the initial one, and every fourth of them stays in shared memory; then the
// adjoint states go back through the tile, four positions at a time. The gradients of variable B and C, which all channels
// of a group share, are summed over the channels of a block before they go to memory. Where there are too few rows for the
// GPU, positions are split among blocks: a first launch summarises what each split makes of the adjoint state behind it.
// compile time: above 250 ms; four positions of a state are unrolled, with the rule's derivatives, and all states of a lane.
// spills: up to 44 bytes in float, outside of the loops over positions; up to 60 bytes for the quadratic rules in double,
// several hundred for complex numbers in double, which do not fit into registers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/selective_scan_backward_parts.cuh"

namespace torchkiln::selective_scan_backward {

// What four positions give to sums over all states. own, other: the bend's, of what Uneven has.
template <class T>
struct Sums {
  T u[4], d[4], y[4], own[4], other[4];
};

// A step, and its derivative by z.
template <int kMethod, class V>
struct Walked {
  Coefficients<kMethod, V> c;
  V held, state, by_z;
};
template <bool kIsNear, int kMethod, class V>
__device__ __forceinline__ Walked<kMethod, V> walked(V state, Real<V> d, Rate<kMethod, V> rate,
                                                     const V* v) {
  Walked<kMethod, V> w = {};
  if constexpr (kIsNear) {
    const Near<kMethod> near = near_of<kMethod>(d * rate.a, v);
    w.c = near.c;
    w.held = near.held;
    w.state = w.c.alpha * state + d * w.held;
    w.by_z = w.state - d * near.lag;
  } else {
    const auto s = slopes(d, rate, Uneven<Real<V>>());
    w.c = s.value;
    w.held = held_of<kMethod>(w.c.weight, v);
    w.state = w.c.alpha * state + d * w.held;
    w.by_z = s.by_z.alpha * state + d * held_of<kMethod>(s.by_z.weight, v);
  }
  return w;
}

// What walking a state four positions back changes: the adjoint state behind them, the gradient of A, what they push to the
// samples before them, sums over states, and the gradients of B and C at the four.
template <class V>
struct Trail {
  V &adjoint, &of_A;
  V (&pushed)[2];
  Sums<Real<V>>& sums;
  V* shared;
};

// Of a rule with one or two samples. `before`: the state before them.
template <bool kIsNear, int kMethod, class V>
__device__ __forceinline__ void walk_weights(const RowFour<kMethod, Real<V>>& in, const V* B,
                                             const V* C, V a, V before, const Trail<V>& to) {
  using T = Real<V>;
  constexpr int kBack = back_of(kMethod);
  constexpr T kFactor = is_complex_type<V> ? 2 : 1;
  V v[kBack + 4], samples[5];  // samples: from the one before on
#pragma unroll
  for (int i = 0; i < kBack + 4; ++i) v[i] = in.u[i] * B[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) samples[i] = number<V>(0);

  const Rate<kMethod, V> rate = rate_of<kMethod>(a);

  // What the way back needs of the states: for Mamba's rule those before, otherwise derivatives by z.
  V alpha[4], weight[4][kBack + 1], of_z[4], held[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kMethod == kMamba) {
      alpha[i] = coefficients<kMethod>(in.d[i], a, Uneven<T>()).alpha;
      of_z[i] = before;
      before = alpha[i] * before + (in.d[i] * in.u[i]) * B[i];
    } else {
      const auto step = walked<kIsNear>(before, in.d[i], rate, v + i);
      alpha[i] = step.c.alpha;
      held[i] = step.held;
      of_z[i] = step.by_z;
#pragma unroll
      for (int j = 0; j <= kBack; ++j) weight[i][j] = step.c.weight[j];
      before = step.state;
    }
    to.sums.y[i] += inner(C[i], conjugate(before));
    to.shared[4 + i] = (kFactor * in.g[i]) * conjugate(before);
  }
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const V lambda = (kFactor * in.g[i]) * conjugate(C[i]) + to.adjoint;
    to.adjoint = conjugate(alpha[i]) * lambda;
    if constexpr (kBack == 0) {
      const V by_z = (kMethod == kMamba ? to.adjoint : lambda) * conjugate(of_z[i]);
      to.of_A = to.of_A + in.d[i] * by_z;
      to.sums.d[i] += inner(by_z, a);
      // u and d get it times the other one, once all states are in.
      const V push = kMethod == kMamba ? lambda : conjugate(weight[i][0]) * lambda;
      to.sums.u[i] += inner(push, B[i]);
      to.shared[i] = (in.d[i] * in.u[i]) * push;
    } else {
      const V scaled = in.d[i] * lambda;
      to.of_A = to.of_A + scaled * conjugate(of_z[i]);
      to.sums.d[i] += inner(lambda, a * of_z[i] + held[i]);
#pragma unroll
      for (int j = 0; j <= kBack; ++j) {
        samples[i + j] = samples[i + j] + conjugate(weight[i][j]) * scaled;
      }
    }
  }
  if constexpr (kBack > 0) {
    samples[4] = samples[4] + to.pushed[0];
    to.pushed[0] = samples[0];
    // The sample before the first is the first.
    if (in.is_first) samples[1] = samples[1] + samples[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.shared[i] = in.u[kBack + i] * samples[1 + i];
      to.sums.u[i] += inner(samples[1 + i], B[kBack + i]);
    }
  }
}

// Of a rule whose input is a parabola through three samples: what it takes of these goes by way of their differences, of which
// neighbouring steps share one. kRaw: whether the gradients of B and C lack the inputs and gradients that they are to be multiplied by.
template <bool kIsNear, bool kRaw, int kMethod, class V>
__device__ __forceinline__ void walk_parabolas(const RowFour<kMethod, Real<V>>& in, const V* B,
                                               const V* C, V a, V before, const Trail<V>& to) {
  using T = Real<V>;
  constexpr int kBack = back_of(kMethod), kAhead = ahead_of(kMethod), kSamples = kBack + 4 + kAhead;
  constexpr int kOther = kAhead > 0 ? 1 : -1;  // from a step's difference to its neighbour's
  constexpr T kFactor = is_complex_type<V> ? 2 : 1;
  V v[kSamples], rise[kSamples - 1];
#pragma unroll
  for (int i = 0; i < kSamples; ++i) v[i] = in.u[i] * B[i];
#pragma unroll
  for (int i = 0; i < kSamples - 1; ++i) rise[i] = v[i + 1] - v[i];

  const Rate<kMethod, V> rate = rate_of<kMethod>(a);
  Parabola<V> weight[4];
  V alpha[4], of_z[4], held[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = kBack - 1 + i;
    const V bend = bend_of<kMethod>(rise[at], rise[at + kOther], in.uneven(i));
    const Parabola<V> parabola = {v[at], rise[at], bend};
    const Bent<V> step = bent_of<kIsNear>(in.d[i], rate);
    alpha[i] = step.alpha;
    weight[i] = step.held;
    held[i] = sum_of(step.held, parabola);
    before = step.alpha * before + in.d[i] * held[i];
    of_z[i] = before - in.d[i] * sum_of(step.lag, parabola);
    to.sums.y[i] += inner(C[kAhead + i], conjugate(before));
    to.shared[4 + i] = kRaw ? before : (kFactor * in.g[i]) * conjugate(before);
  }
  // Samples get what a rise gets before them, less what the one behind them gets. That of a rise beside the four is carried on.
  V of_rise[kSamples - 1], scaled[4];
  of_rise[kSamples - 2] = kAhead > 0 ? number<V>(0) : to.pushed[1];
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const int at = kBack - 1 + i;
    const V lambda = (kFactor * in.g[i]) * conjugate(C[kAhead + i]) + to.adjoint;
    scaled[i] = in.d[i] * lambda;
    to.adjoint = conjugate(alpha[i]) * lambda;
    to.of_A = to.of_A + scaled[i] * conjugate(of_z[i]);
    to.sums.d[i] += inner(lambda, a * of_z[i] + held[i]);
    const V of_bend = conjugate(weight[i].bend) * scaled[i];
    const V of_own = conjugate(weight[i].rise) * scaled[i];
    const Uneven<T> pushed = in.pushed(i);
    if constexpr (neighbour_of(kMethod) != 0) {
      to.sums.own[i] += inner(of_bend, rise[at]);
      to.sums.other[i] += inner(of_bend, rise[at + kOther]);
    }
    if constexpr (kAhead > 0) {
      of_rise[at] = of_own - pushed.own * of_bend;
      of_rise[at + 1] = of_rise[at + 1] + pushed.other * of_bend;
    } else {
      of_rise[at] = of_rise[at] + of_own + pushed.own * of_bend;
      of_rise[at - 1] = -pushed.other * of_bend;
    }
  }
  V behind = to.pushed[0];  // of the last of the four samples, but for the rise before it
  if constexpr (kAhead > 0) behind = behind - of_rise[kSamples - 2];
  to.pushed[0] = conjugate(weight[0].start) * scaled[0] - of_rise[kBack - 1];
  to.pushed[1] = of_rise[0];
  if constexpr (kAhead > 0) {
    // That of the position before for the first rise of these.
    const V lambda = (kFactor * in.g_before) * conjugate(C[0]) + to.adjoint;
    const auto c = coefficients_at<kIsNear>(in.d_before, rate, Uneven<T>());
    const V of_bend = conjugate(c.weight[2]) * (in.d_before * lambda);
    of_rise[0] = of_rise[0] + in.other_before * of_bend;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = kBack + i;
    V sample = behind + of_rise[at - 1];
    if (i < 3) {
      sample = conjugate(weight[i + 1].start) * scaled[i + 1] + (of_rise[at - 1] - of_rise[at]);
    }
    // Samples before the first are the first.
    if (i == 0 && in.is_first) sample = sample + to.pushed[0];
    to.shared[i] = kRaw ? sample : in.u[at] * sample;
    to.sums.u[i] += inner(sample, B[at]);
  }
}

// ---- tiles ----

// What a lane carries of a state from tile to tile.
template <class V>
struct Carry {
  V a, adjoint, of_A, of_B, of_C, pushed[2];
};

// Whether a lane has its states in registers, and all of them in the code. Wider ones would not fit: their loops over states
// are rolled, and what is carried lies in local memory.
template <class V>
constexpr bool is_flat = sizeof(V) == 4;

// A warp's part of a tile of one panel of states. kVariable: neither B nor C is constant; without branches, states of a lane
// are worked out side by side.
template <class Of, class Scalar, int kMethod, bool kVariable, class V>
struct Walk {
  using T = Acc<Scalar>;
  using At = Arrays<kMethod, Of::kPanels>;
  static constexpr int kBack = back_of(kMethod), kAhead = ahead_of(kMethod);
  static constexpr int kUnrolled = is_flat<V> ? Of::kStates : 1;
  static constexpr int kSumsPitch = sums_pitch(Of::kLanes);
  // Of quadratic rules: whoever sums over channels multiplies, once instead of before and after.
  static constexpr bool kRaw = kVariable && Of::kSumsInMemory && taps_of(kMethod) > 2;
  // Numbers from the quads of a position to those of the next one, so that neighbouring lanes read different banks.
  static constexpr int kQuadsPitch = (kWarpSize + 1) * 4, kGatesPitch = kWarpSize + 4;

  const BackwardArgs& args;
  const Place& place;
  const Lane<Of> lane;
  T* row;          // the own channel's in the warp's arrays
  const V *B, *C;  // the own states' rows of the tiles
  V* kept;         // of the warp: the states before fours, and gradients of B and C
  int n0, fours;
  int first;

  __device__ __forceinline__ int state_of(int s) const { return n0 + lane.state(s); }

  template <int kLeft, int kRight>
  __device__ __forceinline__ void read(const V* tile, bool is_constant, const void* matrix, int s,
                                       int four, V* out) const {
    if (kVariable || !is_constant) {
      return read_window<kLeft, kRight>(tile + s * Of::kLanes * Of::kPitch, four, out);
    }
    const Problem& p = args.problem;
    const int n = state_of(s);
    const V* values = static_cast<const V*>(matrix) + place.channel_of(lane.row) * p.states;
    const V value = n < p.states ? values[n] : number<V>(0);
#pragma unroll
    for (int i = 0; i < kLeft + 4 + kRight; ++i) out[i] = value;
  }

  // Whether all z of the warp lie near 0: those of steps up to `longest` do.
  __device__ __forceinline__ bool is_near(float longest) const {
    const T* d = row + At::kSteps * Of::kArray;
    bool is_near = kAhead == 0 || are_within<1>(d + slot_of(-1), longest);
#pragma unroll 1
    for (int four = lane.part; four < Of::kFours; four += Of::kLanes) {
      T own[4];
      read_quad(d + four * 4, own);
      is_near = is_near && are_within<4>(own, longest);
    }
    return __all_sync(kAllLanes, is_near);
  }

  // Keeps the state before every four.
  template <bool kIsNear>
  __device__ __forceinline__ void advance(const Carry<V>* carry) const {
    const Problem& p = args.problem;
    const i64 row_index = place.row_of(p, lane.row), before = first / Of::kTile - 1;
    const V* from = before < 0 ? static_cast<const V*>(args.initial_state) + row_index * p.states
                               : static_cast<const V*>(args.checkpoints) +
                                     (row_index * (p.tiles - 1) + before) * p.states;
    const int known = before < 0 && args.initial_state == nullptr ? 0 : int(p.states);
    V state[Of::kStates];
#pragma unroll
    for (int s = 0; s < Of::kStates; ++s) {
      state[s] = state_of(s) < known ? from[state_of(s)] : number<V>(0);
    }
    V* to = kept + threadIdx.x % kWarpSize;
    // Samples that neighbouring fours share go on from one to the next where there are registers for them.
    constexpr int kSamples = kBack + 4 + kAhead, kShared = is_flat<V> ? kBack + kAhead : 0;
    V v[Of::kStates][kSamples];
    RowFour<kMethod, T> in;
    const auto read_samples = [&](int four, int begin, int end, int s, V* samples) {
      V of_B[kSamples];
      read<kBack, kAhead>(B, p.constant_B, p.B, s, four, of_B);
#pragma unroll
      for (int i = begin; i < end; ++i) {
        samples[i] = (taps_of(kMethod) == 1 ? in.d[i & 3] * in.u[i] : in.u[i]) * of_B[i];
      }
    };
    const auto read_rows = [&](int four) {
      in.template read<Of>(row, four,
                           kAhead > 0 ? row[At::kInputs * Of::kArray + four * 4 + 4] : T(0));
    };
    if constexpr (kShared > 0) {
      read_rows(0);
#pragma unroll
      for (int s = 0; s < Of::kStates; ++s) read_samples(0, 0, kShared, s, v[s] + 4);
    }
#pragma unroll 1
    for (int four = 0;; ++four, to += Of::kFourPitch) {
#pragma unroll kUnrolled
      for (int s = 0; s < Of::kStates; ++s) to[s * kWarpSize] = state[s];
      if (four + 1 == fours) return;
      read_rows(four);
#pragma unroll kUnrolled
      for (int s = 0; s < Of::kStates; ++s) {
        const Rate<kMethod, V> rate = rate_of<kMethod>(carry[s].a);
#pragma unroll
        for (int i = 0; i < kShared; ++i) v[s][i] = v[s][i + 4];
        read_samples(four, kShared, kSamples, s, v[s]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          state[s] = stepped<kIsNear>(state[s], in.d[i], rate, in.uneven(i), v[s] + i);
        }
      }
    }
  }

  // Whether there are gradients that channels share.
  __device__ __forceinline__ bool shares() const {
    return kVariable || !(args.problem.constant_B && args.problem.constant_C);
  }
  // The gradients of B and C at a four of a state, to be summed over the warp's channels, or over positions.
  __device__ __forceinline__ void give_shared(V* shared, int s, int four, Carry<V>& carry) const {
    const Problem& p = args.problem;
    if constexpr (!kVariable) {
      if (p.constant_B) carry.of_B = carry.of_B + (shared[0] + shared[1] + (shared[2] + shared[3]));
      if (p.constant_C) carry.of_C = carry.of_C + (shared[4] + shared[5] + (shared[6] + shared[7]));
      if (!shares()) return;
    }
    if constexpr (Of::kSumsInMemory) {
      V* to = kept + Of::kFourNumbers + s * kSumsPitch + threadIdx.x % kWarpSize * 4;
      write_quad(to, shared);
      write_quad(to + Of::kStates * kSumsPitch, shared + 4);
    } else {
      fold<8, Of::kRows, Of::kLanes>(shared, lane.row);
      V* to = kept + (four + 1) * Of::kFourPitch;
      if (!is_keeper<8, Of::kRows>(lane.row)) return;
#pragma unroll
      for (int i = 0; i < kept_of<8, Of::kRows>; ++i) {
        const int at = kept_first<8, Of::kRows>(lane.row) + i;
        to[(at / 4 * Of::kPadded + lane.state(s)) * 4 + at % 4] = shared[i];
      }
    }
  }
  // Sums of a four of all channels, times their factors.
  __device__ __forceinline__ void sum_products(const V* from, const T* factors, V* sum) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = number<V>(0);
#pragma unroll
    for (int r = 0; r < Of::kRows; ++r) {
      V value[4];
      T factor[4];
      read_quad(from + r * Of::kLanes * 4, value);
      read_quad(factors + r * Of::kPitch, factor);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = sum[i] + factor[i] * value[i];
    }
  }
  // Sums what all lanes have given, once they have.
  __device__ __forceinline__ void sum_shared(int four) const {
    if (!Of::kSumsInMemory || !shares()) return;
    V* to = kept + (four + 1) * Of::kFourPitch;
#pragma unroll
    for (int i = threadIdx.x % kWarpSize; i < 2 * Of::kPadded; i += kWarpSize) {
      const V* from = kept + Of::kFourNumbers + i / Of::kLanes * kSumsPitch + i % Of::kLanes * 4;
      V sum[4];
      if constexpr (kRaw) {
        const int array = i < Of::kPadded ? At::kInputs : At::kGradients;
        const T* factors = row - lane.row * Of::kPitch + array * Of::kArray + four * 4;
        sum_products(from, factors, sum);
      } else {
        sum_quads<Of::kRows>(from, Of::kLanes * 4, sum);
      }
      write_quad(to + i * 4, sum);
    }
  }

  // Over the lanes of the channel, of one of four positions.
  __device__ __forceinline__ T sum_of_gates(const T* gates, int position) const {
    const auto parts = *reinterpret_cast<const Pack<T, Of::kLanes>*>(
        gates + position * kGatesPitch + lane.row * Of::kLanes);
    T sum = parts.at[0];
#pragma unroll
    for (int i = 1; i < Of::kLanes; ++i) sum += parts.at[i];
    return sum;
  }
  // Sums over the lanes of a channel; a lane keeps those of its own positions.
  __device__ __forceinline__ void sum_lanes(Sums<T>& sums) const {
    constexpr bool kIsUneven = neighbour_of(kMethod) != 0;
    const bool has_gate = args.problem.z.data != nullptr;
    if constexpr (Of::kSumsInMemory) {
      // Where the gradients of B and C were, which have been used up.
      constexpr int kKept = kept_of<4, Of::kLanes>;
      T* memory = kept + Of::kFourNumbers;
      T* to = memory + threadIdx.x % kWarpSize * 4;
      const T* from = memory + (lane.part * kKept * kQuadsPitch + lane.row * Of::kLanes * 4);
      T* gates = memory + 4 * kQuadsPitch;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T third = kIsUneven ? sums.own[i] : sums.y[i];
        const T of_position[4] = {sums.d[i], sums.u[i], third, sums.other[i]};
        write_quad(to + i * kQuadsPitch, of_position);
        if (kIsUneven && has_gate) gates[i * kGatesPitch + threadIdx.x % kWarpSize] = sums.y[i];
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        T sum[4];
        sum_quads<Of::kLanes>(from + i * kQuadsPitch, 4, sum);
        sums.d[i] = sum[0], sums.u[i] = sum[1], sums.other[i] = sum[3];
        (kIsUneven ? sums.own[i] : sums.y[i]) = sum[2];
        if (kIsUneven && has_gate) sums.y[i] = sum_of_gates(gates, lane.part * kKept + i);
      }
    } else {
      fold<4, Of::kLanes, 1>(sums.d, lane.part);
      fold<4, Of::kLanes, 1>(sums.u, lane.part);
      if (has_gate) fold<4, Of::kLanes, 1>(sums.y, lane.part);
      if constexpr (kIsUneven) {
        fold<4, Of::kLanes, 1>(sums.own, lane.part);
        fold<4, Of::kLanes, 1>(sums.other, lane.part);
      }
    }
  }
  // Sums over states of the channel become gradients, as far as they do not depend on other positions.
  __device__ __forceinline__ void finish(const RowFour<kMethod, T>& in, Sums<T>& sums,
                                         int four) const {
    const Problem& p = args.problem;
    const bool skips = p.D != nullptr && lane.part == 0 && n0 == 0;
    const T skip = skips ? static_cast<const T*>(p.D)[place.channel_of(lane.row)] : T(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (taps_of(kMethod) == 1) {
        sums.d[i] += in.u[i] * sums.u[i];
        sums.u[i] *= in.d[i];
      }
      sums.u[i] += skip * in.g[i];
      sums.y[i] = (is_complex_type<V> ? T(2) : T(1)) * sums.y[i] + skip * in.u[kBack + i];
    }
    sum_lanes(sums);
    if constexpr (neighbour_of(kMethod) != 0) finish_ratios(in, sums, four);
    if (!is_keeper<4, Of::kLanes>(lane.part)) return;
    put(sums.d, At::kOfSteps, four);
    put(sums.u, At::kOfInputs, four);
    if (p.z.data != nullptr) put(sums.y, At::kOutputs, four);
    if constexpr (neighbour_of(kMethod) != 0) put(sums.own, At::kOfRatios, four);
  }
  // Of the sums that a lane has kept: those of own become what the neighbours' steps get. A ratio at the end is 1.
  __device__ __forceinline__ void finish_ratios(const RowFour<kMethod, T>& in, Sums<T>& sums,
                                                int four) const {
#pragma unroll
    for (int i = 0; i < kept_of<4, Of::kLanes>; ++i) {
      const int at = kept_first<4, Of::kLanes>(lane.part) + i;
      const T* from = row + four * 4 + at;
      const T d = from[At::kSteps * Of::kArray];
      const Uneven<T> uneven = {from[At::kOwn * Of::kArray], from[At::kOther * Of::kArray]};
      const bool is_end = neighbour_of(kMethod) > 0 ? at == in.last : in.is_first && at == 0;
      const T of_ratio = bend_of<kMethod>(sums.own[i], sums.other[i], by_ratio_of(uneven));
      sums.own[i] = is_end || d == T(0) ? T(0) : in_steps(of_ratio, d);
      sums.d[i] -= sums.own[i] * quick_reciprocal(inverse_ratio(uneven));
    }
  }
  __device__ __forceinline__ void put(const T* values, int array, int four) const {
    T* to = row + array * Of::kArray + four * 4 + kept_first<4, Of::kLanes>(lane.part);
#pragma unroll
    for (int i = 0; i < kept_of<4, Of::kLanes>; ++i) {
      to[i] = Of::kPanels > 1 && n0 > 0 ? to[i] + values[i] : values[i];
    }
  }

  // From the last position to the first.
  template <bool kIsNear>
  __device__ __forceinline__ void go_back(Carry<V>* carry) const {
    const Problem& p = args.problem;
    T u_behind = T(0);
    if constexpr (kAhead > 0) u_behind = row[At::kInputs * Of::kArray + fours * 4];
#pragma unroll 1
    for (int four = fours - 1; four >= 0; --four) {
      RowFour<kMethod, T> in;
      in.template read<Of>(row, four, u_behind);
      in.last = int(p.length) - 1 - first - four * 4;
      in.is_first = first == 0 && four == 0;
      u_behind = in.u[kBack];
      Sums<T> sums;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.u[i] = sums.d[i] = sums.y[i] = sums.own[i] = sums.other[i] = T(0);
      }
      const V* before = kept + four * Of::kFourPitch + threadIdx.x % kWarpSize;
      V of_B[kBack + 4 + kAhead], of_C[kAhead + 4], state;
      const auto read_state = [&](int s) {
        read<kBack, kAhead>(B, p.constant_B, p.B, s, four, of_B);
        read<kAhead, 0>(C, p.constant_C, p.C, s, four, of_C);
        state = before[s * kWarpSize];
      };
      read_state(0);
#pragma unroll kUnrolled
      for (int s = 0; s < Of::kStates; ++s) {
        V shared[8];
        Carry<V>& own = carry[s];
        const Trail<V> to = {own.adjoint, own.of_A, own.pushed, sums, shared};
        if constexpr (taps_of(kMethod) > 2) {
          walk_parabolas<kIsNear, kRaw>(in, of_B, of_C, own.a, state, to);
        } else {
          walk_weights<kIsNear>(in, of_B, of_C, own.a, state, to);
        }
        // Before that is written: nobody knows that it is elsewhere.
        if (s + 1 < Of::kStates) read_state(s + 1);
        give_shared(shared, s, four, own);
      }
      __syncwarp();  // all have read what is now written over
      sum_shared(four);
      finish(in, sums, four);
      __syncwarp();
    }
  }
};

// ---- beginning and end ----

// What a lane sums of its channel over all tiles, and what waits for the tile before.
template <class T>
struct RowSums {
  T D, bias, waiting, slope;
};

// conj(alpha) lambda of the position behind the last one.
template <class V>
__device__ __forceinline__ V last_adjoint(const BackwardArgs& args, i64 at) {
  return args.grad_last_state != nullptr ? static_cast<const V*>(args.grad_last_state)[at]
                                         : number<V>(0);
}

// That behind a split, out of the summaries of the splits behind. `a`: the state's rate.
template <int kMethod, class V>
__device__ __forceinline__ V entering_adjoint(const BackwardArgs& args, i64 row, int split, int n,
                                              V a) {
  const Problem& p = args.problem;
  const i64 rows = p.batch * p.dim, at = row * p.states + n;
  if (split == args.splits - 1) return last_adjoint<V>(args, at);
  V adjoint = static_cast<const V*>(args.behind_last)[at];
#pragma unroll 1
  for (i64 s = args.splits - 3; s >= split; --s) {
    V product;
    if constexpr (keeps_step(kMethod, is_complex_type<V>)) {
      const Real<V> step = static_cast<const Real<V>*>(args.products)[s * rows + row];
      product = quick_exp_of_product(step, a);
    } else {
      product = static_cast<const V*>(args.products)[s * rows * p.states + at];
    }
    adjoint = product * adjoint + static_cast<const V*>(args.sums)[s * rows * p.states + at];
  }
  return adjoint;
}

// The gradients along positions of a tile, once all states have been gone through.
template <class Of, class Scalar, int kMethod>
__device__ __forceinline__ void write_rows(const BackwardArgs& args, const Place& place,
                                           const Lane<Of>& lane, int first, const Acc<Scalar>* row,
                                           RowSums<Acc<Scalar>>& sums) {
  using T = Acc<Scalar>;
  using At = Arrays<kMethod, Of::kPanels>;
  constexpr int kNeighbour = neighbour_of(kMethod);
  const Problem& p = args.problem;
  if (!place.has(lane.row)) return;
  const i64 begin = place.row_of(p, lane.row) * p.length;
  Scalar* grad_delta = static_cast<Scalar*>(args.grad_delta) + begin;
#pragma unroll 1
  for (int four = lane.part; four < Of::kFours; four += Of::kLanes) {
    const int position = first + four * 4;
    const T* from = row + four * 4;
    T values[4], more[4];
    read_quad(from + At::kOfInputs * Of::kArray, values);
    store_four(static_cast<Scalar*>(args.grad_u) + begin, position, p, values);
    read_quad(from + At::kOfSteps * Of::kArray, values);
    read_quad(from + At::kSlopes * Of::kArray, more);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kNeighbour != 0) {
        // The neighbour's ratio has this step in it, too.
        const bool is_there = kNeighbour < 0 ? position + i + 1 < p.length : four * 4 + i > 0;
        if (is_there) values[i] += from[At::kOfRatios * Of::kArray + i - kNeighbour];
      }
      values[i] *= more[i];
      if (position + i < p.length) sums.bias += values[i];
    }
    if (kNeighbour > 0 && four == 0 && first > 0) {
      // That of the first step waits for the tile before.
#pragma unroll
      for (int i = 1; i < 4; ++i) {
        if (position + i < p.length) store(grad_delta[memory_of_one(p, position + i)], values[i]);
      }
    } else {
      store_four(grad_delta, position, p, values);
    }
    if constexpr (kNeighbour > 0) {
      // What the last ratio has for the first step of the tile behind.
      if (four == 0) {
        if (first + Of::kTile < p.length) {
          const T last = row[At::kOfRatios * Of::kArray + Of::kTile - 1] * sums.slope;
          sums.bias += last;
          store(grad_delta[memory_of_one(p, first + Of::kTile)], sums.waiting + last);
        }
        sums.waiting = values[0];
        sums.slope = more[0];
      }
    }
    if (p.z.data == nullptr) continue;
    read_quad(from + At::kOutputs * Of::kArray, values);
    read_quad(from + At::kGates * Of::kArray, more);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] *= more[i];
    store_four(static_cast<Scalar*>(args.grad_z) + begin, position, p, values);
  }
}

// A sum over the lanes of each channel.
template <class Of, class T>
__device__ __forceinline__ void write_row_sum(const BackwardArgs& args, const Place& place,
                                              const Lane<Of>& lane, int split, T sum,
                                              void* gradient) {
  const Problem& p = args.problem;
  fold<1, Of::kLanes, 1>(&sum, lane.part);
  if (gradient == nullptr || lane.part != 0 || !place.has(lane.row)) return;
  static_cast<T*>(gradient)[split * p.batch * p.dim + place.row_of(p, lane.row)] = sum;
}

// What a block works on: a panel of channels and the tiles of a split.
template <class Of>
struct Share {
  int split, begin, end;
  Place place;

  __device__ __forceinline__ explicit Share(const BackwardArgs& args) {
    const Problem& p = args.problem;
    const u32 panels = panels_of<Of>(p), blocks = u32(p.batch) * u32(p.groups) * panels;
    const int tiles = int(p.tiles), each = (tiles + args.splits - 1) / args.splits;
    split = int(blockIdx.x / blocks);
    place = place_of<Of>(p, blockIdx.x - u32(split) * blocks, panels);
    begin = split * each;
    end = min_of(tiles, begin + each);
  }
};

// Shared memory of a block: tiles of B and C, then what each warp has.
template <class Of, int kMethod, class V>
struct Memory {
  V *B, *C, *kept;
  Real<V>* rows;

  __device__ __forceinline__ Memory(uint4* memory, int warp)
      : B(reinterpret_cast<V*>(memory)), C(B + Of::kMatrix), kept(C + Of::kMatrix) {
    rows = reinterpret_cast<Real<V>*>(kept + Of::kWarps * Of::kOfWarp) +
           warp * backward_arrays(kMethod, Of::kPanels) * Of::kArray;
    kept += warp * Of::kOfWarp;
  }
};

// Blocks of a multiprocessor, so that what each warp waits for is hidden.
template <int kMethod, class V, int kWarps>
constexpr int blocks_of() {
  constexpr int kResident = resident_warps(kMethod, int(sizeof(V)));
  return kResident > kWarps ? kResident / kWarps : 1;
}

// Grid: one-dimensional; for each split, batch and group the panels of channels.
template <class Scalar, int kMethod, bool kComplex, bool kVariable, int kWarps, int kLanes,
          int kStates, int kPanels>
__global__ void __launch_bounds__(kWarps* kWarpSize,
                                  blocks_of<kMethod, State<Scalar, kComplex>, kWarps>())
    backward(const BackwardArgs args) {
  using T = Acc<Scalar>;
  using V = State<Scalar, kComplex>;
  using Of = TileLayout<V, kMethod, kWarps, kLanes, kStates, kPanels>;
  using At = Arrays<kMethod, kPanels>;
  constexpr int kBack = back_of(kMethod), kAhead = ahead_of(kMethod);
  constexpr int kUnrolled = is_flat<V> ? kStates : 1;
  extern __shared__ uint4 memory[];
  const Problem& p = args.problem;
  const Memory<Of, kMethod, V> own(memory, threadIdx.x / kWarpSize);
  const Share<Of> share(args);
  const Place& place = share.place;
  const Lane<Of> lane;
  const bool is_row = place.has(lane.row);
  const i64 row = place.row_of(p, lane.row), weights = place.channel_of(lane.row) * p.states;

  Carry<V> carry[kPanels][kStates];
#pragma unroll(kPanels == 1 ? kUnrolled : 1)
  for (int i = 0; i < kPanels * kStates; ++i) {
    const int n = i / kStates * Of::kPadded + lane.state(i % kStates);
    const bool is_state = n < p.states;
    Carry<V>& c = carry[i / kStates][i % kStates];
    c.a = is_state ? static_cast<const V*>(p.A)[weights + n] : number<V>(0);
    c.adjoint = is_state && is_row ? entering_adjoint<kMethod>(args, row, share.split, n, c.a)
                                   : number<V>(0);
    c.of_A = c.of_B = c.of_C = c.pushed[0] = c.pushed[1] = number<V>(0);
  }
  float longest[kPanels];  // step near 0 of each panel
  if constexpr (has_near<kMethod, V>) {
#pragma unroll 1
    for (int i = 0; i < kPanels; ++i) {
      longest[i] = longest_near<Of>([&](int s) { return carry[i][s].a; });
    }
  }
  RowSums<T> sums = {};
  T* rows = own.rows + lane.row * Of::kPitch;

  // The first positions behind the split have something for its last ones: they are gone through, too, for that alone.
  const int length = min_of(int(p.length), share.end * Of::kTile + kBack);
#pragma unroll 1
  for (int tile = (length + Of::kTile - 1) / Of::kTile - 1; tile >= share.begin; --tile) {
    const int first = tile * Of::kTile;
    const bool is_own = kBack == 0 || tile < share.end;
    __syncwarp();  // the rows are no longer read
    const T of_D = fill_rows<Of, Scalar, kMethod, true>(args, place, lane, first, 0, length, rows);
    fill_beside<Of, Scalar, kMethod>(args, place, lane, first, rows);
#pragma unroll 1
    for (int panel = 0; panel * Of::kPadded < p.states; ++panel) {
      const int n0 = panel * Of::kPadded;
      if (kVariable || !p.constant_B) {
        fill_matrix<Of, Scalar, V, kBack, kAhead>(p.B, p, place, n0, first, own.B);
      }
      if (kVariable || !p.constant_C) {
        fill_matrix<Of, Scalar, V, kAhead, 0>(p.C, p, place, n0, first, own.C);
      }
      __syncthreads();
      const int part = lane.part * Of::kPitch;
      const int fours = (min_of(Of::kTile, length - first) + 3) / 4;
      Carry<V>* carried = carry[kPanels == 1 ? 0 : panel];
      const Walk<Of, Scalar, kMethod, kVariable, V> walk = {
          args, place, lane, rows, own.B + part, own.C + part, own.kept, n0, fours, first};
      bool is_near = false;
      if constexpr (has_near<kMethod, V>) is_near = walk.is_near(longest[kPanels == 1 ? 0 : panel]);
      near_or_far<kMethod, V>(is_near, [&](auto near) {
        walk.template advance<near.value>(carried);
        walk.template go_back<near.value>(carried);
      });
      __syncthreads();
      if (is_own && (kVariable || !(p.constant_B && p.constant_C))) {
        write_matrix_gradients<Of>(args, place, own.C + Of::kMatrix, n0, first);
      }
    }
    if (is_own) {
      sums.D += of_D;
      write_rows<Of, Scalar, kMethod>(args, place, lane, first, rows, sums);
    } else {
#pragma unroll(kPanels == 1 ? kUnrolled : 1)
      for (int i = 0; i < kPanels * kStates; ++i) {
        Carry<V>& c = carry[i / kStates][i % kStates];
        c.of_A = c.of_B = c.of_C = number<V>(0);
      }
      if constexpr (neighbour_of(kMethod) > 0) {
        // The last ratio of the split has something for the first step behind it.
        sums.slope = rows[At::kSlopes * Of::kArray];
        sums.waiting = rows[At::kOfSteps * Of::kArray] * sums.slope;
      }
    }
    if constexpr (neighbour_of(kMethod) < 0) {
      // The first ratio has something for the last step of the tile before.
      __syncwarp();
      T* ratios = rows + At::kOfRatios * Of::kArray;
      if (lane.part == 0) ratios[Of::kTile] = ratios[0];
    }
  }
  write_row_sum(args, place, lane, share.split, sums.D, args.grad_D);
  write_row_sum(args, place, lane, share.split, sums.bias, args.grad_delta_bias);
#pragma unroll(kPanels == 1 ? kUnrolled : 1)
  for (int i = 0; i < kPanels * kStates; ++i) {
    const int n = i / kStates * Of::kPadded + lane.state(i % kStates);
    if (!is_row || n >= p.states) continue;
    const Carry<V>& c = carry[i / kStates][i % kStates];
    const i64 at = row * p.states + n, of_split = share.split * p.batch * p.dim * p.states + at;
    if (args.adds_A) {
      add_number(static_cast<V*>(args.grad_A) + weights + n, c.of_A);
    } else {
      static_cast<V*>(args.grad_A)[of_split] = c.of_A;
    }
    if (!kVariable && p.constant_B) static_cast<V*>(args.grad_B)[of_split] = c.of_B;
    if (!kVariable && p.constant_C) static_cast<V*>(args.grad_C)[of_split] = c.of_C;
    if (share.split == 0 && args.grad_initial_state != nullptr) {
      static_cast<V*>(args.grad_initial_state)[at] = c.adjoint;
    }
  }
}

// What each split but the first makes of the adjoint state behind it: one map for each state, or what the last one makes of
// the state that is behind it. A split's positions are
// those that `backward` goes through after the ones that are not its own.
template <class Scalar, int kMethod, bool kComplex, bool kVariable, int kWarps, int kLanes,
          int kStates>
__global__ void __launch_bounds__(kWarps* kWarpSize) summarise(const BackwardArgs args) {
  using T = Acc<Scalar>;
  using V = State<Scalar, kComplex>;
  using Of = TileLayout<V, kMethod, kWarps, kLanes, kStates, 1>;
  using At = Arrays<kMethod, 1>;
  constexpr int kBack = back_of(kMethod);
  constexpr int kUnrolled = is_flat<V> ? kStates : 1;
  extern __shared__ uint4 memory[];
  const Problem& p = args.problem;
  const Share<Of> share(args);
  if (share.split == 0) return;
  const Place& place = share.place;
  const Lane<Of> lane;
  const i64 weights = place.channel_of(lane.row) * p.states;
  const i64 row = place.row_of(p, lane.row), states = row * p.states;
  V* C = reinterpret_cast<V*>(memory);
  T* rows = reinterpret_cast<T*>(C + Of::kMatrix) + lane.row * Of::kPitch +
            threadIdx.x / kWarpSize * backward_arrays(kMethod, 1) * Of::kArray;
  const bool is_last = share.split == args.splits - 1;
  const int begin = share.begin * Of::kTile + kBack;
  const int end = min_of(int(p.length), share.end * Of::kTile + kBack);
#pragma unroll 1
  for (int n0 = 0; n0 < p.states; n0 += Of::kPadded) {
    V a[kStates], sum[kStates], product[kStates];
    T step = T(0);  // the sum of all
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const int n = n0 + lane.state(s);
      const bool is_state = n < p.states;
      a[s] = is_state ? static_cast<const V*>(p.A)[weights + n] : number<V>(0);
      sum[s] = is_last && is_state ? last_adjoint<V>(args, states + n) : number<V>(0);
      product[s] = number<V>(1);
    }
#pragma unroll 1
    for (int tile = (end - 1) / Of::kTile; tile * Of::kTile + Of::kTile > begin; --tile) {
      const int first = tile * Of::kTile;
      __syncthreads();  // the rows and the tile are no longer read
      fill_rows<Of, Scalar, kMethod, false>(args, place, lane, first, begin, end, rows);
      if (kVariable || !p.constant_C) fill_matrix<Of, Scalar, V, 0, 0>(p.C, p, place, n0, first, C);
      __syncthreads();
      const Walk<Of, Scalar, kMethod, kVariable, V> walk = {
          args,    place, lane,       rows, nullptr, C + lane.part * Of::kPitch,
          nullptr, n0,    Of::kFours, first};
#pragma unroll 1
      for (int four = Of::kFours - 1; four >= 0; --four) {
        T d[4], g[4];
        read_quad(rows + At::kSteps * Of::kArray + four * 4, d);
        read_quad(rows + At::kGradients * Of::kArray + four * 4, g);
        step += (d[0] + d[1]) + (d[2] + d[3]);
#pragma unroll kUnrolled
        for (int s = 0; s < kStates; ++s) {
          V of_C[4];
          walk.template read<0, 0>(walk.C, p.constant_C, p.C, s, four, of_C);
#pragma unroll
          for (int i = 3; i >= 0; --i) {
            const Rate<kMethod, V> rate = rate_of<kMethod>(a[s]);
            const auto c = coefficients(d[i], rate, Uneven<T>());
            const V alpha = conjugate(c.alpha);
            sum[s] = alpha * (((kComplex ? T(2) : T(1)) * g[i]) * conjugate(of_C[i]) + sum[s]);
            if constexpr (!keeps_step(kMethod, is_complex_type<V>)) product[s] = alpha * product[s];
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const int n = n0 + lane.state(s);
      if (!place.has(lane.row) || n >= p.states) continue;
      if (is_last) {
        static_cast<V*>(args.behind_last)[states + n] = sum[s];
        continue;
      }
      const i64 at = i64(share.split - 1) * p.batch * p.dim * p.states + states + n;
      static_cast<V*>(args.sums)[at] = sum[s];
      if constexpr (!keeps_step(kMethod, is_complex_type<V>))
        static_cast<V*>(args.products)[at] = product[s];
    }
    if constexpr (keeps_step(kMethod, is_complex_type<V>)) {
      if (is_last || n0 > 0 || lane.part > 0 || !place.has(lane.row)) continue;
      static_cast<T*>(args.products)[i64(share.split - 1) * p.batch * p.dim + row] = step;
    }
  }
}

// Adds up parts and rounds sums to the type of a tensor. Grid: one-dimensional, threads walk.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) sum_parts(const SumArgs args) {
  using T = Acc<Scalar>;
  const i64 begin = i64(blockIdx.x) * kBlockSize + threadIdx.x,
            stride = i64(gridDim.x) * kBlockSize;
#pragma unroll 1
  for (int s = 0; s < kSegments; ++s) {
    const Segment segment = args.segments[s];
#pragma unroll 1
    for (i64 i = begin; i < segment.count; i += stride) {
      T sum = T(0);
      const T* from = static_cast<const T*>(segment.from) + i;
      for (i64 part = 0; part < segment.parts; ++part) sum += from[part * segment.count];
      if (segment.narrow) {
        store(static_cast<Scalar*>(segment.to)[i], sum);
      } else {
        static_cast<T*>(segment.to)[i] = sum;
      }
    }
  }
}

}  // namespace torchkiln::selective_scan_backward
