// selective_scan on the GPU, backward: chunks from the last to the first. The states of a chunk are computed again from
// the one that the forward kept before it; the adjoint states are scanned from the other end. The gradients of variable B
// and C, which all channels of a group share, are summed over the warps of a block before they go to memory.
// compile time: above 250 ms; every position of a lane is unrolled, with the rule's derivatives.
// spills: up to 32 bytes for the exact holds, so that two blocks share a multiprocessor; more on sm_75 and for complex
// numbers in double, which do not fit into registers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/atomics.cuh"
#include "scan/selective_scan_backward_parts.cuh"

namespace torchkiln::selective_scan_backward {

using namespace torchkiln::selective_scan;

// The gradient of the sum over states, at the positions of a lane; 0 beyond the end.
template <class Scalar, int kItems>
__device__ __forceinline__ void load_gradient(const BackwardArgs& args, const Place& place,
                                              i64 first, Acc<Scalar>* g) {
  using T = Acc<Scalar>;
  const Problem& p = args.problem;
  load_items<kItems>(row_of<Scalar>(args.grad_out, place), first, p, g);
  if (p.z.data != nullptr) {
    T z[kItems];
    load_items<kItems>(row_of<Scalar>(p.z, place), first, p, z);
#pragma unroll
    for (int i = 0; i < kItems; ++i) g[i] *= z[i] * sigmoid_of(z[i]);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!place.is_row || first + i >= p.length) g[i] = T(0);
  }
}

// What a lane gathers over all states.
template <int kItems, class T>
struct LaneSums {
  T u[kItems], d[kItems], y[kItems], ratio[kItems];
};

// What the position before the chunk has for the first sample of the chunk, when a rule looks ahead. That position's
// lambda follows from the one behind it, which has just been computed.
template <class Scalar, int kMethod, class V, class AnySamples>
__device__ __forceinline__ V push_from_before(const BackwardArgs& args, const Place& place,
                                              i64 first, V a, V c, V adjoint, const AnySamples& v,
                                              Acc<Scalar>* by_ratio) {
  using T = Acc<Scalar>;
  const Problem& p = args.problem;
  const Scalar* delta = row_of<Scalar>(p.delta, place);
  const T bias = p.delta_bias ? static_cast<const T*>(p.delta_bias)[place.channel] : T(0);
  const T d = step_of(T(load(delta[memory_of(p, first - 1)])), bias, p.softplus);
  T ratio = T(1);
  if constexpr (neighbour_of(kMethod) != 0) {
    ratio = step_of(T(load(delta[memory_of(p, first)])), bias, p.softplus) / d;
  }
  T g;
  load_gradient<Scalar, 1>(args, place, first - 1, &g);
  const V lambda = ((is_complex_type<V> ? T(2) : T(1)) * g) * conjugate(c) + adjoint;
  const auto s = slopes<kMethod>(d * a, ratio);
  if constexpr (neighbour_of(kMethod) != 0) {
    const V held = held_of<kMethod>(s.by_ratio, v, -1);
    *by_ratio += inner(lambda, held);  // d times it, and d_first / d is the ratio
  }
  return (d * conjugate(s.value.weight[taps_of(kMethod) - 1])) * lambda;
}

// The two gradients of a state at the positions of a lane, for the block's sums.
template <int kItems, class V>
struct MatrixGradients {
  V B[kItems], C[kItems];
};

