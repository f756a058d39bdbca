// What kernels of selective_scan share that go through positions one after the other: a channel belongs to kLanes lanes
// of a warp, each of which keeps kStates states in registers. A block goes through kTile positions at a time: each warp
// lays the steps and inputs of its own channels into shared memory, all warps together B and C. Everything lies there as
// rows of neighbouring positions, in fours of which a lane reads one at once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "scan/selective_scan.h"
#include "scan/selective_scan_shared.h"

namespace torchkiln::selective_scan {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T, bool kComplex>
struct StateOf {
  using Type = T;
};
template <class T>
struct StateOf<T, true> {
  using Type = Complex<T>;
};
template <class Scalar, bool kComplex>
using State = typename StateOf<Acc<Scalar>, kComplex>::Type;

// ---- layout ----

// V is the type of states, kRowBytes what the positions of a tile take of it.
template <class V, int kWarpCount, int kLaneCount, int kStateCount, int kRowBytes>
struct Layout {
  static constexpr int kWarps = kWarpCount, kLanes = kLaneCount, kStates = kStateCount;
  static constexpr int kTile = kRowBytes / int(sizeof(V)), kFours = kTile / 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = kWarpSize / kLanes;  // channels of a warp
  static constexpr int kPadded = kLanes * kStates;  // states that lanes have room for
  // Numbers from one row to the next: of B and C, and of what has the shape of u.
  static constexpr int kMatrixPitch = pitch_of(kTile, sizeof(V));
  static constexpr int kRowPitch = pitch_of(kTile, sizeof(Real<V>));
  // Fours that a lane takes of each row tensor, and a thread of each matrix.
  static constexpr int kRowItems = (kRows * kFours + kWarpSize - 1) / kWarpSize;
  static constexpr int kMatrixItems = (kPadded * kFours + kThreads - 1) / kThreads;
};

// The channels of a warp. Those behind the last one of the group repeat it and write nothing.
struct Place {
  int batch, group, panel, channel;  // group: counted over all batches
  int last;                          // of the rows that are channels; below 0 where none is

  __device__ __forceinline__ bool has(int row) const { return row <= last; }
  __device__ __forceinline__ int channel_of(int row) const { return channel + min_of(row, last); }
  __device__ __forceinline__ i64 row_of(const Problem& p, int row) const {
    return i64(batch) * p.dim + channel_of(row);
  }
};

// Of a group.
template <class Of>
__device__ __forceinline__ u32 panels_of(const Problem& p) {
  constexpr u32 kChannels = Of::kWarps * Of::kRows;
  return (u32(p.dim) / u32(p.groups) + kChannels - 1) / kChannels;
}

template <class Of>
__device__ __forceinline__ Place place_of(const Problem& p, u32 block, u32 panels) {
  const u32 channels = u32(p.dim) / u32(p.groups);
  const u32 of_group = block / panels, batch = of_group / u32(p.groups);
  const int panel = int(block - of_group * panels), group = int(of_group - batch * u32(p.groups));
  const int local = (panel * Of::kWarps + int(threadIdx.x) / kWarpSize) * Of::kRows;
  return {int(batch), int(of_group), panel, group * int(channels) + local,
          min_of(int(channels) - 1 - local, Of::kRows - 1)};
}

// ---- fours ----

// Numbers from a four of B or C to the next one.
constexpr int kFour = 4;

// Four neighbouring numbers in shared memory.
template <class V>
struct alignas(16) Quad {
  V at[4];
};
template <class V>
__device__ __forceinline__ void read_quad(const V* from, V* out) {
  const Quad<V> quad = *reinterpret_cast<const Quad<V>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = quad.at[i];
}
// The sums of four numbers over kParts parts, `pitch` apart, in order.
template <int kParts, class V>
__device__ __forceinline__ void sum_quads(const V* from, int pitch, V* sum) {
  read_quad(from, sum);
#pragma unroll
  for (int part = 1; part < kParts; ++part) {
    V more[4];
    read_quad(from + part * pitch, more);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = sum[i] + more[i];
  }
}
template <class V>
__device__ __forceinline__ void write_quad(V* to, const V* values) {
  Quad<V> quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.at[i] = values[i];
  *reinterpret_cast<Quad<V>*>(to) = quad;
}

// Four neighbouring positions as they lie in memory, of kParts scalars each. Nothing waits for them before they are read.
template <class Scalar, int kParts>
struct Four {
  static constexpr int kCount = 4 * kParts;
  static constexpr int kPack =
      kCount < 16 / int(sizeof(Scalar)) ? kCount : 16 / int(sizeof(Scalar));
  Pack<Scalar, kPack> packs[kCount / kPack];

