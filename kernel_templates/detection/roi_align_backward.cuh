// RoIAlign on the GPU, backward: one block owns one tile of the gradient for 32 (or 64, 128) channels in shared memory,
// lanes on channels; it finds the regions that touch the tile, adds their taps in a fixed order and writes once. No
// atomics, no zero fill, the same bits every time, float32 sums for half types.
// spills: up to 32 bytes for wide types and indices, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/scan.cuh"
#include "detection/roi_align_tables.cuh"

namespace torchkiln::roi_align_backward {

using namespace torchkiln::roi_align;

constexpr int kMostThreads = 512;

// What a block holds. The sums have channels innermost and one place of padding, so that a row of pixels of
// one channel can be read without bank conflicts.
template <class T, int kTileH, int kTileW, int kLaneChannels>
struct Tile {
  static constexpr int kChannels = kWarpSize * kLaneChannels;
  static constexpr int kPitch = kChannels + 1;
  T sums[kTileH * kTileW * kPitch];
  i32 list[kMostThreads];  // regions that touch the tile, of as many as the block has threads
  int partial[kWarpSize];
};

struct TileAt {
  i32 image, y, x;
  i64 channel;
};

__device__ __forceinline__ bool touches(const Span& span, const TileAt& at, int tile_h,
                                        int tile_w) {
  return span.image == at.image && span.y_first < at.y + tile_h && span.y_last >= at.y &&
         span.x_first < at.x + tile_w && span.x_last >= at.x;
}

// Adds the average of one region to the rows of the tile that this warp owns: every kWarps-th.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kWarps,
          class AnyArgs, class T = Acc<Scalar>>
__device__ __forceinline__ void add_average(const AnyArgs& args, i64 region, const TileAt& at,
                                            Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  constexpr u32 kAll = 0xffffffffu;
  const Regions& r = args.regions;  // sizes of maps apart, which are not asked for
  const Table<T> table = table_of<T>(args, region);
  const i32 n_rows = table.row_bins[r.pooled_h - 1].end;
  const i32 n_columns = table.column_bins[r.pooled_w - 1].end;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Scalar* bins = static_cast<const Scalar*>(args.bins) +
                       Index(region) * Index(r.pooled_h * r.pooled_w) * Index(r.c) + at.channel +
                       lane;
#pragma unroll 1
  for (i32 x_begin = 0; x_begin < n_columns; x_begin += kWarpSize) {
    const bool has_column = x_begin + lane < n_columns;
    const Tap<T> column = has_column ? table.columns[x_begin + lane] : Tap<T>{T(0), -1, 0};
    const u32 columns = __ballot_sync(kAll, column.pixel >= at.x && column.pixel < at.x + kTileW);
    if (columns == 0) continue;
#pragma unroll 1
    for (i32 y_begin = 0; y_begin < n_rows; y_begin += kWarpSize) {
      const bool has_row = y_begin + lane < n_rows;
      const Tap<T> row = has_row ? table.rows[y_begin + lane] : Tap<T>{T(0), -1, 0};
      const i32 local = row.pixel - at.y;
      u32 rows = __ballot_sync(
          kAll, row.pixel >= 0 && local >= 0 && local < kTileH && local % kWarps == warp);
#pragma unroll 1
      for (; rows != 0; rows &= rows - 1) {
        const int y = __ffs(rows) - 1;
        const T row_weight = __shfl_sync(kAll, row.weight, y);
        const i32 row_bin = __shfl_sync(kAll, row.bin, y);
        T* sums = tile.sums + __shfl_sync(kAll, local, y) * kTileW * tile.kPitch + lane;
        i32 loaded_bin = -1;
        T gradient[kLaneChannels] = {};
#pragma unroll 1
        for (u32 rest = columns; rest != 0; rest &= rest - 1) {
          const int x = __ffs(rest) - 1;
          const T weight = __shfl_sync(kAll, column.weight, x);
          const i32 bin = __shfl_sync(kAll, column.bin, x);
          if (bin != loaded_bin) {
            loaded_bin = bin;
            const Index offset = Index(row_bin * i32(r.pooled_w) + bin) * Index(r.c);
#pragma unroll
            for (int i = 0; i < kLaneChannels; ++i) {
              const bool exists = at.channel + lane + i * kWarpSize < r.c;
              gradient[i] = exists ? row_weight * load(bins[offset + i * kWarpSize]) : T(0);
            }
          }
          T* sum = sums + (__shfl_sync(kAll, column.pixel, x) - at.x) * tile.kPitch;
#pragma unroll
          for (int i = 0; i < kLaneChannels; ++i) sum[i * kWarpSize] += weight * gradient[i];
        }
      }
    }
  }
}

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

template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize, class T = Acc<Scalar>>
__device__ __forceinline__ void write_tile(const Regions& r, void* to, i32 image, const TileAt& at,
                                           const Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  constexpr int kChannels = kWarpSize * kLaneChannels;
  Scalar* maps = static_cast<Scalar*>(to);
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileH * kTileW * kChannels; i += kBlockSize) {
    const int channel = kLast ? i % kChannels : i / (kTileH * kTileW);
    const int pixel = kLast ? i / kChannels : i % (kTileH * kTileW);
    const i64 y = at.y + pixel / kTileW, x = at.x + pixel % kTileW, c = at.channel + channel;
    if (y >= r.h || x >= r.w || c >= r.c) continue;
    const Index offset =
        kLast ? ((Index(image) * Index(r.h) + Index(y)) * Index(r.w) + Index(x)) * Index(r.c) +
                    Index(c)
              : ((Index(image) * Index(r.c) + Index(c)) * Index(r.h) + Index(y)) * Index(r.w) +
                    Index(x);
    store(maps[offset], tile.sums[pixel * tile.kPitch + channel]);
  }
}

