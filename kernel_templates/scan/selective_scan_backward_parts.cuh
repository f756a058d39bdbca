// What the backward of selective_scan lays into shared memory, reads from there, and sums.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/atomics.cuh"
#include "scan/gate.h"
#include "scan/selective_scan_parts.cuh"

namespace torchkiln::selective_scan_backward {

using namespace torchkiln::selective_scan;

// Tiles are what lies between two kept states. States are gone through in panels of kPadded; a lane keeps what goes on
// from tile to tile of up to kPanels of them.
template <class V, int kMethod, int kWarpCount, int kLaneCount, int kStateCount, int kPanelCount>
struct TileLayout : Layout<V, kWarpCount, kLaneCount, kStateCount, kCheckpoint* int(sizeof(V))> {
  static constexpr int kPanels = kPanelCount;
  static constexpr int kPitch = kTilePitch, kMatrixPitch = kPitch, kRowPitch = kPitch;
  static constexpr int kArray = kWarpSize / kLaneCount * kPitch;  // rows of a warp's channels
  static constexpr int kMatrix = kLaneCount * kStateCount * kPitch;
  static constexpr int kFourPitch = four_pitch(kLaneCount, kStateCount);
  static constexpr bool kSumsInMemory =
      sums_in_memory(kMethod, kLaneCount, kStateCount, int(sizeof(V)));
  static constexpr int kFourNumbers = four_numbers(kLaneCount, kStateCount);
  static constexpr int kOfWarp =
      kFourNumbers + sums_numbers(kMethod, kLaneCount, kStateCount, int(sizeof(V)));
};

template <class T>
__device__ __forceinline__ T bias_of(const Problem& p, const Place& place, int row) {
  return p.delta_bias != nullptr ? static_cast<const T*>(p.delta_bias)[place.channel_of(row)]
                                 : T(0);
}

// Where position `at` of a tile lies in a row: two before it and the one behind it stand behind the others.
__device__ __forceinline__ constexpr int slot_of(int at) { return at < 0 ? kTilePitch + at : at; }

// Arrays of rows in a warp's memory. With one panel the results take the places of what has been read.
template <int kMethod, int kPanels>
struct Arrays {
  static constexpr int kSteps = 0, kInputs = 1, kOwn = 2, kOther = 3;  // the last two: of Uneven
  static constexpr int kGradients = step_arrays(kMethod), kSlopes = kGradients + 1,
                       kGates = kGradients + 2, kOut = kPanels > 1 ? kGradients + 3 : 0;
  static constexpr int kOfSteps = kOut, kOfInputs = kOut + 1, kOfRatios = kOut + 2,
                       kOutputs = kPanels > 1 ? kOut + result_arrays(kMethod) - 1 : kGradients;
};

// ---- sums over lanes ----

template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}
template <class T>
__device__ __forceinline__ Complex<T> shuffle_xor(Complex<T> x, int mask) {
  return {shuffle_xor(x.re, mask), shuffle_xor(x.im, mask)};
}

// Sums kCount values over kLanes lanes, which are kStride apart; `index` is the own one among them. Each is left with
// kept_of of the sums, from kept_first on; where there are more lanes than values, is_keeper says which one writes.
template <int kCount, int kLanes, int kStride, class V>
__device__ __forceinline__ void fold(V* values, int index) {
  if constexpr (kLanes > 1 && kCount > 1) {
    const bool is_upper = (index & (kLanes / 2)) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const V given = select(is_upper, values[i], values[i + kCount / 2]);
      const V kept = select(is_upper, values[i + kCount / 2], values[i]);
      values[i] = kept + shuffle_xor(given, kLanes / 2 * kStride);
    }
    fold<kCount / 2, kLanes / 2, kStride>(values, index);
  } else if constexpr (kLanes > 1) {
    values[0] = values[0] + shuffle_xor(values[0], kLanes / 2 * kStride);
    fold<1, kLanes / 2, kStride>(values, index);
  }
}
template <int kCount, int kLanes>
constexpr int kept_of = kCount > kLanes ? kCount / kLanes : 1;
template <int kCount, int kLanes>
__device__ __forceinline__ int kept_first(int index) {
  return index * kCount / kLanes;
}
template <int kCount, int kLanes>
__device__ __forceinline__ bool is_keeper(int index) {
  return kLanes <= kCount || index % (kLanes / kCount) == 0;
}

// ---- rows ----