template <class Scalar, int kMethod, int kItems, class V, class AnySteps>
__device__ __forceinline__ void scan_state_backward(
    const BackwardArgs& args, const Place& place, const AnySteps& steps, const Acc<Scalar>* g,
    const V* B_row, const V* C_row, int n, i64 chunk_first, V* carry,
    LaneSums<kItems, Acc<Scalar>>& sums, MatrixGradients<kItems, V>& out, Acc<Scalar>* by_ratio) {
  using T = Acc<Scalar>;
  constexpr int kBack = back_of(kMethod), kAhead = ahead_of(kMethod), kTaps = taps_of(kMethod);
  const Problem& p = args.problem;
  const int lane = threadIdx.x % kWarpSize;
  const i64 first = chunk_first + lane * kItems, of_weight = place.channel * p.states + n;
  const V a = static_cast<const V*>(p.A)[of_weight];
  Samples<kItems, kBack + kAhead, kAhead, V> B, v;
  if (p.constant_B) {
    B.fill(static_cast<const V*>(p.B)[of_weight]);
  } else {
    B.read(B_row, lane);
  }
#pragma unroll
  for (int i = -kBack - kAhead; i < kItems + kAhead; ++i) v[i] = steps.u[i] * B[i];
  Samples<kItems, kAhead, 0, V> C;
  if (p.constant_C) {
    C.fill(static_cast<const V*>(p.C)[of_weight]);
  } else {
    C.read(C_row, lane);
  }

  // The states of the chunk.
  V alpha[kItems], state[kItems];
  const Affine<V> map = lane_map<kMethod, kItems>(steps, v, a, alpha, state);
  const V start = carry[kStart];
  V entering = shuffle_up(scan_up(map, lane)(start), 1);
  if (lane == 0) entering = start;
  // Its adjoints: conj(alpha) lambda goes to the position before.
  const T factor = is_complex_type<V> ? T(2) : T(1);
  Affine<V> back = {conjugate(map.product), number<V>(T(0))};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    state[i] = alpha[i] * (i == 0 ? entering : state[i == 0 ? 0 : i - 1]) + state[i];
  }
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    back.sum = conjugate(alpha[i]) * ((factor * g[i]) * conjugate(C[i]) + back.sum);
  }
  const V behind = carry[kAdjoint];
  const V total = scan_down(back, lane)(behind);
  V adjoint = shuffle_down(total, 1);
  if (lane == kWarpSize - 1) adjoint = behind;

  V samples[kItems], to_before[2] = {number<V>(T(0)), number<V>(T(0))}, to_behind = number<V>(T(0));
  V of_A = number<V>(T(0));
#pragma unroll
  for (int i = 0; i < kItems; ++i) samples[i] = number<V>(T(0));
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    const V lambda = (factor * g[i]) * conjugate(C[i]) + adjoint;
    adjoint = conjugate(alpha[i]) * lambda;
    const auto s = slopes<kMethod>(steps.d[i] * a, steps.ratio_at(i), alpha[i]);
    const V held = held_of<kMethod>(s.value.weight, v, i);
    V by_z = s.by_z.alpha * (i == 0 ? entering : state[i == 0 ? 0 : i - 1]);
    if constexpr (kMethod != kMamba) {
      by_z = by_z + steps.d[i] * held_of<kMethod>(s.by_z.weight, v, i);
    }
    const V of_z = lambda * conjugate(by_z);
    of_A = of_A + steps.d[i] * of_z;
    sums.d[i] += inner(of_z, a);
    if constexpr (kTaps == 1) {
      // u and d get it times the other one, once all states are in.
      sums.u[i] += inner(lambda, kMethod == kMamba ? B[i] : s.value.weight[0] * B[i]);
    } else {
      sums.d[i] += inner(lambda, held);
    }
    sums.y[i] += inner(C[i], conjugate(state[i]));
    out.C[i] = (factor * g[i]) * conjugate(state[i]);
    if constexpr (neighbour_of(kMethod) != 0) {
      sums.ratio[i] += inner(lambda, steps.d[i] * held_of<kMethod>(s.by_ratio, v, i));
    }
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const V push = kMethod == kMamba ? steps.d[i] * lambda
                                       : (steps.d[i] * conjugate(s.value.weight[j])) * lambda;
      // The last position's sample ahead is its own.
      const bool is_last = j > kBack && first + i == p.length - 1;
      const int to = i + j - kBack;
      if (to < 0) {
        to_before[-to - 1] = to_before[-to - 1] + push;
      } else if (to < kItems) {
        if (is_last) {
          samples[i] = samples[i] + push;
        } else {
          samples[to] = samples[to] + push;
        }
      } else if (is_last) {
        samples[i] = samples[i] + push;
      } else {
        to_behind = push;
      }
    }
  }
  __syncwarp();  // all have read what the first lane now writes
  if constexpr (kBack > 0) {
#pragma unroll
    for (int j = 0; j < kBack; ++j) {
      V pushed = shuffle_down(to_before[j], 1);
      if (lane == kWarpSize - 1) pushed = carry[kPushed + j];
      samples[kItems - 1 - j] = samples[kItems - 1 - j] + pushed;
    }
    // Samples before the first are the first.
    if (first == 0) samples[0] = samples[0] + to_before[0] + to_before[1];
    __syncwarp();
    if (lane == 0) {
      for (int j = 0; j < kBack; ++j) carry[kPushed + j] = to_before[j];
    }
  }
  if constexpr (kAhead > 0) {
    V pushed = shuffle_up(to_behind, 1);
    if (lane == 0) {
      pushed = number<V>(T(0));
      if (first > 0 && place.is_row) {
        pushed =
            push_from_before<Scalar, kMethod>(args, place, first, a, C[-1], adjoint, v, by_ratio);
      }
    }
    samples[0] = samples[0] + pushed;
  }
  if (lane == 0) carry[kAdjoint] = adjoint;
  V of_B = number<V>(T(0)), of_C = number<V>(T(0));
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    out.B[i] = steps.u[i] * samples[i];
    if constexpr (kTaps > 1) sums.u[i] += inner(samples[i], B[i]);
    of_B = of_B + out.B[i];
    of_C = of_C + out.C[i];
  }
  of_A = warp_sum(of_A);
  if (p.constant_B) of_B = warp_sum(of_B);
  if (p.constant_C) of_C = warp_sum(of_C);
  if (lane == 0) {
    carry[kSumA] = carry[kSumA] + of_A;
    carry[kSumB] = carry[kSumB] + of_B;
    carry[kSumC] = carry[kSumC] + of_C;
  }
}

