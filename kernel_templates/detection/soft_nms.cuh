// Soft suppression on the GPU: the best box that is left lowers the scores of the others, again and again.
//
//   select  one block for each class: a step is one pass over the scores, which lowers them by the box selected last and
//           finds the best one left, and one barrier. Scores and boxes stay in registers where the class is small enough.
//   rank    with classes only: one block sorts one tile of the selected boxes by score; with one tile, writes the result
//   merge   every box of a tile finds its place among the other tiles
//
// With classes, nms' sort and merge have put the rows in order before. Among equal scores the lower row comes first.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "common/sort.cuh"
#include "detection/nms.h"
#include "detection/soft_nms.h"

namespace torchkiln::soft_nms {

constexpr u32 kAllLanes = ~u32(0);
constexpr u32 kGone = ~u32(0);  // the row of a box that is selected or has fallen too low

template <class Scalar>
using Key = SortKey<sizeof(Acc<Scalar>) / 4>;

// By descending score, then by row.
template <class Scalar>
__device__ __forceinline__ Key<Scalar> key_of(Acc<Scalar> score, u32 row) {
  const auto bits = descending_key(score);
  if constexpr (sizeof(bits) == 8) {
    return {{bits, row}};
  } else {
    return {{u64(bits) << 32 | row}};
  }
}

template <class K>
__device__ __forceinline__ K no_key() {
  K key;
  for (u64& word : key.word) word = ~u64(0);
  return key;
}

template <int kWords>
__device__ __forceinline__ u32 row_of(const SortKey<kWords>& key) {
  return u32(key.word[kWords - 1]);
}

// NaN has the greatest key of all.
template <int kWords>
__device__ __forceinline__ bool is_nan_score(const SortKey<kWords>& key) {
  return kWords == 1 ? u32(key.word[0] >> 32) == ~u32(0) : key.word[0] == ~u64(0);
}

// The score of a key; -0 has become 0.
__device__ __forceinline__ float score_of(const SortKey<1>& key) {
  const u32 bits = u32(key.word[0] >> 32);
  return bits_float(bits & 0x80000000u ? bits : ~bits & 0x7fffffffu);
}
__device__ __forceinline__ double score_of(const SortKey<2>& key) {
  const u64 bits = key.word[0], sign = u64(1) << 63;
  return __longlong_as_double(i64(bits & sign ? bits : ~bits & ~sign));
}

// The least key of the lanes, in all of them.
template <int kWords>
__device__ __forceinline__ SortKey<kWords> warp_least(SortKey<kWords> key) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kWords == 1) {
    const u32 high = u32(key.word[0] >> 32);
    const u32 least = __reduce_min_sync(kAllLanes, high);
    const u32 row = __reduce_min_sync(kAllLanes, high == least ? u32(key.word[0]) : ~u32(0));
    return {{u64(least) << 32 | row}};
  }
#endif
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    SortKey<kWords> other;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      other.word[i] = __shfl_xor_sync(kAllLanes, key.word[i], offset);
    }
    if (other < key) key = other;
  }
  return key;
}

// The box of a row as it takes part: not at all where its score is NaN.
template <class Scalar>
__device__ __forceinline__ Box<Acc<Scalar>> load_part(const Args& args, u32 row, bool nan_score) {
  using T = Acc<Scalar>;
  const T nan = T(0) * T(bits_float(0x7f800000u));
  if (nan_score) return {nan, nan, nan, nan};
  return load_box<Scalar>(args, row);
}

// Copies what is live, at first all places [begin, end), so that the loops below load it without conversions. A thread
// only ever touches its own places.
template <class Scalar, bool kClasses, int kBlockSize>
__device__ __forceinline__ void gather(const Args& args, i64 begin, i64 end) {
  using T = Acc<Scalar>;
#pragma unroll 1
  for (i64 place = begin + threadIdx.x; place < end; place += kBlockSize) {
    const u32 row = kClasses ? args.sorted_rows[place] : u32(place);
    const T score = load(static_cast<const Scalar*>(args.scores)[row]);
    args.live_rows[place] = score < T(args.min_score) ? kGone : row;
    static_cast<T*>(args.live_scores)[place] = score;
    static_cast<Box<T>*>(args.live_boxes)[place] = load_part<Scalar>(args, row, is_nan(score));
  }
}

