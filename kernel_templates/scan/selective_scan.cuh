// selective_scan on the GPU, forward: one position after the other, with the states of a channel in the registers of a few
// lanes, and no tensor of the size of all states. While a tile of positions is scanned, the next one is on its way into
// registers. Where there are too few rows for the GPU, positions are split among blocks: a first launch summarises each
// split by one map for each state, the second one begins with those of the splits before its own.
// compile time: above 250 ms for complex numbers, for double, for exponential rules, whose tile stands there twice, three
// times for the quadratic ones, and where a lane has eight states; a loop over them would put them into memory.
// spills: some hundred bytes there; up to 90 for complex numbers in double, 24 for quadratic rules.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/selective_scan_parts.cuh"

namespace torchkiln::selective_scan {

// x -> product * x + sum.
template <class V>
struct Affine {
  V product, sum;
};

// The samples v = u B that a rule takes in at a position, from the one furthest back on.
template <int kMethod, class V>
struct Window {
  V at[taps_of(kMethod)];

  __device__ __forceinline__ void push(V sample) {
#pragma unroll
    for (int j = 0; j + 1 < taps_of(kMethod); ++j) at[j] = at[j + 1];
    at[taps_of(kMethod) - 1] = sample;
  }
};

// What a lane keeps of its channel from position to position.
template <class Of, int kMethod, class V>
struct Channel {
  Rate<kMethod, V> rate[Of::kStates];
  V state[Of::kStates], product[Of::kStates];
  Real<V> step;  // the sum of all, instead of the products, where alphas are exponential
  Window<kMethod, V> window[Of::kStates];
};

// What a lane reads of four positions.
template <class Of, int kMethod, class V>
struct Readings {
  using T = Real<V>;
  static constexpr int kMore = ahead_of(kMethod);
  T d[4], x[4 + kMore], own[4], other[4];  // own, other: of Uneven
  V B[Of::kStates][4 + kMore], C[Of::kStates][4];