  __device__ __forceinline__ const Scalar& at(int i) const {
    return packs[i / kPack].at[i % kPack];
  }
  __device__ __forceinline__ Scalar& at(int i) { return packs[i / kPack].at[i % kPack]; }
};

// Where the four positions from `first` on begin in memory.
__device__ __forceinline__ int memory_of(const Problem& p, int first) {
  return p.reverse ? int(p.length) - 4 - first : first;
}
// Whether they may be read and written at once.
__device__ __forceinline__ bool is_pack(const Problem& p, int begin) {
  return p.aligned && begin >= 0 && begin + 4 <= int(p.length);
}
// The same for all fours of a tile, which a block goes by.
template <class Of>
__device__ __forceinline__ bool is_whole(const Problem& p, int first) {
  return p.aligned && first + Of::kTile <= int(p.length);
}
__device__ __forceinline__ int inside_of(const Problem& p, int begin) {
  return max_of(0, min_of(begin, int(p.length) - 1));
}

// The four from `begin` on in memory. Positions beyond the ends are those at the ends.
template <int kParts, class Scalar>
__device__ __forceinline__ Four<Scalar, kParts> load_four(const Scalar* row, int begin,
                                                          const Problem& p, bool is_pack) {
  using Result = Four<Scalar, kParts>;
  Result four;
  if (is_pack) {
    const Scalar* from = row + i64(begin) * kParts;
#pragma unroll
    for (int q = 0; q < Result::kCount; q += Result::kPack) {
      four.packs[q / Result::kPack] = load_pack<Result::kPack>(from + q);
    }
    return four;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Scalar* from = row + i64(inside_of(p, begin + i)) * kParts;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      four.at(i * kParts + part) = load_pack<1>(from + part).at[0];
    }
  }
  return four;
}
// That of the scan's positions from `first` on.
template <int kParts, class Scalar>
__device__ __forceinline__ Four<Scalar, kParts> load_four(const Scalar* row, int first,
                                                          const Problem& p) {
  const int begin = memory_of(p, first);
  return load_four<kParts>(row, begin, p, is_pack(p, begin));
}