// The gradient of the output at four positions from `first` on.
template <class Scalar>
__device__ __forceinline__ Four<Scalar, 1> load_gradient(const BackwardArgs& args,
                                                         const Place& place, int row, int first) {
  const Problem& p = args.problem;
  const Scalar* from = row_begin<Scalar>(args.grad_out, place, row);
  if (args.grad_stride == 1) return load_four<1>(from, first, p);
  Four<Scalar, 1> four;
  const int begin = memory_of(p, first);
#pragma unroll
  for (int i = 0; i < 4; ++i) four.at(i) = from[inside_of(p, begin + i) * args.grad_stride];
  return four;
}

// Asks for what the tile before will read at `position` of it.
template <class Scalar>
__device__ __forceinline__ void prefetch_rows(const BackwardArgs& args, const Place& place, int row,
                                              int position) {
  const Problem& p = args.problem;
  const int at = memory_of_one(p, position);
  prefetch(row_begin<Scalar>(p.u, place, row) + at);
  prefetch(row_begin<Scalar>(p.delta, place, row) + at);
  prefetch(row_begin<Scalar>(args.grad_out, place, row) + at * args.grad_stride);
  if (p.z.data != nullptr) prefetch(row_begin<Scalar>(p.z, place, row) + at);
}

// Lays out what lanes need of their channel in the tile that begins at `first`, in the rows at `row`. Positions outside of
// [begin, end) change no state. Returns the lane's part of the gradient of D. kWeighs: whether weights will be asked for, not
// alphas alone.
template <class Of, class Scalar, int kMethod, bool kWeighs>
__device__ __forceinline__ Acc<Scalar> fill_rows(const BackwardArgs& args, const Place& place,
                                                 const Lane<Of>& lane, int first, int begin,
                                                 int end, Acc<Scalar>* row) {
  using T = Acc<Scalar>;
  using At = Arrays<kMethod, Of::kPanels>;
  const Problem& p = args.problem;
  const Scalar* delta = row_begin<Scalar>(p.delta, place, lane.row);
  const T bias = bias_of<T>(p, place, lane.row);
  T of_D = T(0);
#pragma unroll 1
  for (int four = lane.part; four < Of::kFours; four += Of::kLanes) {
    const int position = first + four * 4;
    T* to = row + four * 4;
    T u[4], d[4], g[4], more[4];
    Scalar beside;  // on its way with the others
    if constexpr (kWeighs && neighbour_of(kMethod) != 0) {
      beside = delta[memory_of_one(p, position + (neighbour_of(kMethod) > 0 ? 4 : -1))];
    }
    prefetch_rows<Scalar>(args, place, lane.row, position - Of::kTile);
    numbers_of(load_four<1>(row_begin<Scalar>(p.u, place, lane.row), position, p), p, u);
    numbers_of(load_four<1>(delta, position, p), p, d);
    numbers_of(load_gradient<Scalar>(args, place, lane.row, position), p, g);
    if (p.z.data != nullptr) {
      numbers_of(load_four<1>(row_begin<Scalar>(p.z, place, lane.row), position, p), p, more);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T z = more[i], sigmoid = sigmoid_of(z);
        more[i] = g[i] * silu_slope(z, sigmoid);
        g[i] *= z * sigmoid;
      }
      write_quad(to + At::kGates * Of::kArray, more);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) more[i] = p.softplus ? sigmoid_of(d[i] + bias) : T(1);
    steps_of(d, bias, p.softplus);
    write_quad(to + At::kSlopes * Of::kArray, more);
    if constexpr (kWeighs && neighbour_of(kMethod) != 0) {
      constexpr int kNeighbour = neighbour_of(kMethod);
      T other[4];
      uneven_of_four<kNeighbour>(d, step_of(T(load(beside)), bias, p.softplus), more, other);
      if constexpr (kNeighbour > 0) {
        // Samples behind the last one are that one: nothing comes from there.
#pragma unroll
        for (int i = 0; i < 4; ++i) other[i] = position + i + 1 < p.length ? other[i] : T(0);
      }
      write_quad(to + At::kOwn * Of::kArray, more);
      write_quad(to + At::kOther * Of::kArray, other);
    }
    const int before = begin - position, behind = place.has(lane.row) ? end - position : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_there = i >= before && i < behind;
      d[i] = is_there ? d[i] : T(0);
      g[i] = is_there ? g[i] : T(0);
      of_D += g[i] * u[i];
    }
    write_quad(to + At::kInputs * Of::kArray, u);
    write_quad(to + At::kSteps * Of::kArray, d);
    write_quad(to + At::kGradients * Of::kArray, g);
  }
  return of_D;
}

