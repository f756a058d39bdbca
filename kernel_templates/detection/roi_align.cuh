// RoIAlign on the GPU. The average of a bin is separable: (weights of rows) x (weights of columns), the border included.
//
//   tables    one thread per region and axis merges the samples of each bin into taps (pixel, weight), once for all
//             channels; the kernels below but `direct` read them
//   planes    NCHW: a block stays on kPlanes maps and walks all regions of their image, so that the maps' pixels are
//             fetched from L2 once and then hit L1; 4 lanes share a bin, neighbouring bins are neighbouring lanes
//   last      channels_last: one thread computes a row of bins for 16 bytes of channels, neighbouring threads
//             neighbouring channels; the taps that rows of bins share hit L1
//   direct    one thread per output, geometry included: the maximum, and averages too small to deserve two launches
//   backward  one block owns one tile of the gradient for 32 (or 64, 128) channels in shared memory, lanes on channels;
//             it finds the regions that touch the tile, adds their taps in a fixed order and writes once. No atomics,
//             no zero fill, the same bits every time, float32 sums for half types
// spills: up to 32 bytes for wide types and indices, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/scan.cuh"
#include "detection/roi_align.h"

namespace torchkiln::roi_align {

// ---- tables --------------------------------------------------------------------------------------------------------

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) tables(const Args args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i64 region = item / 2;
  const bool columns = item % 2 != 0;
  if (region >= r.k) return;
  Window<T> window = window_of<T>(r, region);
  Axis<T> axis = columns ? window.x : window.y;
  if (window.batch < 0) axis.count = 0;
  Tap<T>* taps = static_cast<Tap<T>*>(args.taps) +
                 region * (args.row_capacity + args.column_capacity) +
                 (columns ? args.row_capacity : 0);
  i32* begins =
      args.begins + region * (r.pooled_h + r.pooled_w + 2) + (columns ? r.pooled_h + 1 : 0);
  const i32 n =
      make_taps(axis, columns ? r.pooled_w : r.pooled_h, columns ? r.w : r.h, taps, begins);
  Span& span = static_cast<Span*>(args.spans)[region];
  const i32 first = n > 0 ? taps[0].pixel : 0, last = n > 0 ? taps[n - 1].pixel : -1;
  if (columns) {
    span.x_first = first;
    span.x_last = last;
  } else {
    span.batch = i32(window.batch);
    span.y_first = first;
    span.y_last = last;
  }
}

// The taps of one region.
template <class T>
struct Table {
  const Tap<T>* rows;
  const Tap<T>* columns;
  const i32* row_begins;
  const i32* column_begins;
};

template <class T>
__device__ __forceinline__ Table<T> table_of(const Args& args, i64 region) {
  const Regions& r = args.regions;
  Table<T> table;
  table.rows =
      static_cast<const Tap<T>*>(args.taps) + region * (args.row_capacity + args.column_capacity);
  table.columns = table.rows + args.row_capacity;
  table.row_begins = args.begins + region * (r.pooled_h + r.pooled_w + 2);
  table.column_begins = table.row_begins + r.pooled_h + 1;
  return table;
}

// ---- forward -------------------------------------------------------------------------------------------------------

constexpr int kLanesPerBin = 4;  // ratio 2: a bin takes at most 4 columns