// As numbers in the order of the scan.
template <class V, class Scalar, int kParts>
__device__ __forceinline__ void numbers_of(const Four<Scalar, kParts>& four, const Problem& p,
                                           V* out) {
  V values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (is_complex_type<V>) {
      values[i] = {load(four.at(2 * i)), load(four.at(2 * i + 1))};
    } else {
      values[i] = load(four.at(i));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = select(p.reverse != 0, values[3 - i], values[i]);
}

template <class Scalar, class T>
__device__ __forceinline__ void store_four(Scalar* row, int begin, const Problem& p, bool is_pack,
                                           const T* values) {
  Four<Scalar, 1> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) store(four.at(i), p.reverse ? values[3 - i] : values[i]);
  Scalar* to = row + begin;
  if (is_pack) {
    constexpr int kPack = Four<Scalar, 1>::kPack;
#pragma unroll
    for (int q = 0; q < 4; q += kPack) store_pack(to + q, four.packs[q / kPack]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (u32(begin + i) < u32(p.length)) to[i] = four.at(i);
  }
}
template <class Scalar, class T>
__device__ __forceinline__ void store_four(Scalar* row, int first, const Problem& p,
                                           const T* values) {
  const int begin = memory_of(p, first);
  store_four(row, begin, p, is_pack(p, begin), values);
}

// Where one position lies in memory; those beyond the ends are those at the ends.
__device__ __forceinline__ int memory_of_one(const Problem& p, int position) {
  const int inside = inside_of(p, position);
  return p.reverse ? int(p.length) - 1 - inside : inside;
}

// ---- rows: u, delta, z and what has their shape ----

// The four of a lane's item: a row of its warp, and a place in the tile. Of a layout with few rows some lanes have none.
template <class Of>
struct RowItem {
  int row, four;
  __device__ __forceinline__ explicit RowItem(int item) {
    const int index = item * kWarpSize + int(threadIdx.x) % kWarpSize;
    row = index / Of::kFours;
    four = index % Of::kFours;
  }
  __device__ __forceinline__ bool exists() const {
    return Of::kRows * Of::kFours % kWarpSize == 0 || row < Of::kRows;
  }
  __device__ __forceinline__ int slot() const { return row * Of::kRowPitch + four * 4; }
};

template <class Scalar>
__device__ __forceinline__ const Scalar* row_begin(const Rows& rows, const Place& place, int row) {
  return static_cast<const Scalar*>(rows.data) + place.batch * rows.batch +
         place.channel_of(row) * rows.channel;
}

// Where the rows of a lane's fours begin.
template <class Of, class Scalar>
struct RowSources {
  Scalar* at[Of::kRowItems];

  __device__ __forceinline__ RowSources(Scalar* data, i64 batch, i64 channel, const Place& place) {
#pragma unroll
    for (int k = 0; k < Of::kRowItems; ++k) {
      at[k] =
          worked_out(data + place.batch * batch + place.channel_of(RowItem<Of>(k).row) * channel);
    }
  }
  __device__ __forceinline__ RowSources(const Rows& rows, const Place& place)
      : RowSources(static_cast<Scalar*>(rows.data), rows.batch, rows.channel, place) {}
};

// A lane's fours of a row tensor in the tile that begins at `first`.
template <class Of, class Scalar>
struct RowFours {
  Four<Scalar, 1> at[Of::kRowItems];

  __device__ __forceinline__ void load(const RowSources<Of, const Scalar>& rows, const Problem& p,
                                       int first, bool whole) {
#pragma unroll
    for (int k = 0; k < Of::kRowItems; ++k) {
      const RowItem<Of> item(k);
      if (!item.exists()) continue;
      at[k] = load_four<1>(rows.at[k], memory_of(p, first + item.four * 4), p, whole);
    }
  }
};

// One scalar beside each of a lane's fours from the one numbered `least` on.
template <class Of, class Scalar>
struct RowScalars {
  Scalar at[Of::kRowItems];

  // `first`: the one beside the tile's first four.
  __device__ __forceinline__ void load(const RowSources<Of, const Scalar>& rows, const Problem& p,
                                       int first, int least = 0) {
#pragma unroll
    for (int k = 0; k < Of::kRowItems; ++k) {
      const RowItem<Of> item(k);
      if (!item.exists() || item.four < least) continue;
      at[k] = rows.at[k][memory_of_one(p, first + item.four * 4)];
    }
  }
};

// A weight for each of a lane's fours; 0 where there are none.
template <class Of, class T>
struct RowWeights {
  T at[Of::kRowItems];
  __device__ __forceinline__ RowWeights(const void* weights, const Place& place) {
#pragma unroll
    for (int k = 0; k < Of::kRowItems; ++k) {
      at[k] = weights != nullptr
                  ? static_cast<const T*>(weights)[place.channel_of(RowItem<Of>(k).row)]
                  : T(0);
    }
  }
};

template <class T>
__device__ __forceinline__ T step_of(T delta, T bias, bool softplus) {
  return softplus ? softplus_of(delta + bias) : delta + bias;
}
// Four of them, out of deltas: with one branch, so that they are worked out side by side.
template <class T>
__device__ __forceinline__ void steps_of(T* d, T bias, bool softplus) {
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += bias;
  if (!softplus) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = softplus_of(d[i]);
}

// Steps times it have quick reciprocals, subnormal ones too.
constexpr int kLift = 1 << 24;
// x / step.
template <class T>
__device__ __forceinline__ T in_steps(T x, T step) {
  return (kLift * x) * quick_reciprocal(kLift * step);
}
// Out of a step and its neighbour.
template <class T>
__device__ __forceinline__ Uneven<T> uneven_of(T step, T neighbour) {
  const T inverse = in_steps(step, neighbour);
  const T own = add_times(T(2), T(-2), quick_reciprocal(T(1) + inverse));
  return {own, own * inverse};
}
// That of four steps, and of the one beside them on their neighbours' side.
template <int kNeighbour, class T>
__device__ __forceinline__ void uneven_of_four(const T* d, T beside, T* own, T* other) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = i + kNeighbour;
    const Uneven<T> uneven = uneven_of(d[i], j < 0 || j == 4 ? beside : d[j & 3]);
    own[i] = uneven.own;
    other[i] = uneven.other;
  }
}