  // `rows`: where the channel's four lies in the rows of steps.
  template <bool kSummarises>
  __device__ __forceinline__ void read(const T* rows, const V* B_memory, const V* C_memory,
                                       const MatrixReader& of_B, const MatrixReader& of_C) {
    constexpr int kArray = Of::kRows * Of::kRowPitch;
    read_quad(rows, d);
    read_quad(rows + kArray, x);
    if constexpr (kMore > 0) x[4] = rows[kArray + 4];
    if constexpr (neighbour_of(kMethod) != 0) {
      read_quad(rows + 2 * kArray, own);
      read_quad(rows + 3 * kArray, other);
    }
#pragma unroll
    for (int s = 0; s < Of::kStates; ++s) {
      of_B.template read<Of>(B_memory, s, B[s], kMore > 0);
      if constexpr (!kSummarises) of_C.template read<Of>(C_memory, s, C[s], false);
    }
  }
};

// Four positions: the lane's part of their outputs, or what they add to a summary.
template <bool kSummarises, bool kIsNear, class Of, int kMethod, class V>
__device__ __forceinline__ void scan_four(const Readings<Of, kMethod, V>& in,
                                          Channel<Of, kMethod, V>& channel, Real<V>* y) {
  using T = Real<V>;
  if constexpr (kSummarises) channel.step += (in.d[0] + in.d[1]) + (in.d[2] + in.d[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[i] = T(0);
    Uneven<T> uneven;
    if constexpr (neighbour_of(kMethod) != 0) uneven = {in.own[i], in.other[i]};
#pragma unroll
    for (int s = 0; s < Of::kStates; ++s) {
      const int at = i + ahead_of(kMethod);
      channel.window[s].push(in.x[at] * in.B[s][at]);
      const auto& rate = channel.rate[s];
      V& state = channel.state[s];
      state = stepped<kIsNear>(state, in.d[i], rate, uneven, channel.window[s].at);
      if constexpr (kSummarises && !keeps_step(kMethod, is_complex_type<V>)) {
        channel.product[s] = coefficients(in.d[i], rate, Uneven<T>()).alpha * channel.product[s];
      }
      if constexpr (!kSummarises) y[i] += inner(in.C[s][i], conjugate(state));
    }
  }
}

// Weights, states and the samples before the first position of a split. The state is what the splits before make of the
// initial one.
template <bool kSummarises, class Of, class Scalar, int kMethod, class V>
__device__ __forceinline__ void enter(const Args& args, const Place& place, const Lane<Of>& lane,
                                      int split, int first, Channel<Of, kMethod, V>& channel) {
  const Problem& p = args.problem;
  const i64 weights = i64(place.channel_of(lane.row)) * p.states;
  const i64 states = place.row_of(p, lane.row) * p.states, all = p.batch * p.dim * p.states;
  const V* initial = static_cast<const V*>(args.initial_state) + states;
  const V zero = number<V>(0);
  channel.step = Real<V>(0);
#pragma unroll
  for (int s = 0; s < Of::kStates; ++s) {
    const int n = lane.state(s);
    const bool is_state = n < int(p.states);
    channel.product[s] = number<V>(1);
    channel.rate[s] = rate_of<kMethod>(is_state ? static_cast<const V*>(p.A)[weights + n] : zero);
    channel.state[s] =
        is_state && args.initial_state != nullptr && !kSummarises ? initial[n] : zero;
  }
  if constexpr (!kSummarises) {
    const Affine<V>* maps = static_cast<const Affine<V>*>(args.summaries) + states;
#pragma unroll 1
    for (int before = 0; before < split; ++before, maps += all) {
#pragma unroll
      for (int s = 0; s < Of::kStates; ++s) {
        if (lane.state(s) >= int(p.states)) continue;
        const Affine<V> map = maps[lane.state(s)];
        channel.state[s] = map.product * channel.state[s] + map.sum;
      }
    }
  }
  if constexpr (taps_of(kMethod) > 1) {
    const Scalar* u = row_begin<Scalar>(p.u, place, lane.row);
#pragma unroll
    for (int j = 0; j + 1 < taps_of(kMethod); ++j) {
      const int at = memory_of_one(p, first - back_of(kMethod) + j);
      const Acc<Scalar> value = load(u[at]);
#pragma unroll
      for (int s = 0; s < Of::kStates; ++s) {
        const int n = min_of(lane.state(s), int(p.states) - 1);
        const V of_B = p.constant_B ? static_cast<const V*>(p.B)[weights + n]
                                    : matrix_at<V>(matrix_row<V, Scalar>(p.B, p, place, n), at);
        channel.window[s].push(value * of_B);
      }
    }
  }
}

// Tells tiles all z of which, of all channels of a warp, lie near 0.
template <class Of, int kMethod, class V>
struct Nearness {
  float longest[Of::kRowItems];  // step near 0 of each of a lane's fours

  __device__ __forceinline__ explicit Nearness(const Channel<Of, kMethod, V>& channel) {
    if constexpr (has_near<kMethod, V>) {
      const float own = longest_near<Of>([&](int s) { return channel.rate[s].a; });
#pragma unroll
      for (int k = 0; k < Of::kRowItems; ++k) {
        longest[k] = __shfl_sync(kAllLanes, own, RowItem<Of>(k).row % Of::kRows * Of::kLanes);
      }
    }
  }
  // `rows`: what the lane itself has written there.
  __device__ __forceinline__ bool of_tile(const float* rows) const {
    bool is_near = true;
#pragma unroll
    for (int k = 0; k < Of::kRowItems; ++k) {
      const RowItem<Of> item(k);
      if (!item.exists()) continue;
      float d[4];
      read_quad(rows + item.slot(), d);
      is_near = is_near && are_within<4>(d, longest[k]);
    }
    return __all_sync(kAllLanes, is_near);
  }
};

// Numbers of a warp's memory: rows of what Steps writes, then those of the lanes' parts of outputs.
template <class Of, class OfSteps, int kMethod>
constexpr int warp_numbers =
    OfSteps::kNumbers + (keeps_parts(kMethod, Of::kLanes) ? kWarpSize * Of::kRowPitch : 0);

// A four of a tile's outputs, once it has been scanned.
template <class Of, int kMethod, class T>
__device__ __forceinline__ void read_sums(const T* sums, const RowItem<Of>& item, T* y) {
  if constexpr (!keeps_parts(kMethod, Of::kLanes)) return read_quad(sums + item.slot(), y);
  const T* from = sums + item.row * Of::kLanes * Of::kRowPitch + item.four * 4;
  sum_quads<Of::kLanes>(from, Of::kRowPitch, y);
}

// Skip connection and gate, on the way out of shared memory.
template <class Of, int kMethod, bool kComplex, class Scalar>
__device__ __forceinline__ void write_outputs(const Args& args, const Place& place, int first,
                                              const RowSources<Of, Scalar>& out,
                                              const Acc<Scalar>* sums,
                                              const RowWeights<Of, Acc<Scalar>>& skip,
                                              const RowFours<Of, Scalar>& u,
                                              const RowFours<Of, Scalar>& z) {
  using T = Acc<Scalar>;
  const Problem& p = args.problem;
  const bool whole = is_whole<Of>(p, first);
#pragma unroll
  for (int k = 0; k < Of::kRowItems; ++k) {
    const RowItem<Of> item(k);
    if (!item.exists() || !place.has(item.row)) continue;
    T y[4], value[4];
    read_sums<Of, kMethod>(sums, item, y);
    numbers_of(u.at[k], p, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = (kComplex ? T(2) : T(1)) * y[i] + skip.at[k] * value[i];
    if (p.z.data != nullptr) {
      numbers_of(z.at[k], p, value);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] *= value[i] * sigmoid_of(value[i]);
    }
    store_four(out.at[k], memory_of(p, first + item.four * 4), p, whole, y);
  }
}

// The last states, or what the split makes of any state before it.
template <bool kSummarises, class Of, int kMethod, class V>
__device__ __forceinline__ void leave(const Args& args, const Place& place, const Lane<Of>& lane,
                                      int split, bool is_last,
                                      const Channel<Of, kMethod, V>& channel) {
  const Problem& p = args.problem;
  const i64 states = place.row_of(p, lane.row) * p.states, all = p.batch * p.dim * p.states;
#pragma unroll
  for (int s = 0; s < Of::kStates; ++s) {
    const int n = lane.state(s);
    if (!place.has(lane.row) || n >= int(p.states)) continue;
    if constexpr (kSummarises) {
      V product = channel.product[s];
      if constexpr (keeps_step(kMethod, is_complex_type<V>)) {
        product = quick_exp_of_product(channel.step, channel.rate[s].a);
      }
      static_cast<Affine<V>*>(args.summaries)[split * all + states + n] = {product,
                                                                           channel.state[s]};
    } else if (is_last) {
      static_cast<V*>(args.last_state)[states + n] = channel.state[s];
    }
  }
}

// Where the next state for the backward goes; null where none is wanted.
template <class V>
struct Kept {
  V* states;
  bool wanted;
};

// Sums a four over the lanes of its channel, and leaves the sums at `to`.
template <class Of, class T>
__device__ __forceinline__ void give(const Lane<Of>& lane, bool exists, T* y, T* to) {
  sum_over_lanes<Of::kLanes>(y, lane.part);
  __syncwarp();  // all have read what is now written over
  if (!exists || !is_sums_writer<Of::kLanes>(lane.part)) return;
#pragma unroll
  for (int i = 0; i < kKeptSums<Of::kLanes>; ++i) to[i] = y[i];
}

// Scans the tile that lies in shared memory; leaves the outputs kSums behind the rows. A four is summed while the next one is scanned, so
// that nobody waits for the shuffles. kVariable: neither B nor C is constant.
template <bool kSummarises, bool kIsNear, bool kVariable, class Of, int kMethod, int kMatrix,
          int kSums, class V>
__device__ __forceinline__ void scan_tile(const Args& args, const Lane<Of>& lane, int first,
                                          const V* matrices, Real<V>* rows, MatrixReader of_B,
                                          MatrixReader of_C, Channel<Of, kMethod, V>& channel,
                                          Kept<V>& kept) {
  using T = Real<V>;
  const Problem& p = args.problem;
  const int end = min_of(first + Of::kTile, int(p.length));
  constexpr bool kParts = keeps_parts(kMethod, Of::kLanes);
  constexpr int kUnrolled = kIsNear ? (kVariable && neighbour_of(kMethod) != 0 ? 4 : 2) : 1;
  if constexpr (kVariable) {
    // Both lie at the same places of their memories, at distances that are known: addresses become constants.
    of_B.step = kFour;
    of_C = of_B;
  }
  T* parts = rows + kSums + int(threadIdx.x) % kWarpSize * Of::kRowPitch;
  rows += lane.row * Of::kRowPitch;
  T* sums = kParts ? parts : rows + kSums + sums_first<Of::kLanes>(lane.part);
  Readings<Of, kMethod, V> in;
  in.template read<kSummarises>(rows, matrices, matrices + kMatrix, of_B, of_C);
  T before[4] = {T(0), T(0), T(0), T(0)};
#pragma unroll 1
  for (int start = first; start < end; start += kCheckpoint) {
    if (!kSummarises && kept.wanted && start > 0 && start % kCheckpoint == 0) {
#pragma unroll
      for (int s = 0; s < Of::kStates; ++s) {
        if (lane.state(s) < int(p.states)) kept.states[lane.state(s)] = channel.state[s];
      }
      kept.states += p.states;
    }
    const int stop = min_of(start + kCheckpoint, end);
#pragma unroll kUnrolled
    for (int position = start; position < stop; position += 4) {
      T y[4];
      scan_four<kSummarises, kIsNear>(in, channel, y);
      rows += 4;
      of_B.at += of_B.step;
      of_C.at += of_C.step;
      // What lies behind the tile is read and not used: a branch here costs a tenth of the time.
      in.template read<kSummarises>(rows, matrices, matrices + kMatrix, of_B, of_C);
      if constexpr (kSummarises) continue;
      if constexpr (kParts) {
        write_quad(sums, y);
      } else {
        give(lane, position > first, before, sums - 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) before[i] = y[i];
      }
      sums += 4;
    }
  }
  if constexpr (!kSummarises && !kParts) give(lane, true, before, sums - 4);
}

// Blocks that a multiprocessor should hold: 16 warps with 128 registers a lane, or 12 with 168 where a lane has more states,
// where parts of long tiles leave no shared memory for more, and where steps are not equal: with fewer registers addresses
// would be worked out again in each tile.
template <class T, int kMethod, bool kComplex, int kWarps, int kLanes, int kStates, int kRowBytes>
__device__ constexpr int resident_blocks() {
  if (sizeof(T) == 8 || kComplex || kStates > 4) return 1;
  const bool is_uneven = neighbour_of(kMethod) != 0 && 12 % kWarps == 0;
  const bool is_wide =
      kStates > 2 || is_uneven || (keeps_parts(kMethod, kLanes) && kRowBytes > 128);
  return (is_wide ? 12 : 16) / kWarps;
}

// Grid: one-dimensional; for each split, batch and group the panels of channels.
template <class Scalar, int kMethod, bool kComplex, bool kSummarises, int kWarps, int kLanes,
          int kStates, int kRowBytes>
__global__ void __launch_bounds__(
    kWarps* kWarpSize,
    resident_blocks<Acc<Scalar>, kMethod, kComplex, kWarps, kLanes, kStates, kRowBytes>())
    forward(const Args args) {
  using T = Acc<Scalar>;
  using V = State<Scalar, kComplex>;
  using Of = Layout<V, kWarps, kLanes, kStates, kRowBytes>;
  using OfSteps = Steps<Of, Scalar, kMethod, (taps_of(kMethod) == 1)>;
  using OfB = MatrixFours<Of, Scalar, V, (ahead_of(kMethod) > 0)>;
  using OfC = MatrixFours<Of, Scalar, V, false>;
  constexpr int kTile = Of::kTile, kTiles = matrix_tiles(Of::kPadded);
  constexpr int kSums = keeps_parts(kMethod, Of::kLanes) ? OfSteps::kNumbers : OfSteps::kArray;
  constexpr int kMatrix = matrix_numbers(Of::kThreads, kLanes, kStates, kTile, sizeof(V));
  extern __shared__ uint4 memory[];
  const Problem& p = args.problem;
  V* matrices = reinterpret_cast<V*>(memory);
  T* rows = reinterpret_cast<T*>(matrices + 2 * kMatrix) +
            threadIdx.x / kWarpSize * warp_numbers<Of, OfSteps, kMethod>;

  const u32 panels = panels_of<Of>(p), blocks = u32(p.batch) * u32(p.groups) * panels;
  const int split = int(blockIdx.x / blocks);
  const Place place = place_of<Of>(p, blockIdx.x % blocks, panels);
  const int tiles = (int(p.length) + kTile - 1) / kTile;
  const int each = (tiles + args.splits - 1) / args.splits * kTile;
  const int begin = split * each, end = min_of(int(p.length), begin + each);
  if (begin >= end) return;

  const Lane<Of> lane;
  Channel<Of, kMethod, V> channel;
  enter<kSummarises, Of, Scalar>(args, place, lane, split, begin, channel);
  const i64 kept_before = (max_of(begin, 1) - 1) / kCheckpoint;
  Kept<V> kept = {static_cast<V*>(args.checkpoints) +
                      (place.row_of(p, lane.row) * (p.tiles - 1) + kept_before) * p.states,
                  args.checkpoints != nullptr && place.has(lane.row)};
  MatrixReader of_B = {}, of_C = {};
  if (p.constant_B) of_B = constant_matrix(p.B, p, place, lane, matrices);
  if (p.constant_C && !kSummarises) of_C = constant_matrix(p.C, p, place, lane, matrices + kMatrix);
  const RowWeights<Of, T> bias(p.delta_bias, place), skip(p.D, place);

  OfSteps steps(p, place, bias, begin);
  OfB B(p.B, p, place);
  OfC C(p.C, p, place);
  const RowSources<Of, const Scalar> of_z(p.z, place);
  const RowSources<Of, Scalar> out(static_cast<Scalar*>(args.out), p.dim * p.length, p.length,
                                   place);
  RowFours<Of, Scalar> u, z;
  const Nearness<Of, kMethod, V> nearness(channel);
  bool is_near = false;
  // A tile is scanned while the next one is on its way.
#pragma unroll 1
  for (int first = begin - kTile; first < end; first += kTile) {
    const int next = first + kTile;
    if (next < end) {
      whole_or_not<Of, kMethod>(p, next, [&](bool whole) {
        steps.load(p, next, whole);
        if (!p.constant_B) B.load(p, next, whole);
        if (!p.constant_C && !kSummarises) C.load(p, next, whole);
      });
    }
    if (first >= begin) {
      if (p.z.data != nullptr && !kSummarises) {
        whole_or_not<Of, kMethod>(p, first, [&](bool whole) { z.load(of_z, p, first, whole); });
      }
      near_or_far<kMethod, V>(is_near, [&](auto near) {
        constexpr bool kIsNear = near.value;
        const auto scan = [&](auto is_variable) {
          scan_tile<kSummarises, kIsNear, is_variable.value, Of, kMethod, kMatrix, kSums>(
              args, lane, first, matrices, rows, of_B, of_C, channel, kept);
        };
        if constexpr (kIsNear && taps_of(kMethod) > 2) {
          if (!p.constant_B && !p.constant_C) return scan(Truth<true>());
        }
        scan(Truth<false>());
      });
      __syncwarp();
      if constexpr (!kSummarises) {
        write_outputs<Of, kMethod, kComplex>(args, place, first, out, rows + kSums, skip, u, z);
      }
    }
    // Of two tiles of B and C nobody reads the one that is written now: all have passed the barrier after it.
    if constexpr (kTiles == 1) __syncthreads();
    __syncwarp();
    if (next < end) {
      const int tile = next / kTile % kTiles;
      steps.write(p, place, bias, next, rows);
      if constexpr (has_near<kMethod, V>) is_near = nearness.of_tile(rows);
      u = steps.u;
      if (!p.constant_B) {
        B.write(p, matrices + tile * matrix_tile<Of>);
        of_B = variable_matrix(lane, tile);
      }
      if (!p.constant_C && !kSummarises) {
        C.write(p, matrices + kMatrix + tile * matrix_tile<Of>);
        of_C = variable_matrix(lane, tile);
      }
    }
    __syncthreads();
  }
  leave<kSummarises>(args, place, lane, split, end == p.length, channel);
}

}  // namespace torchkiln::selective_scan
