// What the backward of selective_scan is made of on the GPU: a warp scans one channel, 32 * kItems positions at a time;
// its lanes hold kItems neighbouring positions each. The warps of a block are channels of one group, and share tiles of
// B and C in shared memory.
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

// ---- lanes ----

template <class T>
__device__ __forceinline__ T shuffle_up(T x, int lanes) {
  return __shfl_up_sync(kAllLanes, x, lanes);
}
template <class T>
__device__ __forceinline__ Complex<T> shuffle_up(Complex<T> x, int lanes) {
  return {shuffle_up(x.re, lanes), shuffle_up(x.im, lanes)};
}
template <class T>
__device__ __forceinline__ T shuffle_down(T x, int lanes) {
  return __shfl_down_sync(kAllLanes, x, lanes);
}
template <class T>
__device__ __forceinline__ Complex<T> shuffle_down(Complex<T> x, int lanes) {
  return {shuffle_down(x.re, lanes), shuffle_down(x.im, lanes)};
}
using torchkiln::warp_sum;
template <class T>
__device__ __forceinline__ Complex<T> warp_sum(Complex<T> x) {
  return {warp_sum(x.re), warp_sum(x.im)};
}

// x -> product * x + sum.
template <class V>
struct Affine {
  V product, sum;
  __device__ __forceinline__ V operator()(V x) const { return product * x + sum; }
};

// Each lane's map after those of all lanes before it.
template <class V>
__device__ __forceinline__ Affine<V> scan_up(Affine<V> map, int lane) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Affine<V> before = {shuffle_up(map.product, step), shuffle_up(map.sum, step)};
    if (lane >= step) map = {map.product * before.product, map(before.sum)};
  }
  return map;
}
// Each lane's map after those of all lanes behind it.
template <class V>
__device__ __forceinline__ Affine<V> scan_down(Affine<V> map, int lane) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Affine<V> behind = {shuffle_down(map.product, step), shuffle_down(map.sum, step)};
    if (lane + step < kWarpSize) map = {map.product * behind.product, map(behind.sum)};
  }
  return map;
}

// ---- positions ----

// The channel that a warp scans. Warps behind the last channel of a group repeat it and write nothing.
struct Place {
  i64 batch, channel, group, panel;
  bool is_row;
  __device__ __forceinline__ i64 row(const Problem& p) const { return batch * p.dim + channel; }
};

template <int kWarps>
__device__ __forceinline__ Place place_of(const Problem& p, i64 block) {
  const i64 channels = p.dim / p.groups, panels = (channels + kWarps - 1) / kWarps;
  const i64 panel = block % panels, of_group = block / panels;
  const i64 local = panel * kWarps + threadIdx.x / kWarpSize;
  const i64 group = of_group % p.groups;
  return {of_group / p.groups, group * channels + min_of(local, channels - 1), group, panel,
          local < channels};
}

// Where a position lies in memory; positions beyond the ends are those at the ends.
__device__ __forceinline__ i64 memory_of(const Problem& p, i64 position) {
  const i64 inside = max_of(i64(0), min_of(position, p.length - 1));
  return p.reverse ? p.length - 1 - inside : inside;
}

// Places in memory of positions from `first` on, which may lie beyond the end; those beyond it are the last one.
struct Walk {
  i64 begin;
  int direction, last;
  __device__ __forceinline__ Walk(const Problem& p, i64 first)
      : begin(p.reverse ? p.length - 1 - first : first),
        direction(p.reverse ? -1 : 1),
        last(int(min_of(p.length - 1 - first, i64(1) << 20))) {}
  __device__ __forceinline__ i64 inside(int i) const { return begin + direction * min_of(i, last); }
};

template <class Scalar>
__device__ __forceinline__ const Scalar* row_of(const Rows& rows, const Place& place) {
  return static_cast<const Scalar*>(rows.data) + place.batch * rows.batch +
         place.channel * rows.channel;
}

template <class Scalar>
__device__ constexpr int pack_of(int items) {
  return items < 16 / int(sizeof(Scalar)) ? items : 16 / int(sizeof(Scalar));
}