// A thread's boxes: at places `begin`, `begin` + kBlockSize, ...
template <class T, int kItems, int kBlockSize>
struct Items {
  Box<T> box[kItems];
  T score[kItems];
  u32 row[kItems];

  __device__ __forceinline__ void load(const Args& args, i64 begin, i64 end) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const i64 place = begin + k * kBlockSize + threadIdx.x;
      row[k] = place < end ? args.live_rows[place] : kGone;
      if (row[k] == kGone) continue;
      score[k] = static_cast<const T*>(args.live_scores)[place];
      box[k] = static_cast<const Box<T>*>(args.live_boxes)[place];
    }
  }
  __device__ __forceinline__ void save(const Args& args, i64 begin, i64 end) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const i64 place = begin + k * kBlockSize + threadIdx.x;
      if (place >= end) continue;
      args.live_rows[place] = row[k];
      static_cast<T*>(args.live_scores)[place] = score[k];
    }
  }
};

// The box selected last, as all threads of a class know it.
template <class T>
struct Selected {
  Box<T> box;
  T area;
  u32 row;  // kGone before the first one
};

// Lowers the scores of the items, drops the low ones and the selected one; returns the best that is left.
template <class Scalar, int kItems, int kBlockSize>
__device__ __forceinline__ Key<Scalar> lower(const Args& args,
                                             Items<Acc<Scalar>, kItems, kBlockSize>& items,
                                             const Selected<Acc<Scalar>>& selected) {
  using T = Acc<Scalar>;
  const T threshold = T(args.iou_threshold), min_score = T(args.min_score);
  auto best = no_key<Key<Scalar>>();
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (items.row[k] == kGone) continue;
    if (selected.row != kGone) {
      const T inter = guarded_intersection(selected.box, items.box[k]);
      const T total = (selected.area + guarded_area(items.box[k])) - inter;
      if (is_lowered(args.method, inter, total, threshold)) {
        items.score[k] *= factor(args.method, inter, total, T(args.sigma));
      }
      if (items.row[k] == selected.row || items.score[k] < min_score) {
        items.row[k] = kGone;
        continue;
      }
    }
    const auto key = key_of<Scalar>(items.score[k], items.row[k]);
    if (key < best) best = key;
  }
  return best;
}

// Notes box number `number` of a class; one thread calls.
template <class Scalar, bool kClasses>
__device__ __forceinline__ void note(const Args& args, i64 begin, i64 number,
                                     const Key<Scalar>& key) {
  if (kClasses) {
    static_cast<Key<Scalar>*>(args.selected)[begin + number] = key;
  } else {
    args.indices[number] = row_of(key);
    store(static_cast<Scalar*>(args.out_scores)[number], score_of(key));
  }
}

// Selects among the places [begin, end); returns how many. `shared` has two rows, so that one barrier parts the writes
// of a step from the reads, and the next step's barrier parts those reads from the next writes to the same row.
template <class Scalar, bool kClasses, int kItems, int kBlockSize>
__device__ __forceinline__ i64 select_class(const Args& args, i64 begin, i64 end,
                                            Key<Scalar> (*shared)[kWarpSize], int& parity) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  constexpr i64 kRound = i64(kItems) * kBlockSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool is_resident = end - begin <= kRound;
  const i64 most = min_of(end - begin, args.max_output);
  Items<Acc<Scalar>, kItems, kBlockSize> items;
  Selected<Acc<Scalar>> selected;
  selected.row = kGone;
  gather<Scalar, kClasses, kBlockSize>(args, begin, end);
  i64 step = 0;
#pragma unroll 1
  for (; step < most; ++step) {
    auto best = no_key<Key<Scalar>>();
#pragma unroll 1
    for (i64 round = begin; round < end; round += kRound) {
      if (!is_resident || step == 0) items.load(args, round, end);
      const auto key = lower<Scalar>(args, items, selected);
      if (key < best) best = key;
      if (!is_resident) items.save(args, round, end);
    }
    best = warp_least(best);
    if (lane == 0) shared[parity][warp] = best;
    __syncthreads();
    best = warp_least(lane < kWarps ? shared[parity][lane] : no_key<Key<Scalar>>());
    parity ^= 1;
    if (row_of(best) == kGone) break;
    if (threadIdx.x == 0) note<Scalar, kClasses>(args, begin, step, best);
    selected.row = row_of(best);
    selected.box = load_part<Scalar>(args, selected.row, is_nan_score(best));
    selected.area = guarded_area(selected.box);
  }
  return step;
}