template <class Scalar, class Index, int kPlanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) planes(const Args args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  constexpr int kWarps = kBlockSize / kWarpSize;
  constexpr int kBinsPerWarp = kWarpSize / kLanesPerBin;
  const i32 pooled_h = i32(r.pooled_h), pooled_w = i32(r.pooled_w), width = i32(r.w);
  const i32 groups = i32((r.c + kPlanes - 1) / kPlanes);
  const i32 batch = blockIdx.x / groups, channel = blockIdx.x % groups * kPlanes;
  const Index plane_size = Index(r.h) * Index(r.w);
  const Scalar* plane =
      static_cast<const Scalar*>(args.maps) + (Index(batch) * Index(r.c) + channel) * plane_size;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int sub = lane % kLanesPerBin;
#pragma unroll 1
  for (i64 region = i64(blockIdx.y) * kWarps + warp; region < r.k;
       region += i64(gridDim.y) * kWarps) {
    const i32 home = static_cast<const Span*>(args.spans)[region].batch;
    // A region of no image has no taps; the blocks of the first image write its zeros.
    if (home != batch && !(home < 0 && batch == 0)) continue;
    const Table<T> table = table_of<T>(args, region);
    Scalar* out = static_cast<Scalar*>(args.bins) +
                  (Index(region) * Index(r.c) + channel) * Index(pooled_h * pooled_w);
#pragma unroll 1
    for (i32 first = 0; first < pooled_w; first += kBinsPerWarp) {
      const i32 bin = first + lane / kLanesPerBin;
      const bool has_bin = bin < pooled_w;
      const i32 begin = has_bin ? table.column_begins[bin] : 0;
      const i32 end = has_bin ? table.column_begins[bin + 1] : 0;
      // The first column of each lane stays in registers; wide bins come back for the others.
      const bool has_column = begin + sub < end;
      const Tap<T> column = has_column ? table.columns[begin + sub] : Tap<T>{T(0), 0, 0};
#pragma unroll 1
      for (i32 row_bin = 0; row_bin < pooled_h; ++row_bin) {
        const i32 row_begin = table.row_begins[row_bin], row_end = table.row_begins[row_bin + 1];
        T sum[kPlanes] = {};
        Tap<T> at = column;
#pragma unroll 1
        for (i32 c = begin + sub; c < end; c += kLanesPerBin) {
          if (c != begin + sub) at = table.columns[c];
          T of_column[kPlanes] = {};
#pragma unroll 4
          for (i32 y = row_begin; y < row_end; ++y) {
            const Tap<T> row = table.rows[y];
            const Index offset = Index(row.pixel) * width + at.pixel;
#pragma unroll
            for (int p = 0; p < kPlanes; ++p) {
              if (kPlanes > 1 && channel + p >= r.c) break;
              of_column[p] += row.weight * load(plane[p * plane_size + offset]);
            }
          }
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) sum[p] += at.weight * of_column[p];
        }
        __syncwarp();
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
          for (int offset = kLanesPerBin / 2; offset > 0; offset /= 2) {
            sum[p] += __shfl_xor_sync(0xffffffffu, sum[p], offset);
          }
          if (sub == 0 && has_bin && channel + p < r.c) {
            store(out[Index(p) * (pooled_h * pooled_w) + row_bin * pooled_w + bin], sum[p]);
          }
        }
      }
    }
  }
}

template <class Scalar, class Index, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) last(const Args args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const u32 vectors = u32(r.c / kVector), pooled_h = u32(r.pooled_h), pooled_w = u32(r.pooled_w);
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (item >= r.k * pooled_h * vectors) return;
  const Index channel = Index(item % vectors) * kVector;
  const u32 row_bin = u32(item / vectors % pooled_h);
  const i64 region = item / vectors / pooled_h;
  const Table<T> table = table_of<T>(args, region);
  const i32 batch = static_cast<const Span*>(args.spans)[region].batch;
  const Scalar* map = static_cast<const Scalar*>(args.maps) + channel +
                      Index(max_of(batch, 0)) * Index(r.h) * Index(r.w) * Index(r.c);
  Scalar* out = static_cast<Scalar*>(args.bins) + channel +
                (Index(region) * pooled_h + row_bin) * pooled_w * Index(r.c);
  const i32 row_begin = table.row_begins[row_bin], row_end = table.row_begins[row_bin + 1];
#pragma unroll 1
  for (u32 bin = 0; bin < pooled_w; ++bin) {
    T sum[kVector] = {};
    const i32 end = table.column_begins[bin + 1];
#pragma unroll 1
    for (i32 x = table.column_begins[bin]; x < end; ++x) {
      const Tap<T> column = table.columns[x];
#pragma unroll 4
      for (i32 y = row_begin; y < row_end; ++y) {
        const Tap<T> row = table.rows[y];
        const T weight = row.weight * column.weight;
        const Pack<Scalar, kVector> pixel =
            load_pack<kVector>(map + (Index(row.pixel) * Index(r.w) + column.pixel) * Index(r.c));
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += weight * load(pixel.at[i]);
      }
    }
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(result.at[i], sum[i]);
    store_pack<kVector>(out + Index(bin) * Index(r.c), result);
  }
}