// Block number `block` of those that own tiles of the gradient of r's maps; first_image as elsewhere. `add` is called by
// all threads with each region that touches the tile, in order.
template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize, class AnyArgs, class Add>
__device__ __forceinline__ void gather_tile(const AnyArgs& args, const Regions& r, void* maps,
                                            u32 block, i32 first_image, const Add& add) {
  using T = Acc<Scalar>;
  using Sums = Tile<T, kTileH, kTileW, kLaneChannels>;
  __shared__ Sums tile;
  const u32 tiles_x = (u32(r.w) + kTileW - 1) / kTileW, tiles_y = (u32(r.h) + kTileH - 1) / kTileH;
  const u32 chunks = (u32(r.c) + Sums::kChannels - 1) / Sums::kChannels;
  u32 rest = block;
  TileAt at;
  at.channel = i64(rest % chunks) * Sums::kChannels;
  rest /= chunks;
  at.x = i32(rest % tiles_x) * kTileW;
  rest /= tiles_x;
  at.y = i32(rest % tiles_y) * kTileH;
  const i32 of_level = i32(rest / tiles_y);
  at.image = first_image + of_level;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileH * kTileW * Sums::kPitch; i += kBlockSize) {
    tile.sums[i] = T(0);
  }
#pragma unroll 1
  for (i64 begin = 0; begin < r.k; begin += kBlockSize) {
    const i64 candidate = begin + threadIdx.x;
    const bool listed = candidate < r.k && touches(static_cast<const Span*>(args.spans)[candidate],
                                                   at, kTileH, kTileW);
    int total;
    const int slot = block_exclusive_count<kBlockSize>(listed, tile.partial, total);
    if (listed) tile.list[slot] = i32(candidate - begin);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < total; ++i) add(begin + tile.list[i], at, tile);
  }
  __syncthreads();
  write_tile<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(r, maps, of_level, at,
                                                                              tile);
}

template <class Scalar, class Index, int kPooling, bool kLast, int kTileH, int kTileW,
          int kLaneChannels, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const Args args) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const auto add = [&](i64 region, const TileAt& at, auto& tile) {
    if constexpr (kPooling == kAverage) {
      add_average<Scalar, Index, kTileH, kTileW, kLaneChannels, kWarps>(args, region, at, tile);
    } else {
      add_maximum<Scalar, Index, kTileH, kTileW, kLaneChannels, kWarps>(args, region, at, tile);
    }
  };
  gather_tile<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(
      args, args.regions, args.maps, blockIdx.x, 0, add);
}

}  // namespace torchkiln::roi_align_backward