// Where the class that begins at `begin` ends.
__device__ __forceinline__ i64 class_end(const Args& args, i64 begin) {
  i64 low = begin + 1, high = args.n;
#pragma unroll 1
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (args.first[middle] <= begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Scalar, bool kClasses, int kItems, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) select(const Args args) {
  __shared__ Key<Scalar> shared[2][kWarpSize];
  int parity = 0;
  if (!kClasses) {
    const i64 count =
        select_class<Scalar, kClasses, kItems, kBlockSize>(args, 0, args.n, shared, parity);
#pragma unroll 1
    for (i64 i = count + threadIdx.x; i < args.max_output; i += kBlockSize) {
      args.indices[i] = -1;
      store(static_cast<Scalar*>(args.out_scores)[i], Acc<Scalar>(0));
    }
    if (threadIdx.x == 0) *args.count = count;
    return;
  }
  // Every warp finds the same classes.
  const i64 place = i64(blockIdx.x) * kPlaces + threadIdx.x % kWarpSize;
  const bool begins = place < args.n && i64(args.first[min_of(place, args.n - 1)]) == place;
  u32 classes = __ballot_sync(kAllLanes, begins);
#pragma unroll 1
  for (; classes != 0; classes &= classes - 1) {
    const i64 begin = i64(blockIdx.x) * kPlaces + __ffs(classes) - 1;
    const i64 end = class_end(args, begin);
    const i64 count =
        select_class<Scalar, kClasses, kItems, kBlockSize>(args, begin, end, shared, parity);
#pragma unroll 1
    for (i64 i = begin + count + threadIdx.x; i < end; i += kBlockSize) {
      static_cast<Key<Scalar>*>(args.selected)[i] = no_key<Key<Scalar>>();
    }
    if (threadIdx.x == 0) atomicAdd(args.n_selected, u32(count));
  }
}

// Writes the box of a key to its place in the result.
template <class Scalar>
__device__ __forceinline__ void put(const Args& args, const Key<Scalar>& key, i64 place) {
  if (row_of(key) == kGone || place >= args.max_output) return;
  args.indices[place] = row_of(key);
  store(static_cast<Scalar*>(args.out_scores)[place], score_of(key));
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) rank(const Args args) {
  __shared__ Key<Scalar> keys[kTile];
  const i64 begin = i64(blockIdx.x) * kTile;
  const int count = int(min_of(args.n - begin, i64(kTile)));
#pragma unroll 1
  for (int i = threadIdx.x; i < kTile; i += kBlockSize) {
    keys[i] = i < count ? static_cast<const Key<Scalar>*>(args.selected)[begin + i]
                        : no_key<Key<Scalar>>();
  }
  // The -1 behind the result are there already.
  const i64 kept = min_of(i64(*args.n_selected), args.max_output);
  const i64 threads = i64(gridDim.x) * kBlockSize;
#pragma unroll 1
  for (i64 i = kept + i64(blockIdx.x) * kBlockSize + threadIdx.x; i < args.max_output;
       i += threads) {
    store(static_cast<Scalar*>(args.out_scores)[i], Acc<Scalar>(0));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.count = kept;
  __syncthreads();
  sort_tile<kTile, kBlockSize>(keys);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kBlockSize) {
    if (gridDim.x > 1) {
      static_cast<Key<Scalar>*>(args.ranked)[begin + i] = keys[i];
    } else {
      put<Scalar>(args, keys[i], i);
    }
  }
}

// kLanes neighbouring threads share one key and divide the tiles among them.
template <class Scalar, int kLanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) merge(const Args args) {
  const i64 thread = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i64 item = min_of(thread / kLanes, args.n - 1);
  const auto* keys = static_cast<const Key<Scalar>*>(args.ranked);
  const Key<Scalar> key = keys[item];
  u32 place = 0;
  if (row_of(key) != kGone) {
#pragma unroll 1
    for (i64 tile = thread % kLanes; tile * kTile < args.n; tile += kLanes) {
      const int count = int(min_of(args.n - tile * kTile, i64(kTile)));
      place += tile == item / kTile ? u32(item % kTile)
                                    : u32(count_less(keys + tile * kTile, count, key));
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    place += __shfl_xor_sync(kAllLanes, place, offset);
  }
  if (thread / kLanes < args.n && thread % kLanes == 0) put<Scalar>(args, key, place);
}

}  // namespace torchkiln::soft_nms
