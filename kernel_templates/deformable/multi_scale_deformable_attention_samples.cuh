// Multi-scale deformable attention on the GPU: which query lanes work on, and what its samples are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "deformable/multi_scale_deformable_attention.h"

namespace torchkiln::multi_scale_deformable_attention {

// Elements i * step apart. The compiler widens a step that stays the same before the loop, and then multiplies 64 bits by
// 64, which takes five instructions.
template <class Scalar>
__device__ __forceinline__ Scalar* apart(Scalar* from, i32 i, i32 step_bytes) {
#if defined(__CUDACC_RTC__)
  u64 result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(i), "r"(step_bytes), "l"(from));
  return reinterpret_cast<Scalar*>(result);
#else
  return from + i64(i) * step_bytes / i32(sizeof(Scalar));
#endif
}

// ---- levels ----

// The first levels, in shared memory: to read and to check one takes thirty instructions.
struct Levels {
  static constexpr i32 kMost = 16;
  struct alignas(16) Entry {
    Level size;
  };
  Entry first[kMost];

  // A barrier must follow.
  __device__ __forceinline__ void fill(const Args& args) {
    const i32 own = threadIdx.x;
    if (own < kMost && own < args.l) {
      first[own].size = level_of(args.shapes, args.starts, args.s, own);
    }
  }
  __device__ __forceinline__ Level at(const Args& args, i32 level) const {
    return level < kMost ? first[level].size : level_of(args.shapes, args.starts, args.s, level);
  }
};

// The level that a pixel is on, the last one of several; 0 by 0 for none.
__device__ __forceinline__ Level level_around(const Args& args, const Levels& levels, i32 pixel) {
  Level found = {};
#pragma unroll 1
  for (i32 level = 0; level < args.l; ++level) {
    const Level size = levels.at(args, level);
    if (u32(pixel - size.start) < u32(size.h) * u32(size.w)) found = size;
  }
  return found;
}

// What stands at `place` of an order of `count` queries or pixels in which neighbours lie beside each other. Where they are
// the pixels of all levels, row by row, it goes through bands of kBand rows, column by column: n in a row are a patch, not a
// line.
template <int kBand>
__device__ __forceinline__ i32 in_patches(const Args& args, const Levels& levels, i64 count,
                                          i32 place) {
  if (count != args.s || args.l > Levels::kMost) return place;
  u32 total = 0, begin = 0;
  Level own = {};
#pragma unroll 1
  for (i32 level = 0; level < args.l; ++level) {
    const Level size = levels.first[level].size;
    if (u32(place) >= total) {
      own = size;
      begin = total;
    }
    total += u32(size.h) * u32(size.w);
  }
  if (total != u32(count)) return place;
  const u32 within = u32(place) - begin, width = u32(own.w);
  const u32 band = within / (kBand * width) * kBand, in_band = within - band * width;
  const u32 rows = min_of(u32(kBand), u32(own.h) - band);
  const u32 column = rows == kBand ? in_band / kBand : in_band / rows;
  return i32(begin + (band + in_band - column * rows) * width + column);
}

// Rows of a band that make a patch of so many queries about as wide as high.
constexpr int band_of(int queries) {
  return queries >= 256 ? 16 : (queries >= 64 ? 8 : (queries >= 16 ? 4 : 2));
}

// ---- queries ----

// What the kLanes lanes of one query and head work on.
struct Item {
  Query query;
  i64 value;         // its image's and head's first element of the value
  i64 output;        // its element of the output
  i64 of_head, row;  // image and head; the query
  const u8* mask;    // of its image
  bool active;
};

// A block takes kQueries queries of one head and image, neighbours in the order; `own` is one of them.
template <int kQueries>
__device__ __forceinline__ Item item_of(const Args& args, const Levels& levels, i32 own) {
  const u32 runs = (u32(args.q) + kQueries - 1) / kQueries;
  const u32 of_head = blockIdx.x / runs, image = of_head / u32(args.m);
  const i32 place = i32((blockIdx.x - of_head * runs) * kQueries) + own;
  Item item = {};
  item.active = place < args.q;
  const i64 head = of_head - image * u32(args.m);
  item.of_head = of_head;
  item.value = (image * args.s * args.m + head) * args.d;
  item.mask = args.mask == nullptr ? nullptr : args.mask + image * args.s;
  if (!item.active) return item;
  item.row = in_patches<band_of(kQueries)>(args, levels, args.q, place);
  item.query = query_at(args, image, head, item.row);
  item.output = ((image * args.q + item.row) * args.m + head) * args.d;
  return item;
}

// ---- samples ----

// One sample, worked out.
template <class T>
struct Sample {
  Taps<T> taps;
  T weight;
};

// What the deterministic gradient needs of a sample. Its cell is the pixel of the level up and to the left of it, or the
// nearest one to that.
template <class T>
struct alignas(16) Placed {
  i32 cell;  // kOutside for no sample
  T y, x;    // from the cell's pixel on; less than 0 where there is no row or column further on
  T weight;
};

// Marks a distance, which may be 0, as one to no other row or column; so small a number is lost beside 1.
template <class T>
__device__ __forceinline__ T alone(T distance) {
  return -max_of(distance, T(1e-30f));
}

template <class T>
__device__ __forceinline__ Placed<T> placed_at(Position<T> at, Level level, T weight) {
  const Corner corner = corner_of(at, level);
  if (!corner.inside) return {kOutside, T(0), T(0), T(0)};
  const i32 row = max_of(corner.y, 0), column = max_of(corner.x, 0);
  const T y = at.y - T(row), x = at.x - T(column);
  return {level.start + row * level.w + column, row + 1 < level.h ? y : alone(abs_of(y)),
          column + 1 < level.w ? x : alone(abs_of(x)), weight};
}

// The points of a query on a level, and quotients by their number, of up to l or 1024 times as many.
struct Points {
  i32 points;
  float inverse;  // 0 where a product with it would not be exact

  __device__ __forceinline__ explicit Points(const Args& args)
      : points(i32(args.p)),
        inverse(args.p <= 1024 && args.l <= 1024 ? fast_quotient(1.0f, float(args.p)) : 0.0f) {}
  __device__ __forceinline__ i32 quotient_of(i32 sample) const {
    return inverse > 0.0f ? quotient(sample, inverse) : sample / points;
  }
};

template <class T, class Place>
__device__ __forceinline__ Sample<T> sample_at(const Args& args, const Levels& levels, Query query,
                                               const u8* mask, i32 sample, i32 level,
                                               Softmax<T> softmax) {
  const Level size = levels.at(args, level);
  const auto at = position_of<T, Place>(args, query, sample, level, size);
  return {taps_at(at, size, mask), weight_of<T, Place>(args, query, sample, softmax)};
}

}  // namespace torchkiln::multi_scale_deformable_attention