template <class T>
__device__ __forceinline__ void write_one(T* to, bool adds, T value) {
  if (adds) {
    atomicAdd(to, value);
  } else {
    *to = value;
  }
}

// Four neighbouring positions of a gradient that all channels of the group share.
template <class V>
__device__ __forceinline__ void write_four(void* gradient, i64 row, i64 first, const Problem& p,
                                           bool adds, const V* values) {
  using T = Real<V>;
  constexpr int kParts = is_complex_type<V> ? 2 : 1;
  T* to = static_cast<T*>(gradient) + row * p.length * kParts;
  if (!is_complex_type<V> && p.aligned && first + 4 <= p.length) {
    T four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = real_part(p.reverse ? values[3 - i] : values[i]);
    to += p.reverse ? p.length - first - 4 : first;
    if (adds) {
      add_atomically<4>(to, T(1), four);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = four[i];
    }
    return;
  }
  const Walk walk(p, first);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i > walk.last) continue;
    T* at = to + walk.inside(i) * kParts;
    if constexpr (is_complex_type<V>) {
      write_one(at, adds, values[i].re);
      write_one(at + 1, adds, values[i].im);
    } else {
      write_one(at, adds, values[i]);
    }
  }
}

// Sums what the warps left in `exchange` and sends it to memory. Every thread of the block must call, after a barrier.
template <class V, int kWarps, int kItems>
__device__ __forceinline__ void write_matrix_gradients(const BackwardArgs& args, const Place& place,
                                                       const V* exchange, int n, i64 chunk_first) {
  using Of = Layout<kItems>;
  constexpr int kFours = Of::kChunk / 4;
  const Problem& p = args.problem;
  const i64 part = args.adds ? 0 : place.panel;
  const i64 row = ((part * p.batch + place.batch) * p.groups + place.group) * p.states + n;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * kFours; i += kWarps * kWarpSize) {
    const int matrix = i / kFours, four = i % kFours;
    if (matrix == 0 ? p.constant_B : p.constant_C) continue;
    V sum[4];
    for (int j = 0; j < 4; ++j) sum[j] = number<V>(Real<V>(0));
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) {
      const V* from = exchange + (warp * 2 + matrix) * Of::kChunk + four * 4;
      for (int j = 0; j < 4; ++j) sum[j] = sum[j] + from[j];
    }
    const i64 first = chunk_first + four % kWarpSize * kItems + four / kWarpSize * 4;
    write_four<V>(matrix == 0 ? args.grad_B : args.grad_C, row, first, p, args.adds, sum);
  }
}