// What the recurrence of a warp's channels takes from u and delta: rows of d, of u (or d * u where kScaled), and where
// steps are not equal of what Uneven has.
template <class Of, class Scalar, int kMethod, bool kScaled>
struct Steps {
  using T = Acc<Scalar>;
  static constexpr int kNeighbour = neighbour_of(kMethod);
  static constexpr int kArray = Of::kRows * Of::kRowPitch;
  static constexpr int kNumbers = step_arrays(kMethod) * kArray + kBehind;

  const RowSources<Of, const Scalar> of_u, of_delta;
  RowFours<Of, Scalar> u, delta;
  // delta and u behind each four.
  RowScalars<Of, Scalar> delta_behind, behind;
  T last[Of::kRowItems];  // of each four in the tile before

  // `first`: of all tiles.
  __device__ __forceinline__ Steps(const Problem& p, const Place& place,
                                   const RowWeights<Of, T>& bias, int first)
      : of_u(p.u, place), of_delta(p.delta, place) {
    if constexpr (kNeighbour < 0) {
      const int at = memory_of_one(p, first - 1);
#pragma unroll
      for (int k = 0; k < Of::kRowItems; ++k) {
        last[k] = step_of(T(torchkiln::load(of_delta.at[k][at])), bias.at[k], p.softplus);
      }
    }
  }

  __device__ __forceinline__ void load(const Problem& p, int first, bool whole) {
    u.load(of_u, p, first, whole);
    delta.load(of_delta, p, first, whole);
    if constexpr (kNeighbour > 0) delta_behind.load(of_delta, p, first + 4);
    if constexpr (ahead_of(kMethod) > 0) behind.load(of_u, p, first + 4, Of::kFours - 1);
  }

  // The step beside a four on its neighbour's side. That before it has another lane, the last four's for the first one.
  __device__ __forceinline__ T beside(const Problem& p, const RowItem<Of>& item, int k, T bias,
                                      const T* d) {
    if constexpr (kNeighbour > 0) {
      return step_of(T(torchkiln::load(delta_behind.at[k])), bias, p.softplus);
    } else {
      static_assert(kWarpSize % Of::kFours == 0);
      const int lane = int(threadIdx.x) % kWarpSize;
      const T given = item.four == Of::kFours - 1 ? last[k] : d[3];
      last[k] = d[3];
      return __shfl_sync(kAllLanes, given, item.four == 0 ? lane + Of::kFours - 1 : lane - 1);
    }
  }

  // Into the rows of the warp. Steps beyond the end are 0 and change nothing.
  __device__ __forceinline__ void write(const Problem& p, const Place& place,
                                        const RowWeights<Of, T>& bias, int first, T* rows) {
#pragma unroll
    for (int k = 0; k < Of::kRowItems; ++k) {
      const RowItem<Of> item(k);
      // Lanes that have none take part in what others exchange.
      if (kNeighbour >= 0 && !item.exists()) continue;
      T d[4], x[4], other = T(0);
      numbers_of(delta.at[k], p, d);
      numbers_of(u.at[k], p, x);
      steps_of(d, bias.at[k], p.softplus);
      if constexpr (kNeighbour != 0) other = beside(p, item, k, bias.at[k], d);
      if (!item.exists()) continue;
      if constexpr (kNeighbour != 0) {
        T of_own[4], of_other[4];
        uneven_of_four<kNeighbour>(d, other, of_own, of_other);
        write_quad(rows + 2 * kArray + item.slot(), of_own);
        write_quad(rows + 3 * kArray + item.slot(), of_other);
      }
      const int steps = place.has(item.row) ? int(p.length) - first - item.four * 4 : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d[i] = i < steps ? d[i] : T(0);
        if (kScaled) x[i] *= d[i];
      }
      write_quad(rows + item.slot(), d);
      write_quad(rows + kArray + item.slot(), x);
      if constexpr (ahead_of(kMethod) > 0) {
        if (item.four == Of::kFours - 1) {
          rows[kArray + item.slot() + 4] = torchkiln::load(behind.at[k]);
        }
      }
    }
  }
};

// ---- matrices: B and C ----

