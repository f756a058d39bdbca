// RoIAlign on the GPU, backward: one block owns one tile of the gradient for 32 (or 64, 128) channels, lanes on channels;
// it finds the regions that touch the tile, adds their taps in a fixed order and writes once. No atomics, no zero fill,
// the same bits every time, float32 sums for half types.
//
// Averages have their sums in registers. A warp owns a patch of the tile. What bins of a region take of the tile's rows
// and columns is laid out in shared memory once for all patches, a warp for each region of a batch; a patch reads each
// gradient that it needs once, adds it to its rows, and these to its pixels. Where there are more warps than patches,
// several share one, each with every second (third, ...) region: the longest lists are what the launch waits for.
// Maxima, whose pixels differ from channel to channel, have theirs in shared memory.
// spills: up to 32 bytes for wide types and indices, by ptxas' own choice.
// compile time: averages takes above 250 ms; its sums are registers, so that rows and pixels of a patch are unrolled
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/scan.cuh"
#include "detection/roi_align_tables.cuh"

namespace torchkiln::roi_align_backward {

using namespace torchkiln::roi_align;

constexpr u32 kAllLanes = 0xffffffffu;

// The sums of a block. Channels are innermost, with one place of padding, so that a row of pixels of one channel can be
// read without bank conflicts.
template <class T, int kTileH, int kTileW, int kLaneChannels>
struct Tile {
  static constexpr int kChannels = kWarpSize * kLaneChannels;
  static constexpr int kPitch = kChannels + 1;
  T sums[kTileH * kTileW * kPitch];
};

// Regions that touch a tile, of so many as the block looks at together.
constexpr int kPerThread = 4;
template <int kBlockSize>
struct List {
  i32 regions[kBlockSize * kPerThread];
  int partial[kWarpSize];
};

struct TileAt {
  i32 image, y, x;
  i64 channel;
  i32 repeated;  // of the first channels: written by another block
};

// No branches: all loads of a span, and of several, are on their way together.
__device__ __forceinline__ bool touches(const Span& span, const TileAt& at, int tile_h,
                                        int tile_w) {
  return bool(int(span.image == at.image) & int(span.y_first < at.y + tile_h) &
              int(span.y_last >= at.y) & int(span.x_first < at.x + tile_w) &
              int(span.x_last >= at.x));
}

// Calls work(begin, total) with the lists of the regions that touch a tile, in a fixed order; they count from `begin`.
template <int kBlockSize, class Work>
__device__ __forceinline__ void for_each_list(const Span* spans, i64 count, const TileAt& at,
                                              int tile_h, int tile_w, List<kBlockSize>& list,
                                              const Work& work) {
#pragma unroll 1
  for (i64 begin = 0; begin < count; begin += kBlockSize * kPerThread) {
    const i32 left = i32(min_of(count - begin, i64(kBlockSize * kPerThread)));
    u32 touching = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const i32 region = i * kBlockSize + i32(threadIdx.x);
      const Span span = spans[begin + min_of(region, left - 1)];
      touching |= u32(int(region < left) & int(touches(span, at, tile_h, tile_w))) << i;
    }
    int total;
    int slot = block_exclusive_sum<kBlockSize>(__popc(touching), list.partial, total);
    for (; touching != 0; touching &= touching - 1) {
      list.regions[slot++] = (__ffs(touching) - 1) * kBlockSize + i32(threadIdx.x);
    }
    __syncthreads();
    work(begin, total);
  }
}

// ---- averages ------------------------------------------------------------------------------------------------------

static_assert(2 * kHeldBins == kWarpSize);  // lanes look at rows and columns at once

// What bins of a region, from one on each axis on, take of the rows and columns of a tile, which has patches.
template <class T, int kTileH, int kTileW>
struct alignas(16) Weights {
  T rows[kHeldBins][kTileH];
  T columns[kHeldBins][kTileW];
  // Of `rows` and then of `columns`: the bins that take any of a patch.
  static constexpr int kRowPatches = kTileH / kPatchH, kPatches = kRowPatches + kTileW / kPatchW;
  Range bins[kPatches];
  i64 bin;  // the number of the first bin on both axes, among those of all regions
};