// One sample of a map whose pixels lie `stride` apart; 0 outside.
template <class Scalar, class Index, class T = Acc<Scalar>>
__device__ __forceinline__ T sample(const Scalar* map, const Taps<T>& y, const Taps<T>& x,
                                    Index width, Index stride) {
  if (!y.inside || !x.inside) return T(0);
  const Scalar* low = map + y.low * width * stride;
  const Scalar* high = map + y.high * width * stride;
  const Index left = x.low * stride, right = x.high * stride;
  return y.weight_low * (x.weight_low * load(low[left]) + x.weight_high * load(low[right])) +
         y.weight_high * (x.weight_low * load(high[left]) + x.weight_high * load(high[right]));
}

template <class Scalar, class Index, int kPooling, bool kLast, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) direct(const Args args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const i64 pooled_h = r.pooled_h, pooled_w = r.pooled_w;
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (item >= r.k * r.c * pooled_h * pooled_w) return;
  Index rest = Index(item);
  const auto next = [&](i64 size) {
    const Index digit = rest % Index(size);
    rest /= Index(size);
    return digit;
  };
  const Index inner = kLast ? next(r.c) : 0;
  const Index column_bin = next(pooled_w), row_bin = next(pooled_h);
  const Index channel = kLast ? inner : next(r.c);
  const Window<T> window = window_of<T>(r, rest);
  const i32 rows = window.batch < 0 ? 0 : window.y.count;
  const Index plane_size = Index(r.h) * Index(r.w);
  const Index stride = kLast ? Index(r.c) : 1;
  const Scalar* map = static_cast<const Scalar*>(args.maps) +
                      (kLast ? channel : channel * plane_size) +
                      Index(window.batch < 0 ? 0 : window.batch) * Index(r.c) * plane_size;

  i32 y_first = 0, y_last = rows, x_first = 0, x_last = window.x.count;
  if (kPooling == kAverage && rows > 0) {
    sample_range(window.y, row_bin, r.h, y_first, y_last);
    sample_range(window.x, column_bin, r.w, x_first, x_last);
  }
  T result = T(0);
  i32 winner = -1;
#pragma unroll 1
  for (i32 iy = y_first; iy < y_last; ++iy) {
    const Taps<T> y = taps_at(sample_position(window.y, row_bin, iy), i32(r.h));
#pragma unroll 1
    for (i32 ix = x_first; ix < x_last; ++ix) {
      const Taps<T> x = taps_at(sample_position(window.x, column_bin, ix), i32(r.w));
      const T value = sample(map, y, x, Index(r.w), stride);
      if (kPooling == kAverage) {
        result += value;
      } else if (winner < 0 || value > result || (is_nan(value) && !is_nan(result))) {
        result = value;
        winner = iy * window.x.count + ix;
      }
    }
  }
  if (kPooling == kAverage && rows > 0) result /= T(rows) * T(window.x.count);
  store(static_cast<Scalar*>(args.bins)[item], result);
  if (kPooling == kMax) args.argmax[item] = winner;
}

// ---- backward ------------------------------------------------------------------------------------------------------

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
  i32 batch, y, x;
  i64 channel;
};

__device__ __forceinline__ bool touches(const Span& span, const TileAt& at, int tile_h,
                                        int tile_w) {
  return span.batch == at.batch && span.y_first < at.y + tile_h && span.y_last >= at.y &&
         span.x_first < at.x + tile_w && span.x_last >= at.x;
}

// Adds the average of one region to the rows of the tile that this warp owns: every kWarps-th.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kWarps,
          class T = Acc<Scalar>>