// The gradients along positions of a chunk, once all states have been gone through.
template <class Scalar, int kMethod, int kItems, bool kComplex, class AnySteps>
__device__ __forceinline__ void write_chunk(const BackwardArgs& args, const Place& place,
                                            const AnySteps& steps, const Acc<Scalar>* g, i64 first,
                                            LaneSums<kItems, Acc<Scalar>>& sums, Acc<Scalar>& of_D,
                                            Acc<Scalar>& of_bias) {
  using T = Acc<Scalar>;
  const Problem& p = args.problem;
  const i64 row = place.row(p) * p.length;
  const T skip = p.D != nullptr ? static_cast<const T*>(p.D)[place.channel] : T(0);
  const T bias = p.delta_bias ? static_cast<const T*>(p.delta_bias)[place.channel] : T(0);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    of_D += g[i] * steps.u[i];
    sums.u[i] += skip * g[i];
  }
  store_items<kItems>(static_cast<Scalar*>(args.grad_u) + row, first, p, sums.u);
  if (p.softplus) {
    T delta[kItems];
    load_items<kItems>(row_of<Scalar>(p.delta, place), first, p, delta);
#pragma unroll
    for (int i = 0; i < kItems; ++i) sums.d[i] *= sigmoid_of(delta[i] + bias);
  }
  store_items<kItems>(static_cast<Scalar*>(args.grad_delta) + row, first, p, sums.d);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (first + i < p.length) of_bias += sums.d[i];
  }
  if (p.z.data == nullptr) return;
  T z[kItems], grad[kItems];
  load_items<kItems>(row_of<Scalar>(p.z, place), first, p, z);
  load_items<kItems>(row_of<Scalar>(args.grad_out, place), first, p, grad);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const T y = (kComplex ? T(2) : T(1)) * sums.y[i] + skip * steps.u[i];
    grad[i] *= y * silu_slope(z[i], sigmoid_of(z[i]));
  }
  store_items<kItems>(static_cast<Scalar*>(args.grad_z) + row, first, p, grad);
}

// What the ratios of true-time rules give to the steps of both sides. `behind` is what the chunk behind has for the last
// step of this one, `before` what the position before it has for its first; returns what this chunk has for the step before.
template <int kMethod, int kItems, class T, class AnySteps>
__device__ __forceinline__ T add_ratios(const AnySteps& steps, i64 first, i64 length, T behind,
                                        T before, LaneSums<kItems, T>& sums) {
  constexpr int kNeighbour = neighbour_of(kMethod);
  const int lane = threadIdx.x % kWarpSize;
  T own[kItems], other[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool is_step = steps.d[i] != T(0);
    const T scaled = is_step ? sums.ratio[i] / steps.d[i] : T(0);
    own[i] = -scaled * steps.ratio_at(i);
    other[i] = scaled;
  }
  T outside;
  if constexpr (kNeighbour > 0) {
    outside = shuffle_up(other[kItems - 1], 1);
    if (lane == 0) outside = before;
  } else {
    outside = shuffle_down(other[0], 1);
    if (lane == kWarpSize - 1) outside = behind;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int from = i - kNeighbour;
    sums.d[i] +=
        own[i] + (from < 0 || from == kItems ? outside : other[from < 0 ? 0 : from % kItems]);
    // At the ends a step is its own neighbour.
    if (first + i == (kNeighbour > 0 ? length - 1 : 0)) sums.d[i] += other[i];
  }
  return __shfl_sync(kAllLanes, other[0], 0);
}

// Blocks that a multiprocessor should hold: 16 warps, so that barriers and scans of some hide behind others.
template <class T, bool kComplex, int kWarps>
__device__ constexpr int resident_blocks() {
  return sizeof(T) == 4 && !kComplex && kWarps < 16 ? 16 / kWarps : 1;
}