template <int kCount, class T>
__device__ __forceinline__ void read_weights(const T* from, T (&to)[kCount]) {
  constexpr int kAtOnce = kCount < int(16 / sizeof(T)) ? kCount : int(16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < kCount; i += kAtOnce) {
    const Pack<T, kAtOnce> weights = read_pack<kAtOnce>(from + i);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) to[i + j] = weights.at[j];
  }
}

// Where the part of a tile lies that a warp owns.
struct Patch {
  int y, x;
};

// Adds what bins of a column give to the rows of a patch to its pixels, and begins anew.
template <int kLaneChannels, class T>
__device__ __forceinline__ void add_rows(const T* column_weights,
                                         T (&of_rows)[kPatchH][kLaneChannels],
                                         T (&sums)[kPatchH][kPatchW][kLaneChannels]) {
  T weights[kPatchW];
  read_weights(column_weights, weights);
#pragma unroll
  for (int x = 0; x < kPatchW; ++x) {
    if (weights[x] == T(0)) continue;
#pragma unroll
    for (int y = 0; y < kPatchH; ++y) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) sums[y][x][i] += weights[x] * of_rows[y][i];
    }
  }
#pragma unroll
  for (int y = 0; y < kPatchH; ++y) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) of_rows[y][i] = T(0);
  }
}

// Adds a region's average to the sums of a patch. `gradients`: of the bins of all regions, from the lane's channel on.
// Only what a bin takes is multiplied: gradients need not be finite.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels,
          class T = Acc<Scalar>>
__device__ __forceinline__ void add_average(const Regions& r, const Scalar* gradients,
                                            const Weights<T, kTileH, kTileW>& weights,
                                            const Patch& patch,
                                            T (&sums)[kPatchH][kPatchW][kLaneChannels]) {
  const Range rows = weights.bins[patch.y / kPatchH];
  const Range columns = weights.bins[Weights<T, kTileH, kTileW>::kRowPatches + patch.x / kPatchW];
  if (rows.is_empty() || columns.is_empty()) return;
  // Gradients of so many bins are on their way together: a warp has little else to do until they come. With four channels
  // a lane, a third bin would find no registers.
  constexpr i32 kAtOnce = kLaneChannels > 2 ? 2 : 3;
  const i32 bins_x = i32(r.pooled_w), height = rows.end - rows.begin;
  const i32 count = height * (columns.end - columns.begin);
  const Index to_row = Index(bins_x) * Index(r.c),
              to_column = Index(r.c) - Index(height - 1) * to_row;
  const Scalar* asked =
      gradients + Index(weights.bin + rows.begin * bins_x + columns.begin) * Index(r.c);
  i32 asked_row = rows.begin, row = rows.begin, column = columns.begin;
  T of_rows[kPatchH][kLaneChannels] = {};
#pragma unroll 1
  for (i32 first = 0; first < count; first += kAtOnce) {
    Scalar next[kAtOnce][kLaneChannels];
#pragma unroll
    for (i32 k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) next[k][i] = asked[i * kWarpSize];
      const bool ends_column = ++asked_row == rows.end;
      const Index step = ends_column ? to_column : to_row;
      asked += first + k + 1 < count ? step : Index(0);  // the last one again
      asked_row = ends_column ? rows.begin : asked_row;
    }
#pragma unroll
    for (i32 k = 0; k < kAtOnce; ++k) {
      if (first + k >= count) break;
      T row_weights[kPatchH], gradient[kLaneChannels];
      read_weights(weights.rows[row] + patch.y, row_weights);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) gradient[i] = load(next[k][i]);
#pragma unroll
      for (int y = 0; y < kPatchH; ++y) {
        if (row_weights[y] == T(0)) continue;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) of_rows[y][i] += row_weights[y] * gradient[i];
      }
      if (++row < rows.end) continue;
      add_rows(weights.columns[column++] + patch.x, of_rows, sums);
      row = rows.begin;
    }
  }
}

