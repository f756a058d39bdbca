// selective_scan on the GPU, forward: one pass over the positions, and no tensor of the size of all states. Each lane
// folds its positions into one affine map of the state, a scan over the lanes gives it the state before them, and it
// goes through them again. Where there are too few rows for the GPU, positions are split among blocks: a first launch
// summarises each split by one map for each state, the second one begins with those of the splits before its own.
// compile time: above 250 ms for the quadratic rules; every position of a lane is unrolled, or its numbers would lie in
// memory.
// spills: up to 16 bytes where a rule takes in several samples, so that two blocks share a multiprocessor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/selective_scan_parts.cuh"

namespace torchkiln::selective_scan {

// The state before this split: out of the initial one and the summaries of the splits before.
template <class V>
__device__ __forceinline__ V entering_state(const Args& args, const Place& place, i64 split,
                                            int n) {
  const Problem& p = args.problem;
  const i64 rows = p.batch * p.dim, row = place.row(p);
  V state = number<V>(Real<V>(0));
  if (args.summarises) return state;
  if (args.initial_state != nullptr) {
    state = static_cast<const V*>(args.initial_state)[row * p.states + n];
  }
  const Affine<V>* maps = static_cast<const Affine<V>*>(args.summaries);
  for (i64 s = 0; s < split; ++s) state = maps[(s * rows + row) * p.states + n](state);
  return state;
}

// All that a chunk adds to the outputs of one state, and the state behind it.
template <class Scalar, int kMethod, int kItems, class V, class AnySteps>
__device__ __forceinline__ void scan_state(const Args& args, const Place& place,
                                           const AnySteps& steps, const V* B_row, const V* C_row,
                                           int n, i64 chunk_first, V* carry, Acc<Scalar>* y) {
  using T = Acc<Scalar>;
  const Problem& p = args.problem;
  const int lane = threadIdx.x % kWarpSize;
  const i64 of_weight = place.channel * p.states + n;
  Samples<kItems, back_of(kMethod), ahead_of(kMethod), V> v;
  if (p.constant_B) {
    v.fill(static_cast<const V*>(p.B)[of_weight]);
  } else {
    v.read(B_row, lane);
  }
#pragma unroll
  for (int i = -back_of(kMethod); i < kItems + ahead_of(kMethod); ++i) v[i] = steps.u[i] * v[i];
  V alpha[kItems], input[kItems];
  const V a = static_cast<const V*>(p.A)[of_weight];
  const Affine<V> map = scan_up(lane_map<kMethod, kItems>(steps, v, a, alpha, input), lane);
  const V start = carry[0], end = map(start);
  V state = shuffle_up(end, 1);
  if (lane == 0) state = start;
  __syncwarp();  // all have read what the last lane now writes
  if (lane == kWarpSize - 1) {
    carry[0] = end;
    carry[1] = map.product * carry[1];
  }
  if (args.summarises) return;
  Samples<kItems, 0, 0, V> c;
  if (p.constant_C) {
    c.fill(static_cast<const V*>(p.C)[of_weight]);
  } else {
    c.read(C_row, lane);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    state = alpha[i] * state + input[i];
    y[i] += inner(c[i], conjugate(state));
  }
  const i64 behind = chunk_first + (lane + 1) * kItems;
  if (args.checkpoints != nullptr && place.is_row && behind % kCheckpoint == 0 &&
      behind < p.length) {
    V* kept = static_cast<V*>(args.checkpoints) + place.row(p) * p.checkpoints * p.states;
    kept[behind / kCheckpoint * p.states + n] = end;
  }
}

// Skip connection and gate, on the way out.
template <class Scalar, int kItems, bool kComplex, class AnySteps>
__device__ __forceinline__ void write_outputs(const Args& args, const Place& place,
                                              const AnySteps& steps, i64 first, Acc<Scalar>* y) {
  using T = Acc<Scalar>;
  const Problem& p = args.problem;
  const T skip = p.D != nullptr ? static_cast<const T*>(p.D)[place.channel] : T(0);
#pragma unroll
  for (int i = 0; i < kItems; ++i) y[i] = (kComplex ? T(2) : T(1)) * y[i] + skip * steps.u[i];
  if (p.z.data != nullptr) {
    T z[kItems];
    load_items<kItems>(row_of<Scalar>(p.z, place), first, p, z);
#pragma unroll
    for (int i = 0; i < kItems; ++i) y[i] *= z[i] * sigmoid_of(z[i]);
  }
  store_items<kItems>(static_cast<Scalar*>(args.out) + place.row(p) * p.length, first, p, y);
}

// Blocks that a multiprocessor should hold: 24 warps where a lane keeps little, so that loads and scans of some hide
// behind others.
template <class T, int kMethod, bool kComplex, int kWarps, int kItems>
__device__ constexpr int blocks_of() {
  const bool is_lean = sizeof(T) == 4 && !kComplex && kItems <= 8;
  const int warps = !is_lean ? kWarps : (taps_of(kMethod) == 1 ? 24 : 16);
  return warps > kWarps ? warps / kWarps : 1;
}

// Grid: one-dimensional; for each split, batch and group the panels of kWarps channels.
template <class Scalar, int kMethod, bool kComplex, int kWarps, int kItems>
__global__ void __launch_bounds__(kWarps* kWarpSize,
                                  blocks_of<Acc<Scalar>, kMethod, kComplex, kWarps, kItems>())
    forward(const Args args) {
  using T = Acc<Scalar>;
  using V = State<Scalar, kComplex>;
  using Of = Layout<kItems>;
  constexpr int kThreads = kWarps * kWarpSize;
  constexpr bool kHalo = taps_of(kMethod) > 1;
  extern __shared__ uint4 memory[];
  const Problem& p = args.problem;
  const int lane = threadIdx.x % kWarpSize, states = int(p.states);
  V* B_tile = reinterpret_cast<V*>(memory);
  V* C_tile = B_tile + kTileStates<V> * Of::kSlots;
  V* carry =
      C_tile + kTileStates<V> * Of::kSlots + threadIdx.x / kWarpSize * states * kForwardCarry;

  const i64 panels = (p.dim / p.groups + kWarps - 1) / kWarps, blocks = p.batch * p.groups * panels;
  const i64 split = blockIdx.x / blocks;
  const Place place = place_of<kWarps>(p, blockIdx.x % blocks);
  const i64 chunks = (p.length + Of::kChunk - 1) / Of::kChunk;
  const i64 each = (chunks + args.splits - 1) / args.splits;
  const i64 begin = split * each, end = min_of(chunks, begin + each);
  if (begin >= end) return;

  for (int n = lane; n < states; n += kWarpSize) {
    const V state = entering_state<V>(args, place, split, n);
    carry[n * kForwardCarry] = state;
    carry[n * kForwardCarry + 1] = number<V>(T(1));
    if (args.checkpoints != nullptr && !args.summarises && place.is_row && split == 0) {
      static_cast<V*>(args.checkpoints)[place.row(p) * p.checkpoints * states + n] = state;
    }
  }
#pragma unroll 1
  for (i64 chunk = begin; chunk < end; ++chunk) {
    const i64 chunk_first = chunk * Of::kChunk, first = chunk_first + lane * kItems;
    Steps<kMethod, kItems, back_of(kMethod), T> steps;
    load_steps<Scalar, kMethod, kItems>(p, place, first, steps);
    T y[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) y[i] = T(0);
#pragma unroll 1
    for (int n0 = 0; n0 < states; n0 += kTileStates<V>) {
      __syncthreads();  // the tiles are no longer read
      if (!p.constant_B) {
        fill_tile<Scalar, V, kItems, kThreads, kHalo>(B_tile, p.B, p, place, n0, chunk_first);
      }
      if (!p.constant_C && !args.summarises) {
        fill_tile<Scalar, V, kItems, kThreads, false>(C_tile, p.C, p, place, n0, chunk_first);
      }
      __syncthreads();
#pragma unroll 1
      for (int n = n0; n < min_of(n0 + kTileStates<V>, states); ++n) {
        scan_state<Scalar, kMethod, kItems>(args, place, steps, B_tile + (n - n0) * Of::kSlots,
                                            C_tile + (n - n0) * Of::kSlots, n, chunk_first,
                                            carry + n * kForwardCarry, y);
      }
    }
    if (!args.summarises && place.is_row) {
      write_outputs<Scalar, kItems, kComplex>(args, place, steps, first, y);
    }
  }
  __syncwarp();
  for (int n = lane; n < states && place.is_row; n += kWarpSize) {
    const i64 at = place.row(p) * states + n;
    if (args.summarises) {
      static_cast<Affine<V>*>(args.summaries)[split * p.batch * p.dim * states + at] = {
          carry[n * kForwardCarry + 1], carry[n * kForwardCarry]};
    } else if (end == chunks) {
      static_cast<V*>(args.last_state)[at] = carry[n * kForwardCarry];
    }
  }
}

}  // namespace torchkiln::selective_scan