// What rules with several samples read just beside the tile.
template <class Of, class Scalar, int kMethod>
__device__ __forceinline__ void fill_beside(const BackwardArgs& args, const Place& place,
                                            const Lane<Of>& lane, int first, Acc<Scalar>* row) {
  using T = Acc<Scalar>;
  using At = Arrays<kMethod, Of::kPanels>;
  constexpr int kBack = back_of(kMethod), kAhead = ahead_of(kMethod);
  if (kBack + kAhead == 0 || lane.part != 0) return;
  const Problem& p = args.problem;
  const Scalar* u = row_begin<Scalar>(p.u, place, lane.row);
  T* inputs = row + At::kInputs * Of::kArray;
#pragma unroll
  for (int j = 1; j <= kBack; ++j) inputs[slot_of(-j)] = load(u[memory_of_one(p, first - j)]);
  if constexpr (kAhead > 0) {
    inputs[Of::kTile] = load(u[memory_of_one(p, first + Of::kTile)]);
    const Scalar* delta = row_begin<Scalar>(p.delta, place, lane.row);
    const i64 inside = memory_of_one(p, first - 1);
    const T bias = bias_of<T>(p, place, lane.row);
    const T d = step_of(T(load(delta[inside])), bias, p.softplus);
    T g = load(row_begin<Scalar>(args.grad_out, place, lane.row)[inside * args.grad_stride]);
    if (p.z.data != nullptr) {
      g *= silu_of(T(load(row_begin<Scalar>(p.z, place, lane.row)[inside])));
    }
    row[At::kSteps * Of::kArray + slot_of(-1)] = first > 0 && place.has(lane.row) ? d : T(0);
    row[At::kGradients * Of::kArray + slot_of(-1)] = g;
    if constexpr (neighbour_of(kMethod) != 0) {
      const T own = step_of(T(load(delta[memory_of_one(p, first)])), bias, p.softplus);
      row[At::kOther * Of::kArray + slot_of(-1)] = uneven_of(d, own).other;
    }
  }
}

// Four positions of a row, kBack before them and kAhead behind.
template <int kBack, int kAhead, class V>
__device__ __forceinline__ void read_window(const V* row, int four, V* out) {
  read_quad(row + four * 4, out + kBack);
  if constexpr (kBack == 2 && sizeof(V) <= 8) {
    const Pack<V, 2> before = *reinterpret_cast<const Pack<V, 2>*>(row + slot_of(four * 4 - 2));
    out[0] = before.at[0];
    out[1] = before.at[1];
  } else {
#pragma unroll
    for (int j = 1; j <= kBack; ++j) out[kBack - j] = row[slot_of(four * 4 - j)];
  }
  if constexpr (kAhead > 0) out[kBack + 4] = row[four * 4 + 4];
}

// What a lane reads of a channel's four positions, and of those beside them.
template <int kMethod, class T>
struct RowFour {
  static constexpr int kBack = back_of(kMethod), kAhead = ahead_of(kMethod);
  T d[4], g[4], own[4], other[4], u[kBack + 4 + kAhead];  // own, other: of Uneven
  T d_before, g_before, other_before;
  int last;  // which one is the last of all; above 3: none
  bool is_first;

  __device__ __forceinline__ Uneven<T> uneven(int i) const {
    if constexpr (neighbour_of(kMethod) == 0) return {};
    return {own[i], other[i]};
  }

  // `u_behind`: that of the position behind; it may have been written over.
  template <class Of>
  __device__ __forceinline__ void read(const T* row, int four, T u_behind) {
    using At = Arrays<kMethod, Of::kPanels>;
    const int before = slot_of(four * 4 - 1);
    const T* from = row + four * 4;
    read_quad(from + At::kSteps * Of::kArray, d);
    read_quad(from + At::kGradients * Of::kArray, g);
    read_window<kBack, 0>(row + At::kInputs * Of::kArray, four, u);
    if constexpr (kAhead > 0) {
      u[kBack + 4] = u_behind;
      d_before = row[At::kSteps * Of::kArray + before];
      g_before = row[At::kGradients * Of::kArray + before];
      other_before = T(1);
    }
    if constexpr (neighbour_of(kMethod) != 0) {
      read_quad(from + At::kOwn * Of::kArray, own);
      read_quad(from + At::kOther * Of::kArray, other);
      if constexpr (kAhead > 0) other_before = row[At::kOther * Of::kArray + before];
    }
  }
  // What a step's bend pushes to the neighbour's sample and takes from the own one.
  __device__ __forceinline__ Uneven<T> pushed(int i) const {
    if constexpr (neighbour_of(kMethod) != 0) return uneven(i);
    return {T(1), kAhead > 0 && i == last ? T(0) : T(1)};
  }
};