// ---- maxima --------------------------------------------------------------------------------------------------------

// The pixels of an axis [low, high] that samples of a bin may touch, with one to spare for rounding.
struct PixelRange {
  i32 low, high;
};
template <class T>
__device__ __forceinline__ PixelRange pixels_of(const Axis<T>& axis, i32 bin, i32 size) {
  const T begin = axis.start + T(bin) * axis.bin;
  return {pixel_below(axis, begin - T(1), size), pixel_below(axis, begin + axis.bin + T(2), size)};
}

// Adds one region's maxima to the rows of the tile that this warp owns. Every channel has its own winner, so each lane
// adds its own taps; the winners of all channels are asked for before the first is used.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kWarps,
          class T = Acc<Scalar>>
__device__ __forceinline__ void add_maximum(const Args& args, i64 region, const TileAt& at,
                                            Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  const Regions& r = args.regions;
  const Window<T> window = window_of<T>(r, region);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const i32 bins_y = i32(r.pooled_h), bins_x = i32(r.pooled_w);
#pragma unroll 1
  for (i32 bin_y = 0; bin_y < bins_y; ++bin_y) {
    const PixelRange rows = pixels_of(window.y, bin_y, i32(r.h));
    const i32 low = max_of(rows.low - at.y, 0), high = min_of(rows.high - at.y, kTileH - 1);
    const i32 first_owned = low + (warp - low % kWarps + kWarps) % kWarps;
    if (first_owned > high) continue;
#pragma unroll 1
    for (i32 bin_x = 0; bin_x < bins_x; ++bin_x) {
      const PixelRange columns = pixels_of(window.x, bin_x, i32(r.w));
      if (columns.high < at.x || columns.low >= at.x + kTileW) continue;
      const Index bin = Index(region) * (bins_y * bins_x) + bin_y * bins_x + bin_x;
      const Index offset = bin * Index(r.c) + at.channel + lane;
      i32 winner[kLaneChannels];
      T gradient[kLaneChannels];
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const bool exists = at.channel + lane + i * kWarpSize < r.c;
        winner[i] = exists ? args.argmax[offset + i * kWarpSize] : -1;
        gradient[i] =
            exists ? load(static_cast<const Scalar*>(args.bins)[offset + i * kWarpSize]) : T(0);
      }
#pragma unroll 1
      for (int i = 0; i < kLaneChannels; ++i) {
        const i32 sample = winner[0];
        const T own = gradient[0];
#pragma unroll
        for (int k = 1; k < kLaneChannels; ++k) {  // on to the next one; registers have no index
          winner[k - 1] = winner[k];
          gradient[k - 1] = gradient[k];
        }
        if (sample < 0) continue;
        const i32 row = sample / window.x.count;
        const Taps<T> y = sample_taps(window.y, bin_y, row, r.h);
        const Taps<T> x = sample_taps(window.x, bin_x, sample - row * window.x.count, r.w);
        if (!y.inside || !x.inside) continue;
#pragma unroll 1
        for (int corner = 0; corner < 4; ++corner) {
          const i32 local_y = (corner < 2 ? y.low : y.high) - at.y;
          const i32 local_x = (corner % 2 == 0 ? x.low : x.high) - at.x;
          if (local_y < 0 || local_y >= kTileH || local_x < 0 || local_x >= kTileW) continue;
          if (local_y % kWarps != warp) continue;
          tile.sums[(local_y * kTileW + local_x) * tile.kPitch + i * kWarpSize + lane] +=
              own * (corner < 2 ? y.weight_low : y.weight_high) *
              (corner % 2 == 0 ? x.weight_low : x.weight_high);
        }
      }
    }
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// A thread stays on a pixel (kLast: a channel), of which it writes every so many channels (pixels).
template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize, class T = Acc<Scalar>>
__device__ __forceinline__ void write_tile(const Regions& r, void* to, i32 image, const TileAt& at,
                                           const Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  constexpr int kPixels = kTileH * kTileW, kChannels = kWarpSize * kLaneChannels;
  constexpr int kInner = kLast ? kChannels : kPixels, kOuter = kLast ? kPixels : kChannels;
  constexpr int kAcross = kInner < kBlockSize ? kInner : kBlockSize;
  // A number of turns that is known leaves no rest behind the unrolled loop.
  constexpr int kStep = kBlockSize / kAcross, kTurns = (kOuter + kStep - 1) / kStep;
  constexpr bool kIsWhole = kBlockSize % kAcross == 0 && kOuter % kStep == 0;
  Scalar* maps = static_cast<Scalar*>(to);
#pragma unroll 1
  for (int inner = threadIdx.x % kAcross; inner < kInner; inner += kAcross) {
#pragma unroll 2
    for (int turn = 0; turn < kTurns; ++turn) {
      const int outer = threadIdx.x / kAcross + turn * kStep;
      if (!kIsWhole && outer >= kOuter) break;
      const int channel = kLast ? inner : outer, pixel = kLast ? outer : inner;
      const i32 y = at.y + pixel / kTileW, x = at.x + pixel % kTileW;
      const i32 c = i32(at.channel) + channel;
      if (y >= i32(r.h) || x >= i32(r.w) || c >= i32(r.c) || channel < at.repeated) continue;
      const Index offset =
          kLast ? ((Index(image) * Index(r.h) + Index(y)) * Index(r.w) + Index(x)) * Index(r.c) +
                      Index(c)
                : ((Index(image) * Index(r.c) + Index(c)) * Index(r.h) + Index(y)) * Index(r.w) +
                      Index(x);
      store(maps[offset], tile.sums[pixel * tile.kPitch + channel]);
    }
  }
}

// Block number `block` of those that own tiles of the gradient of r's maps. at.image counts from first_image.
template <int kTileH, int kTileW, int kChannels>
__device__ __forceinline__ TileAt own_tile(const Regions& r, u32 block, i32 first_image) {
  const u32 tiles_x = (u32(r.w) + kTileW - 1) / kTileW, tiles_y = (u32(r.h) + kTileH - 1) / kTileH;
  const u32 chunks = (u32(r.c) + kChannels - 1) / kChannels;
  TileAt at;
  at.channel = i64(block % chunks) * kChannels;
  block /= chunks;
  at.x = i32(block % tiles_x) * kTileW;
  block /= tiles_x;
  at.y = i32(block % tiles_y) * kTileH;
  at.image = first_image + i32(block / tiles_y);
  at.repeated = 0;
  return at;
}

// Blocks of averages that share a multiprocessor: as many as the loads of others can hide behind. Unasked, registers that
// only the search for regions needs leave room for two thirds of them.
template <class Scalar, int kBlockSize>
constexpr int kLeastBlocks = sizeof(Acc<Scalar>) == 8 ? 1 : 768 / kBlockSize;

// Whether bins of rows, or of columns, are left over.
struct MoreBins {
  bool rows, columns;
};

// Holds a region's bins that take any pixel of the tile, less the first ones; a warp calls it.
template <class AnyArgs, class T, int kTileH, int kTileW>
__device__ __forceinline__ MoreBins hold_region(const AnyArgs& args, const Regions& r,
                                                const TileAt& at, i64 region, i32 skip_y,
                                                i32 skip_x, Weights<T, kTileH, kTileW>& held) {
  const Table<T> table = table_of<T>(args, region);
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kAtOnce = 16 / sizeof(T);
  T* all = held.rows[0];
  using Held = Weights<T, kTileH, kTileW>;
  static_assert(Held::kPatches <= kWarpSize);
  if (lane < Held::kPatches) held.bins[lane] = {kHeldBins, 0};
#pragma unroll
  for (int i = lane * kAtOnce; i < kHeldBins * (kTileH + kTileW); i += kWarpSize * kAtOnce) {
    store_pack<kAtOnce>(all + i, zero_pack<kAtOnce, T>());
  }
  __syncwarp();
  MoreBins more = {};
  i64 first_bin = region;
  // A loop over the axes, so that its code is there once.
#pragma unroll 1
  for (int axis = 0; axis < 2; ++axis) {
    const bool of_rows = axis == 0;
    const Tap<T>* taps = of_rows ? table.rows : table.columns;
    const i64 pooled = of_rows ? r.pooled_h : r.pooled_w;
    const i32 count = (of_rows ? table.row_bins : table.column_bins)[pooled - 1].end;
    const i32 low = of_rows ? at.y : at.x, skip = of_rows ? skip_y : skip_x;
    const i32 pixels = of_rows ? kTileH : kTileW;
    T* weights = of_rows ? held.rows[0] : held.columns[0];
    Range* bins = held.bins + (of_rows ? 0 : Held::kRowPatches);
    i32 first = -1;
    bool has_more = false;
#pragma unroll 1
    for (i32 begin = 0; begin < count; begin += kWarpSize) {
      const Tap<T> tap = begin + lane < count ? taps[begin + lane] : Tap<T>{T(0), -1, 0};
      const i32 pixel = tap.pixel - low;
      const bool inside = u32(pixel) < u32(pixels) && tap.weight != T(0);
      const u32 found = __ballot_sync(kAllLanes, inside);
      if (found == 0) continue;
      if (first < 0) first = __shfl_sync(kAllLanes, tap.bin, __ffs(found) - 1) + skip;
      const i32 bin = tap.bin - first;
      if (inside && u32(bin) < u32(kHeldBins)) {
        weights[bin * pixels + pixel] = tap.weight;
        Range& of_patch = bins[of_rows ? pixel / kPatchH : pixel / kPatchW];
        atomicMin(&of_patch.begin, bin);
        atomicMax(&of_patch.end, bin + 1);
      }
      has_more = has_more || (inside && bin >= kHeldBins);
    }
    first_bin = first_bin * pooled + first;
    (of_rows ? more.rows : more.columns) = has_more;
  }
  if (lane == 0) held.bin = first_bin;
  return more;
}

// Puts the sums of all patches into the tile: warps that share one, one after the other.
template <int kSharers, class T, int kTileH, int kTileW, int kLaneChannels>
__device__ __forceinline__ void collect_sums(const T (&sums)[kPatchH][kPatchW][kLaneChannels],
                                             const Patch& patch, int sharer,
                                             Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
#pragma unroll 1
  for (int turn = 0; turn < kSharers; ++turn) {
    if (turn > 0) __syncthreads();
    if (turn != sharer) continue;
#pragma unroll
    for (int y = 0; y < kPatchH; ++y) {
#pragma unroll
      for (int x = 0; x < kPatchW; ++x) {
        const int pixel = (patch.y + y) * kTileW + patch.x + x;
        T* to = tile.sums + pixel * tile.kPitch + threadIdx.x % kWarpSize;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
          to[i * kWarpSize] = sums[y][x][i] + (turn > 0 ? to[i * kWarpSize] : T(0));
        }
      }
    }
  }
  __syncthreads();
}