// Grid: one-dimensional; for each batch and group the panels of kWarps channels.
template <class Scalar, int kMethod, bool kComplex, int kWarps, int kItems>
__global__ void __launch_bounds__(kWarps* kWarpSize,
                                  resident_blocks<Acc<Scalar>, kComplex, kWarps>())
    backward(const BackwardArgs args) {
  using T = Acc<Scalar>;
  using V = State<Scalar, kComplex>;
  using Of = Layout<kItems>;
  constexpr int kThreads = kWarps * kWarpSize, kAhead = ahead_of(kMethod);
  constexpr int kExchange = kWarps * 2 * Of::kChunk;
  extern __shared__ uint4 memory[];
  const Problem& p = args.problem;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, states = int(p.states);
  V* B_tile = reinterpret_cast<V*>(memory);
  V* C_tile = B_tile + kTileStates<V> * Of::kSlots;
  // Twice: one is written while the other one is still read.
  V* exchange = C_tile + kTileStates<V> * Of::kSlots;
  V* carry = exchange + 2 * kExchange + warp * states * kBackwardCarry;
  const Place place = place_of<kWarps>(p, blockIdx.x);
  const bool shares = !p.constant_B || !p.constant_C;

  for (int n = lane; n < states; n += kWarpSize) {
    for (int i = 0; i < kBackwardCarry; ++i) carry[n * kBackwardCarry + i] = number<V>(T(0));
    if (args.grad_last_state != nullptr) {
      carry[n * kBackwardCarry + kAdjoint] =
          static_cast<const V*>(args.grad_last_state)[place.row(p) * states + n];
    }
  }
  T of_D = T(0), of_bias = T(0), behind = T(0);
  int turn = 0;
#pragma unroll 1
  for (i64 chunk = (p.length + Of::kChunk - 1) / Of::kChunk - 1; chunk >= 0; --chunk) {
    const i64 chunk_first = chunk * Of::kChunk, first = chunk_first + lane * kItems;
    Steps<kMethod, kItems, back_of(kMethod) + kAhead, T> steps;
    load_steps<Scalar, kMethod, kItems>(p, place, first, steps);
    T g[kItems], before = T(0);
    load_gradient<Scalar, kItems>(args, place, first, g);
    // All at once: one by one each state would wait for its own.
    const V* kept = static_cast<const V*>(args.checkpoints) +
                    (place.row(p) * p.checkpoints + chunk_first / kCheckpoint) * states;
    for (int n = lane; n < states; n += kWarpSize) carry[n * kBackwardCarry + kStart] = kept[n];
    LaneSums<kItems, T> sums;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sums.u[i] = sums.d[i] = sums.y[i] = sums.ratio[i] = T(0);
#pragma unroll 1
    for (int n0 = 0; n0 < states; n0 += kTileStates<V>) {
      __syncthreads();  // the tiles are no longer read
      if (!p.constant_B) {
        fill_tile<Scalar, V, kItems, kThreads, (taps_of(kMethod) > 1)>(B_tile, p.B, p, place, n0,
                                                                       chunk_first);
      }
      if (!p.constant_C) {
        fill_tile<Scalar, V, kItems, kThreads, (kAhead > 0)>(C_tile, p.C, p, place, n0,
                                                             chunk_first);
      }
      __syncthreads();
#pragma unroll 1
      for (int n = n0; n < min_of(n0 + kTileStates<V>, states); ++n) {
        MatrixGradients<kItems, V> gradients;
        scan_state_backward<Scalar, kMethod, kItems>(
            args, place, steps, g, B_tile + (n - n0) * Of::kSlots, C_tile + (n - n0) * Of::kSlots,
            n, chunk_first, carry + n * kBackwardCarry, sums, gradients, &before);
        if (!shares) continue;
        V* buffer = exchange + turn * kExchange;
        V* own = buffer + warp * 2 * Of::kChunk;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int slot = (i / 4 * kWarpSize + lane) * 4 + i % 4;
          own[slot] = select(place.is_row, gradients.B[i], number<V>(T(0)));
          own[Of::kChunk + slot] = select(place.is_row, gradients.C[i], number<V>(T(0)));
        }
        __syncthreads();
        write_matrix_gradients<V, kWarps, kItems>(args, place, buffer, n, chunk_first);
        turn ^= 1;
      }
    }
    if constexpr (taps_of(kMethod) == 1) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        sums.d[i] += steps.u[i] * sums.u[i];
        sums.u[i] *= steps.d[i];
      }
    }
    if constexpr (neighbour_of(kMethod) != 0) {
      behind = add_ratios<kMethod, kItems>(steps, first, p.length, behind, before, sums);
    }
    if (place.is_row) {
      write_chunk<Scalar, kMethod, kItems, kComplex>(args, place, steps, g, first, sums, of_D,
                                                     of_bias);
    }
  }
  of_D = warp_sum(of_D);
  of_bias = warp_sum(of_bias);
  __syncwarp();  // the first lane has written what all read now
  if (!place.is_row) return;
  if (lane == 0) {
    if (args.grad_D != nullptr) static_cast<T*>(args.grad_D)[place.row(p)] = of_D;
    if (args.grad_delta_bias != nullptr) {
      static_cast<T*>(args.grad_delta_bias)[place.row(p)] = of_bias;
    }
  }
  for (int n = lane; n < states; n += kWarpSize) {
    const i64 at = place.row(p) * states + n;
    const V* of_state = carry + n * kBackwardCarry;
    static_cast<V*>(args.grad_A)[at] = of_state[kSumA];
    static_cast<V*>(args.grad_initial_state)[at] = of_state[kAdjoint];
    if (p.constant_B) static_cast<V*>(args.grad_B)[at] = of_state[kSumB];
    if (p.constant_C) static_cast<V*>(args.grad_C)[at] = of_state[kSumC];
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