// kCount neighbouring positions in one go or one by one.
template <int kCount, class Scalar, class T>
__device__ __forceinline__ void load_items(const Scalar* row, i64 first, const Problem& p, T* out) {
  constexpr int kPack = pack_of<Scalar>(kCount);
  if (p.aligned && first + kCount <= p.length) {
    const Scalar* from = row + (p.reverse ? p.length - first - kCount : first);
    T items[kCount];
#pragma unroll
    for (int q = 0; q < kCount; q += kPack) {
      const auto pack = load_pack<kPack>(from + q);
#pragma unroll
      for (int i = 0; i < kPack; ++i) items[q + i] = load(pack.at[i]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = p.reverse ? items[kCount - 1 - i] : items[i];
    return;
  }
  const Walk walk(p, first);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = load(row[walk.inside(i)]);
}

template <int kCount, class Scalar, class T>
__device__ __forceinline__ void store_items(Scalar* row, i64 first, const Problem& p,
                                            const T* values) {
  constexpr int kPack = pack_of<Scalar>(kCount);
  if (p.aligned && first + kCount <= p.length) {
    Scalar* to = row + (p.reverse ? p.length - first - kCount : first);
#pragma unroll
    for (int q = 0; q < kCount; q += kPack) {
      Pack<Scalar, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const T value = p.reverse ? values[kCount - 1 - q - i] : values[q + i];
        store(pack.at[i], value);
      }
      store_pack(to + q, pack);
    }
    return;
  }
  const Walk walk(p, first);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i <= walk.last) store(row[walk.inside(i)], values[i]);
  }
}

// ---- tiles of B and C ----

template <class V>
constexpr int kTileStates = tile_states(is_complex_type<V>);

// The positions of a chunk for each state of the tile, in fours: the fours of neighbouring lanes are neighbours, so that
// no two lanes meet in a bank. Behind them the samples just outside.
template <int kItems>
struct Layout {
  static constexpr int kChunk = kWarpSize * kItems, kSlots = tile_slots(kChunk);
  __device__ __forceinline__ static int slot(int position) {
    if (position < 0 || position == kChunk) return position < 0 ? kChunk - position : kChunk;
    return ((position % kItems) / 4 * kWarpSize + position / kItems) * 4 + position % 4;
  }
};

// One number of B or C from memory.
template <class V, class Scalar>
__device__ __forceinline__ V matrix_at(const Scalar* row, i64 index) {
  if constexpr (is_complex_type<V>) {
    return {load(row[2 * index]), load(row[2 * index + 1])};
  } else {
    return load(row[index]);
  }
}

// Four neighbouring positions.
template <class V, class Scalar>
__device__ __forceinline__ void load_four(const Scalar* row, i64 first, const Problem& p, V* out) {
  if (!is_complex_type<V> && p.aligned && first + 4 <= p.length) {
    Real<V> items[4];
    load_items<4>(row, first, p, items);
    for (int i = 0; i < 4; ++i) out[i] = number<V>(items[i]);
    return;
  }
  const Walk walk(p, first);
  for (int i = 0; i < 4; ++i) out[i] = matrix_at<V>(row, walk.inside(i));
}

// Fills a tile with states n0 ... of one batch and group from position `first` on. Every thread of the block must call.
template <class Scalar, class V, int kItems, int kThreads, bool kHalo>
__device__ __forceinline__ void fill_tile(V* tile, const void* matrix, const Problem& p,
                                          const Place& place, int n0, i64 first) {
  using Of = Layout<kItems>;
  constexpr int kParts = is_complex_type<V> ? 2 : 1, kFours = Of::kChunk / 4;
  const int count = min_of(kTileStates<V>, int(p.states) - n0);
  const Scalar* from = static_cast<const Scalar*>(matrix) +
                       ((place.batch * p.groups + place.group) * p.states + n0) * p.length * kParts;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * kFours; i += kThreads) {
    const int state = i / kFours, position = i % kFours * 4;
    V four[4];
    load_four(from + state * p.length * kParts, first + position, p, four);
    V* to = tile + state * Of::kSlots + Of::slot(position);
    for (int j = 0; j < 4; ++j) to[j] = four[j];
  }
  if constexpr (kHalo) {
    for (int i = threadIdx.x; i < count * 3; i += kThreads) {
      const int state = i / 3, position = i % 3 == 2 ? Of::kChunk : -1 - i % 3;
      tile[state * Of::kSlots + Of::slot(position)] =
          matrix_at<V>(from + state * p.length * kParts, memory_of(p, first + position));
    }
  }
}

// A state's numbers of B or C for the positions of a lane, and some beside them.
template <int kItems, int kLeft, int kRight, class V>
struct Samples {
  V at[kLeft + kItems + kRight];
  __device__ __forceinline__ V& operator[](int i) { return at[i + kLeft]; }
  __device__ __forceinline__ const V& operator[](int i) const { return at[i + kLeft]; }