// The four of a thread's item: a state and a place in the tile.
template <class Of>
struct MatrixItem {
  int state, four;
  __device__ __forceinline__ explicit MatrixItem(int item) {
    const int index = item * Of::kThreads + int(threadIdx.x);
    state = index / Of::kFours;
    four = index % Of::kFours;
  }
  __device__ __forceinline__ bool exists() const {
    return Of::kPadded * Of::kFours % Of::kThreads == 0 || state < Of::kPadded;
  }
  __device__ __forceinline__ int slot() const { return state * Of::kMatrixPitch + four * 4; }
};

// The row of a state of a variable matrix.
template <class V, class Scalar>
__device__ __forceinline__ const Scalar* matrix_row(const void* matrix, const Problem& p,
                                                    const Place& place, int state) {
  const i64 row = i64(place.group) * p.states + state;
  return static_cast<const Scalar*>(matrix) + row * p.length * (is_complex_type<V> ? 2 : 1);
}
// One number of it.
template <class V, class Scalar>
__device__ __forceinline__ V matrix_at(const Scalar* row, i64 index) {
  if constexpr (is_complex_type<V>) {
    return {load(row[2 * index]), load(row[2 * index + 1])};
  } else {
    return load(row[index]);
  }
}

// A thread's fours of B or C. States beyond the last are 0.
template <class Of, class Scalar, class V, bool kAhead>
struct MatrixFours {
  static constexpr int kParts = is_complex_type<V> ? 2 : 1;
  const Scalar* row;  // of the first one, in memory
  Four<Scalar, kParts> at[Of::kMatrixItems];
  V behind[kAhead ? Of::kMatrixItems : 1];

  __device__ __forceinline__ MatrixFours(const void* matrix, const Problem& p, const Place& place)
      : row(worked_out(matrix_row<V, Scalar>(matrix, p, place, MatrixItem<Of>(0).state))) {}

  __device__ __forceinline__ void load(const Problem& p, int first, bool whole) {
#pragma unroll
    for (int k = 0; k < Of::kMatrixItems; ++k) {
      const MatrixItem<Of> item(k);
      if (item.state >= p.states) continue;
      const Scalar* own = row + i64(item.state - MatrixItem<Of>(0).state) * p.length * kParts;
      at[k] = load_four<kParts>(own, memory_of(p, first + item.four * 4), p, whole);
      if constexpr (kAhead) {
        if (item.four == Of::kFours - 1) {
          behind[k] = matrix_at<V>(own, memory_of_one(p, first + Of::kTile));
        }
      }
    }
  }

  __device__ __forceinline__ void write(const Problem& p, V* rows) const {
#pragma unroll
    for (int k = 0; k < Of::kMatrixItems; ++k) {
      const MatrixItem<Of> item(k);
      if (!item.exists()) continue;
      const bool is_state = item.state < p.states;
      V values[4];
      numbers_of(at[k], p, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = select(is_state, values[i], number<V>(0));
      write_quad(rows + item.slot(), values);
      if constexpr (kAhead) {
        if (item.four == Of::kFours - 1) {
          rows[item.slot() + 4] = select(is_state, behind[k], number<V>(0));
        }
      }
    }
  }
};

// ---- the lanes of a channel ----

// A lane has states part, part + kLanes, ... of the channel of a row of its warp.
template <class Of>
struct Lane {
  int row, part;
  __device__ __forceinline__ Lane()
      : row(int(threadIdx.x) % kWarpSize / Of::kLanes), part(int(threadIdx.x) % Of::kLanes) {}
  __device__ __forceinline__ int state(int s) const { return s * Of::kLanes + part; }
};

// The longest step with which all z = d a of a lane's channel lie in [kNear, 0]; `a_of(s)` is the rate of one of the lane's
// states. Every lane of the warp must call.
template <class Of, class F>
__device__ __forceinline__ float longest_near(const F& a_of) {
  float least = -1e-30f, greatest = 0.0f;
#pragma unroll
  for (int s = 0; s < Of::kStates; ++s) {
    least = min_of(least, a_of(s));
    greatest = max_of(greatest, a_of(s));
  }
#pragma unroll
  for (int mask = Of::kLanes / 2; mask > 0; mask /= 2) {
    least = min_of(least, __shfl_xor_sync(kAllLanes, least, mask));
    greatest = max_of(greatest, __shfl_xor_sync(kAllLanes, greatest, mask));
  }
  return greatest > 0.0f ? 0.0f : kNear / least;
}

// Whether steps lie in [0, longest]: as unsigned numbers, negative ones and NaN are above all others.
template <int kCount>
__device__ __forceinline__ bool are_within(const float* d, float longest) {
  u32 greatest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) greatest = max_of(greatest, float_bits(d[i]));
  return greatest <= float_bits(longest);
}