// Averages.
template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize, class AnyArgs>
__device__ __forceinline__ void gather_average(const AnyArgs& args, const Regions& r, void* maps,
                                               u32 block, i32 first_image) {
  using T = Acc<Scalar>;
  using Sums = Tile<T, kTileH, kTileW, kLaneChannels>;
  constexpr int kWarps = kBlockSize / kWarpSize, kAcross = kTileW / kPatchW;
  constexpr int kPatches = kAcross * (kTileH / kPatchH), kSharers = kWarps / kPatches;
  static_assert(kWarps % kPatches == 0);
  __shared__ List<kBlockSize> list;
  __shared__ union {
    Weights<T, kTileH, kTileW> weights[kWarps];
    Sums tile;  // when all is added
  } held;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  TileAt at = own_tile<kTileH, kTileW, Sums::kChannels>(r, block, first_image);
  // All channels of a block exist, so that no load asks; few ones have a lane for each, and the last for lanes too many.
  at.repeated = i32(max_of(min_of(at.channel, at.channel + Sums::kChannels - r.c), i64(0)));
  at.channel -= at.repeated;
  const i32 own_channel = kLaneChannels > 1 ? lane : min_of(lane, i32(r.c - at.channel) - 1);
  const int number = warp % kPatches, sharer = warp / kPatches;
  const Patch patch = {number / kAcross * kPatchH, number % kAcross * kPatchW};
  const Scalar* gradients = static_cast<const Scalar*>(args.bins) + at.channel + own_channel;
  T sums[kPatchH][kPatchW][kLaneChannels] = {};

  const auto add_list = [&](i64 begin, int total) {
#pragma unroll 1
    for (int first = 0; first < total; first += kWarps) {
      const int count = min_of(total - first, kWarps);
      // All bins of most regions are held at once.
      i32 skip_y = 0, skip_x = 0;
#pragma unroll 1
      for (bool again = true; again;) {
        MoreBins more = {};
        if (warp < count) {
          const i64 region = begin + list.regions[first + warp];
          more = hold_region(args, r, at, region, skip_y, skip_x, held.weights[warp]);
        }
        const bool more_columns = __syncthreads_or(more.columns);
#pragma unroll 1
        for (int i = sharer; i < count; i += kSharers) {
          add_average<Scalar, Index, kTileH, kTileW, kLaneChannels>(r, gradients, held.weights[i],
                                                                    patch, sums);
        }
        const bool more_rows = __syncthreads_or(more.rows);
        again = more_columns || more_rows;
        skip_x = more_columns ? skip_x + kHeldBins : 0;
        if (!more_columns) skip_y += kHeldBins;
      }
    }
  };
  for_each_list<kBlockSize>(static_cast<const Span*>(args.spans), r.k, at, kTileH, kTileW, list,
                            add_list);
  collect_sums<kSharers>(sums, patch, sharer, held.tile);
  write_tile<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(
      r, maps, at.image - first_image, at, held.tile);
}