  __device__ __forceinline__ void read(const V* row, int lane) {
    using Of = Layout<kItems>;
#pragma unroll
    for (int i = 0; i < kItems; ++i) at[i + kLeft] = row[(i / 4 * kWarpSize + lane) * 4 + i % 4];
#pragma unroll
    for (int i = 1; i <= kLeft; ++i) at[kLeft - i] = row[Of::slot(lane * kItems - i)];
#pragma unroll
    for (int i = 0; i < kRight; ++i) {
      at[kLeft + kItems + i] = row[Of::slot(lane * kItems + kItems + i)];
    }
  }
  __device__ __forceinline__ void fill(V value) {
#pragma unroll
    for (int i = 0; i < kLeft + kItems + kRight; ++i) at[i] = value;
  }
};

// ---- steps and samples of a lane ----

template <int kMethod, int kItems, int kLeft, class T>
struct Steps {
  static constexpr int kRight = ahead_of(kMethod), kNeighbour = neighbour_of(kMethod);
  T d[kItems];  // 0 beyond the end: such a step changes nothing
  T ratio[kNeighbour == 0 ? 1 : kItems];
  Samples<kItems, kLeft, kRight, T> u;

  __device__ __forceinline__ T ratio_at(int i) const {
    return kNeighbour == 0 ? T(1) : ratio[kNeighbour == 0 ? 0 : i];
  }
};

template <class T>
__device__ __forceinline__ T step_of(T delta, T bias, bool softplus) {
  return softplus ? softplus_of(delta + bias) : delta + bias;
}

template <class Scalar, int kMethod, int kItems, int kLeft>
__device__ __forceinline__ void load_steps(const Problem& p, const Place& place, i64 first,
                                           Steps<kMethod, kItems, kLeft, Acc<Scalar>>& s) {
  using T = Acc<Scalar>;
  constexpr int kNeighbour = neighbour_of(kMethod), kRight = ahead_of(kMethod);
  const Scalar* u = row_of<Scalar>(p.u, place);
  const Scalar* delta = row_of<Scalar>(p.delta, place);
  const T bias = p.delta_bias ? static_cast<const T*>(p.delta_bias)[place.channel] : T(0);
  load_items<kItems>(u, first, p, s.u.at + kLeft);
#pragma unroll
  for (int i = 1; i <= kLeft; ++i) s.u[-i] = load(u[memory_of(p, first - i)]);
#pragma unroll
  for (int i = 0; i < kRight; ++i) s.u[kItems + i] = load(u[memory_of(p, first + kItems + i)]);
  load_items<kItems>(delta, first, p, s.d);
#pragma unroll
  for (int i = 0; i < kItems; ++i) s.d[i] = step_of(s.d[i], bias, p.softplus);
  if constexpr (kNeighbour != 0) {
    const i64 beside = kNeighbour > 0 ? first + kItems : first - 1;
    const T other = step_of(T(load(delta[memory_of(p, beside)])), bias, p.softplus);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int j = i + kNeighbour;
      s.ratio[i] = (j < 0 || j == kItems ? other : s.d[j < 0 ? 0 : j % kItems]) / s.d[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!place.is_row || first + i >= p.length) s.d[i] = T(0);
  }
}

// sum_j w_j v_{i+j}.
template <int kMethod, class V, class AnySamples>
__device__ __forceinline__ V held_of(const V* weight, const AnySamples& v, int i) {
  if constexpr (kMethod == kMamba) {
    return v[i];
  } else {
    V sum = weight[0] * v[i - back_of(kMethod)];
#pragma unroll
    for (int j = 1; j < taps_of(kMethod); ++j) sum = sum + weight[j] * v[i - back_of(kMethod) + j];
    return sum;
  }
}

// alpha and d * (what is held) of each position of a lane; the map of the whole lane.
template <int kMethod, int kItems, int kLeft, class V, class T, class AnySamples>
__device__ __forceinline__ Affine<V> lane_map(const Steps<kMethod, kItems, kLeft, T>& s,
                                              const AnySamples& v, V a, V* alpha, V* input) {
  Affine<V> map = {number<V>(T(1)), number<V>(T(0))};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const auto c = coefficients<kMethod>(s.d[i], a, s.ratio_at(i));
    alpha[i] = c.alpha;
    input[i] = s.d[i] * held_of<kMethod>(c.weight, v, i);
    map = {c.alpha * map.product, c.alpha * map.sum + input[i]};
  }
  return map;
}

}  // namespace torchkiln::selective_scan