__device__ __forceinline__ void add_average(const Args& args, i64 region, const TileAt& at,
                                            Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  constexpr u32 kAll = 0xffffffffu;
  const Regions& r = args.regions;
  const Table<T> table = table_of<T>(args, region);
  const i32 n_rows = table.row_begins[r.pooled_h], n_columns = table.column_begins[r.pooled_w];
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

// Adds one region's maxima: every channel has its own winner, so each lane adds its own taps.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kWarps,
          class T = Acc<Scalar>>
__device__ __forceinline__ void add_maximum(const Args& args, i64 region, const TileAt& at,
                                            Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  const Regions& r = args.regions;
  const Window<T> window = window_of<T>(r, region);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const i32 n_bins = i32(r.pooled_h * r.pooled_w);
#pragma unroll 1
  for (i32 item = 0; item < n_bins * kLaneChannels; ++item) {
    const i32 bin = item / kLaneChannels;
    const int channel = item % kLaneChannels * kWarpSize + lane;
    if (at.channel + channel >= r.c) continue;
    const Index offset = (Index(region) * n_bins + bin) * Index(r.c) + at.channel + channel;
    const i32 winner = args.argmax[offset];
    if (winner < 0) continue;
    const i32 row_bin = bin / i32(r.pooled_w), column_bin = bin % i32(r.pooled_w);
    const Taps<T> y =
        taps_at(sample_position(window.y, row_bin, winner / window.x.count), i32(r.h));
    const Taps<T> x =
        taps_at(sample_position(window.x, column_bin, winner % window.x.count), i32(r.w));
    if (!y.inside || !x.inside) continue;
    const T gradient = load(static_cast<const Scalar*>(args.bins)[offset]);
#pragma unroll 1
    for (int corner = 0; corner < 4; ++corner) {
      const i32 local_y = (corner < 2 ? y.low : y.high) - at.y;
      const i32 local_x = (corner % 2 == 0 ? x.low : x.high) - at.x;
      if (local_y < 0 || local_y >= kTileH || local_x < 0 || local_x >= kTileW) continue;
      if (local_y % kWarps != warp) continue;
      tile.sums[(local_y * kTileW + local_x) * tile.kPitch + channel] +=
          gradient * (corner < 2 ? y.weight_low : y.weight_high) *
          (corner % 2 == 0 ? x.weight_low : x.weight_high);
    }
  }
}

template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize, class T = Acc<Scalar>>
__device__ __forceinline__ void write_tile(const Args& args, const TileAt& at,
                                           const Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  const Regions& r = args.regions;
  constexpr int kChannels = kWarpSize * kLaneChannels;
  Scalar* maps = static_cast<Scalar*>(args.maps);
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileH * kTileW * kChannels; i += kBlockSize) {
    const int channel = kLast ? i % kChannels : i / (kTileH * kTileW);
    const int pixel = kLast ? i / kChannels : i % (kTileH * kTileW);
    const i64 y = at.y + pixel / kTileW, x = at.x + pixel % kTileW, c = at.channel + channel;
    if (y >= r.h || x >= r.w || c >= r.c) continue;
    const Index offset =
        kLast ? ((Index(at.batch) * Index(r.h) + Index(y)) * Index(r.w) + Index(x)) * Index(r.c) +
                    Index(c)
              : ((Index(at.batch) * Index(r.c) + Index(c)) * Index(r.h) + Index(y)) * Index(r.w) +
                    Index(x);
    store(maps[offset], tile.sums[pixel * tile.kPitch + channel]);
  }
}

template <class Scalar, class Index, int kPooling, bool kLast, int kTileH, int kTileW,
          int kLaneChannels, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const Args args) {
  using T = Acc<Scalar>;
  using Sums = Tile<T, kTileH, kTileW, kLaneChannels>;
  constexpr int kWarps = kBlockSize / kWarpSize;
  __shared__ Sums tile;
  const Regions& r = args.regions;
  const u32 tiles_x = u32((r.w + kTileW - 1) / kTileW), tiles_y = u32((r.h + kTileH - 1) / kTileH);
  const u32 chunks = u32((r.c + Sums::kChannels - 1) / Sums::kChannels);
  u32 rest = blockIdx.x;
  TileAt at;
  at.channel = i64(rest % chunks) * Sums::kChannels;
  rest /= chunks;
  at.x = i32(rest % tiles_x) * kTileW;
  rest /= tiles_x;
  at.y = i32(rest % tiles_y) * kTileH;
  at.batch = i32(rest / tiles_y);
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
    const int slot = block_exclusive_sum<kBlockSize>(listed ? 1 : 0, tile.partial, total);
    if (listed) tile.list[slot] = i32(candidate - begin);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < total; ++i) {
      const i64 region = begin + tile.list[i];
      if constexpr (kPooling == kAverage) {
        add_average<Scalar, Index, kTileH, kTileW, kLaneChannels, kWarps>(args, region, at, tile);
      } else {
        add_maximum<Scalar, Index, kTileH, kTileW, kLaneChannels, kWarps>(args, region, at, tile);
      }
    }
  }
  __syncthreads();
  write_tile<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(args, at, tile);
}

}  // namespace torchkiln::roi_align