// Sums in shared memory: `add` is called by all threads with each region that touches the tile, in order.
template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize, class Add>
__device__ __forceinline__ void gather_tile(const Regions& r, const void* spans, void* maps,
                                            u32 block, const Add& add) {
  using T = Acc<Scalar>;
  using Sums = Tile<T, kTileH, kTileW, kLaneChannels>;
  __shared__ Sums tile;
  __shared__ List<kBlockSize> list;
  const TileAt at = own_tile<kTileH, kTileW, Sums::kChannels>(r, block, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileH * kTileW * Sums::kPitch; i += kBlockSize) {
    tile.sums[i] = T(0);
  }
  const auto add_list = [&](i64 begin, int total) {
#pragma unroll 1
    for (int i = 0; i < total; ++i) add(begin + list.regions[i], at, tile);
  };
  for_each_list<kBlockSize>(static_cast<const Span*>(spans), r.k, at, kTileH, kTileW, list,
                            add_list);
  __syncthreads();
  write_tile<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(r, maps, at.image, at,
                                                                              tile);
}

template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, kLeastBlocks<Scalar, kBlockSize>)
    averages(const Args args) {
  gather_average<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(
      args, args.regions, args.maps, blockIdx.x, 0);
}

template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) maxima(const Args args) {
  const auto add = [&](i64 region, const TileAt& at, auto& tile) {
    add_maximum<Scalar, Index, kTileH, kTileW, kLaneChannels, kBlockSize / kWarpSize>(args, region,
                                                                                      at, tile);
  };
  gather_tile<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(
      args.regions, args.spans, args.maps, blockIdx.x, add);
}

}  // namespace torchkiln::roi_align_backward