// work(is_whole). Of the quadratic rules, which are bound by issued instructions, with a branch: predicated, the other way
// would be issued, too.
template <class Of, int kMethod, class F>
__device__ __forceinline__ void whole_or_not(const Problem& p, int first, const F& work) {
  const bool whole = is_whole<Of>(p, first);
  if constexpr (taps_of(kMethod) > 2) {
    if (whole) return work(true);
    work(false);
  } else {
    work(whole);
  }
}

// work(Truth<whether coefficients near 0 do>).
template <bool kValue>
struct Truth {
  static constexpr bool value = kValue;
};
template <int kMethod, class V, class F>
__device__ __forceinline__ void near_or_far(bool is_near, const F& work) {
  if constexpr (has_near<kMethod, V>) {
    if (is_near) return work(Truth<true>());
  }
  work(Truth<false>());
}

// Numbers from a lane's state to its next one, in the memory of B and C.
template <class Of>
constexpr int slab_of = Of::kLanes * Of::kMatrixPitch;

// Where a lane reads B or C, in numbers from the matrix's memory: four q of state s lies at `at + q * step + s * slab_of`,
// and behind it the position behind that four. (Pointers would no longer be known to be of shared memory.)
struct MatrixReader {
  int at, step;

  template <class Of, class V>
  __device__ __forceinline__ void read(const V* memory, int s, V* out, bool with_behind) const {
    read_quad(memory + at + s * slab_of<Of>, out);
    if (with_behind) out[4] = memory[at + s * slab_of<Of> + 4];
  }
};

// Lays a constant matrix out for its readers: a four for each channel and state, which all positions share. Every thread
// writes what it reads itself.
template <class Of, class V>
__device__ __forceinline__ MatrixReader constant_matrix(const void* matrix, const Problem& p,
                                                        const Place& place, const Lane<Of>& lane,
                                                        V* memory) {
  constexpr int kPitch = pitch_of(4, sizeof(V)), kThreadsOfSlab = slab_of<Of> / kPitch;
  const int slab = int(threadIdx.x) / kThreadsOfSlab * Of::kStates;
  const int at = slab * slab_of<Of> + int(threadIdx.x) % kThreadsOfSlab * kPitch;
  V* own = memory + at;
  const V* weights = static_cast<const V*>(matrix) + i64(place.channel_of(lane.row)) * p.states;
#pragma unroll
  for (int s = 0; s < Of::kStates; ++s) {
    const int n = lane.state(s);
    const V value = n < int(p.states) ? weights[n] : number<V>(0),
            four[4] = {value, value, value, value};
    write_quad(own + s * slab_of<Of>, four);
    own[s * slab_of<Of> + 4] = value;
  }
  return {at, 0};
}

// Numbers of a tile of a variable matrix.
template <class Of>
constexpr int matrix_tile = Of::kPadded * Of::kMatrixPitch + kBehind;

// `tile`: which of them.
template <class Of>
__device__ __forceinline__ MatrixReader variable_matrix(const Lane<Of>& lane, int tile) {
  return {tile * matrix_tile<Of> + lane.part * Of::kMatrixPitch, kFour};
}

// Sums four values over the lanes of each channel. A lane ends up with kKept of the sums, of which the first is
// sums_first(part): a quarter of the lanes with each, or fewer lanes with more.
template <int kLanes>
constexpr int kKeptSums = kLanes >= 4 ? 1 : 4 / kLanes;

template <int kLanes, class T>
__device__ __forceinline__ void sum_over_lanes(T* values, int part) {
  int count = 4;
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    if (count > 1) {
      count /= 2;
      const bool is_upper = (part & mask) != 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= count) break;
        const T given = is_upper ? values[i] : values[i + count];
        const T kept = is_upper ? values[i + count] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, given, mask);
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], mask);
    }
  }
}
template <int kLanes>
__device__ __forceinline__ int sums_first(int part) {
  return part * 4 / kLanes;
}
// Whether a lane is the one of those with the same sums that writes them.
template <int kLanes>
__device__ __forceinline__ bool is_sums_writer(int part) {
  return kLanes <= 4 || part % (kLanes / 4) == 0;
}

}  // namespace torchkiln::selective_scan