// ---- B and C ----

// A tile of a variable matrix for states n0 ..., with kBack positions before it and kAhead behind. Every thread of the
// block must call.
template <class Of, class Scalar, class V, int kBack, int kAhead>
__device__ __forceinline__ void fill_matrix(const void* matrix, const Problem& p,
                                            const Place& place, int n0, int first, V* tile) {
  constexpr int kBeside = kBack + kAhead, kParts = is_complex_type<V> ? 2 : 1;
#pragma unroll
  for (int k = 0; k < Of::kMatrixItems; ++k) {
    const MatrixItem<Of> item(k);
    if (!item.exists()) continue;
    V values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = number<V>(0);
    if (n0 + item.state < p.states) {
      const Scalar* row = matrix_row<V, Scalar>(matrix, p, place, n0 + item.state);
      prefetch(row + kParts * memory_of_one(p, first + item.four * 4 - Of::kTile));
      numbers_of(load_four<kParts>(row, first + item.four * 4, p), p, values);
    }
    write_quad(tile + item.slot(), values);
  }
  if constexpr (kBeside > 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < Of::kPadded * kBeside; i += Of::kThreads) {
      const int state = i / kBeside, beside = i % kBeside;
      const int at = beside < kBack ? -1 - beside : Of::kTile;
      V value = number<V>(0);
      if (n0 + state < p.states) {
        value = matrix_at<V>(matrix_row<V, Scalar>(matrix, p, place, n0 + state),
                             memory_of_one(p, first + at));
      }
      tile[state * Of::kPitch + slot_of(at)] = value;
    }
  }
}

// Four neighbouring positions of a gradient that all channels of a group share.
template <class V>
__device__ __forceinline__ void write_shared(V* row, int first, const Problem& p, bool adds,
                                             const V* values) {
  using T = Real<V>;
  constexpr int kParts = is_complex_type<V> ? 2 : 1;
  V four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = select(p.reverse != 0, values[3 - i], values[i]);
  const int begin = memory_of(p, first);
  T* to = reinterpret_cast<T*>(row + begin);
  const T* numbers = reinterpret_cast<const T*>(four);
  if (adds && is_pack(p, begin)) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) add_atomically<4>(to + 4 * i, T(1), numbers + 4 * i);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4 * kParts; ++i) {
    if (u32(begin + i / kParts) >= u32(p.length)) continue;
    if (adds) {
      atomicAdd(to + i, numbers[i]);
    } else {
      to[i] = numbers[i];
    }
  }
}

template <class V>
__device__ __forceinline__ void add_number(V* to, V value) {
  using T = Real<V>;
  const T* numbers = reinterpret_cast<const T*>(&value);
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i) {
    atomicAdd(reinterpret_cast<T*>(to) + i, numbers[i]);
  }
}

// Sums what the warps have left of the gradients of B and C of states n0 ... and sends it to memory. Every thread of the
// block must call, after a barrier.
template <class Of, class V>
__device__ __forceinline__ void write_matrix_gradients(const BackwardArgs& args, const Place& place,
                                                       const V* kept, int n0, int first) {
  const Problem& p = args.problem;
  const i64 part = args.adds ? 0 : place.panel;
  const i64 group = (part * p.batch * p.groups + place.group) * p.states;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * Of::kPadded * Of::kFours; i += Of::kThreads) {
    const int matrix = i / (Of::kPadded * Of::kFours), state = i / Of::kFours % Of::kPadded;
    const int four = i % Of::kFours;
    const int position = first + four * 4;
    if ((matrix == 0 ? p.constant_B : p.constant_C) || n0 + state >= p.states ||
        position >= p.length) {
      continue;
    }
    const V* from = kept + (four + 1) * Of::kFourPitch + (matrix * Of::kPadded + state) * 4;
    V sum[4];
    sum_quads<Of::kWarps>(from, Of::kOfWarp, sum);
    V* to = static_cast<V*>(matrix == 0 ? args.grad_B : args.grad_C);
    write_shared(to + (group + n0 + state) * p.length, position, p, args.adds, sum);
  }
}

}  // namespace torchkiln::selective_scan_backward
