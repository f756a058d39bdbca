// ps_roi_align and ps_roi_pool on the GPU. All regions take the same bin out of a map, and outputs share the geometry of
// a bin.
//
//   staged    NCHW, maps that fit into shared memory: a block keeps those of kMaps outputs of one bin and walks all
//             regions; one thread, one region, its geometry included
//   staged_backward  NCHW: the same for the gradient of these maps, or of a tile of them. A warp owns a few rows and adds
//             the regions that touch them in order, lanes on pixels. Each pixel is written once: no atomics, no zero fill,
//             the same bits every time
//
// The others go by the tables of roi_align, what a bin takes of rows and of columns, as staged_backward does too:
//
//   tables    one thread per bin of an axis of a region: merged samples, or whole cells
//   forward   a block stays on the maps of a row of bins (channels that are neighbours) and walks all regions of their
//             image, so that these maps are fetched from L2 once and then hit L1; one thread, one bin
//   backward  channels_last: roi_align's tiles of the gradient, lanes on channels. A lane's bin is that of its channel, so
//             it adds its own taps; gradients of bins lie as channels do, and are read as one piece
// spills: up to 20 bytes in staged_backward, by ptxas' own choice: no kernel asks for a number of blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/ps_roi_pool.h"
#include "detection/roi_align.cuh"

namespace torchkiln::ps_roi_pool {

using roi_align::AxisBin;
using roi_align::Span;
using roi_align::Table;
using roi_align::Tile;
using roi_align::TileAt;

template <class Scalar, int kPooling, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) tables(const Args args) {
  using T = Acc<Scalar>;
  const AxisBin at = roi_align::own_bin<kBlockSize>(args.regions, blockIdx.x);
  if (at.region >= args.regions.k) return;
  const i32 image = roi_align::image_of<T>(args.regions, at.region);
  const auto write = [&](auto axis) {
    if (image < 0) clear(axis);
    roi_align::write_taps<T>(args, args.regions, at, axis, image);
  };
  if constexpr (kPooling == kSamples) {
    write(roi_align::axis_at<T>(args.regions, at.region, at.columns));
  } else {
    write(cells_at<T>(args, at.region, at.columns));
  }
}

// ---- maps in shared memory -----------------------------------------------------------------------------------------

// The maps of a block: `count` outputs from `output` on of one bin of an image.
struct OwnMaps {
  i32 image, bin, row_bin, column_bin, output, count, bins;

  // Of the map number m.
  __device__ __forceinline__ i32 channel(i32 m) const { return (output + m) * bins + bin; }
};

// Neighbouring blocks have neighbouring bins. `block` becomes the number among the blocks on the same maps.
template <int kMaps>
__device__ __forceinline__ OwnMaps own_maps(const Regions& r, u32& block) {
  OwnMaps own;
  own.bins = i32(r.pooled_h * r.pooled_w);
  const i32 outputs = i32(r.c) / own.bins;
  const u32 groups = u32(outputs + kMaps - 1) / kMaps;
  own.bin = i32(block % u32(own.bins));
  block /= u32(own.bins);
  own.output = i32(block % groups) * kMaps;
  block /= groups;
  own.image = i32(block % u32(r.n));
  block /= u32(r.n);
  own.row_bin = own.bin / i32(r.pooled_w);
  own.column_bin = own.bin - own.row_bin * i32(r.pooled_w);
  own.count = min_of(outputs - own.output, kMaps);
  return own;
}

// The averages of a bin's samples, or cells, on kMaps maps that lie `pitch` apart.
template <class Scalar, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ void average_samples(const Args& args, i64 region, const OwnMaps& own,
                                                const Scalar* cells, i32 pitch, T* sums) {
  const Regions& r = args.regions;
  const i32 width = i32(r.w);
  const roi_align::Axis<T> y = roi_align::axis_at<T>(r, region, false);
  const roi_align::Axis<T> x = roi_align::axis_at<T>(r, region, true);
  if (is_empty(y) || is_empty(x)) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) sums[m] = T(args.of_none);
    return;
  }
  const T share_y = T(1) / T(y.count), share_x = T(1) / T(x.count);
  i32 y_first, y_last, x_first, x_last;
  sample_range(y, own.row_bin, r.h, y_first, y_last);
  sample_range(x, own.column_bin, r.w, x_first, x_last);
#pragma unroll 1
  for (i32 i = y_first; i < y_last; ++i) {
    const Taps<T> row = taps_at(sample_position(y, own.row_bin, i), i32(r.h));
    if (!row.inside) continue;
    const Scalar* low = cells + row.low * width;
    const Scalar* high = cells + row.high * width;
    const T of_low = row.weight_low * share_y, of_high = row.weight_high * share_y;
#pragma unroll 1
    for (i32 j = x_first; j < x_last; ++j) {
      const Taps<T> column = taps_at(sample_position(x, own.column_bin, j), width);
      if (!column.inside) continue;
      const T left = column.weight_low * share_x, right = column.weight_high * share_x;
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
        const i32 at = m * pitch;
        sums[m] +=
            of_low * (left * load(low[at + column.low]) + right * load(low[at + column.high]));
        sums[m] +=
            of_high * (left * load(high[at + column.low]) + right * load(high[at + column.high]));
      }
    }
  }
}
template <class Scalar, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ void average_cells(const Args& args, i64 region, const OwnMaps& own,
                                              const Scalar* cells, i32 pitch, T* sums) {
  const i32 width = i32(args.regions.w);
  const Range rows = cells_at<T>(args, region, false).bins.bin_of(own.row_bin);
  const Range columns = cells_at<T>(args, region, true).bins.bin_of(own.column_bin);
  if (rows.is_empty() || columns.is_empty()) return;
  const T share_y = T(1) / T(rows.end - rows.begin),
          share_x = T(1) / T(columns.end - columns.begin);
#pragma unroll 1
  for (i32 y = rows.begin; y < rows.end; ++y) {
    T of_row[kMaps] = {};
#pragma unroll 1
    for (i32 x = columns.begin; x < columns.end; ++x) {
#pragma unroll
      for (int m = 0; m < kMaps; ++m) of_row[m] += share_x * load(cells[m * pitch + y * width + x]);
    }
#pragma unroll
    for (int m = 0; m < kMaps; ++m) sums[m] += share_y * of_row[m];
  }
}

// Grid: x over groups of kMaps maps, y over groups of regions. Dynamic shared memory: the maps.
template <class Scalar, class Index, int kPooling, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged(const Args args) {
  using T = Acc<Scalar>;
  extern __shared__ uint4 memory[];
  Scalar* cells = reinterpret_cast<Scalar*>(memory);
  const Regions& r = args.regions;
  u32 block = blockIdx.x;
  const OwnMaps own = own_maps<kMaps>(r, block);
  const i32 size = i32(r.h * r.w), pitch = roi_align::band_pitch(i32(r.h), i32(r.w));
  const Scalar* maps = static_cast<const Scalar*>(args.maps) + Index(own.image) * Index(r.c) * size;
#pragma unroll 1
  for (i32 m = 0; m < own.count; ++m) {
    roi_align::stage<kBlockSize>(maps + Index(own.channel(m)) * size, size, cells + m * pitch);
  }
  // Those that are not there are read all the same.
#pragma unroll 1
  for (i32 i = own.count * pitch + threadIdx.x; i < kMaps * pitch; i += kBlockSize) {
    store(cells[i], T(0));
  }
  __syncthreads();
#pragma unroll 1
  for (i64 region = i64(blockIdx.y) * kBlockSize + threadIdx.x; region < r.k;
       region += i64(gridDim.y) * kBlockSize) {
    const i32 home = roi_align::image_of<T>(r, region);
    // The bins of a region of no image are zeros; the blocks of the first one write them.
    if (home != own.image && !(home < 0 && own.image == 0)) continue;
    T sums[kMaps] = {};
    if (home < 0) {
    } else if constexpr (kPooling == kSamples) {
      average_samples<Scalar, kMaps>(args, region, own, cells, pitch, sums);
    } else {
      average_cells<Scalar, kMaps>(args, region, own, cells, pitch, sums);
    }
    const Index first = Index(region) * Index(r.c);
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      if (m >= own.count) break;
      const i32 channel = own.channel(m);
      store(static_cast<Scalar*>(args.bins)[first + channel], sums[m]);
      if (args.channels) args.channels[first + channel] = channel;
    }
  }
}

// One region's bin on the maps of a block.
template <class T, int kMaps>
struct Entry {
  i32 region, y_first, y_last;
  Range rows, columns;  // of taps
  T gradients[kMaps];
};

// The tile of a block, and the sums of kMaps maps there.
template <class T>
struct OwnTile {
  T* sums;
  i32 pitch;  // of maps
  i32 y, x, height, width;

  __device__ __forceinline__ bool has_column(i32 pixel) const {
    return pixel >= x && pixel < x + width;
  }
};

template <class Scalar, class Index, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ bool make_entry(const Args& args, const OwnMaps& own,
                                           const OwnTile<T>& tile, i64 region,
                                           Entry<T, kMaps>& entry) {
  const Regions& r = args.regions;
  if (region >= r.k || static_cast<const Span*>(args.spans)[region].image != own.image)
    return false;
  const Table<T> table = roi_align::table_of<T>(args, region);
  entry.region = i32(region);
  entry.rows = table.row_bins[own.row_bin];
  entry.columns = table.column_bins[own.column_bin];
  const Scalar* gradients = static_cast<const Scalar*>(args.bins) + Index(region) * Index(r.c);
#pragma unroll
  for (int m = 0; m < kMaps; ++m) {
    entry.gradients[m] = m < own.count ? load(gradients[own.channel(m)]) : T(0);
  }
  if (entry.rows.is_empty() || entry.columns.is_empty()) return false;
  entry.y_first = table.rows[entry.rows.begin].pixel;
  entry.y_last = table.rows[entry.rows.end - 1].pixel;
  return entry.y_first < tile.y + tile.height && entry.y_last >= tile.y &&
         table.columns[entry.columns.begin].pixel < tile.x + tile.width &&
         table.columns[entry.columns.end - 1].pixel >= tile.x;
}

// Lanes lie over the taps of a bin as 4 rows of 8 columns.
constexpr i32 kLaneColumns = 8, kLaneRows = kWarpSize / kLaneColumns;

template <class T>
struct LaneTaps {
  Tap<T> row, column;  // the lane's first ones
};
template <class T, int kMaps>
__device__ __forceinline__ LaneTaps<T> first_taps(const Args& args, const Entry<T, kMaps>& entry) {
  const i32 lane = threadIdx.x % kWarpSize;
  const Table<T> table = roi_align::table_of<T>(args, entry.region);
  const i32 y = entry.rows.begin + lane / kLaneColumns;
  const i32 x = entry.columns.begin + lane % kLaneColumns;
  return {y < entry.rows.end ? table.rows[y] : Tap<T>{T(0), -1, 0},
          x < entry.columns.end ? table.columns[x] : Tap<T>{T(0), -1, 0}};
}

// Adds a bin to rows y_first to y_last of a tile. No pixel is two lanes'.
template <class T, int kMaps>
__device__ __forceinline__ void add_bin(const Args& args, const Entry<T, kMaps>& entry,
                                        const LaneTaps<T>& first, const OwnTile<T>& tile,
                                        i32 y_first, i32 y_last) {
  const i32 lane = threadIdx.x % kWarpSize;
  const Table<T> table = roi_align::table_of<T>(args, entry.region);
  Tap<T> row = first.row;
#pragma unroll 1
  for (i32 y = entry.rows.begin + lane / kLaneColumns; y < entry.rows.end;) {
    if (row.pixel >= y_first && row.pixel <= y_last) {
      T* of_row = tile.sums + (row.pixel - tile.y) * tile.width - tile.x;
      Tap<T> column = first.column;
#pragma unroll 1
      for (i32 x = entry.columns.begin + lane % kLaneColumns; x < entry.columns.end;) {
        if (tile.has_column(column.pixel)) {
          const T weight = row.weight * column.weight;
#pragma unroll
          for (int m = 0; m < kMaps; ++m) {
            of_row[m * tile.pitch + column.pixel] += weight * entry.gradients[m];
          }
        }
        x += kLaneColumns;
        if (x < entry.columns.end) column = table.columns[x];
      }
    }
    y += kLaneRows;
    if (y < entry.rows.end) row = table.rows[y];
  }
}

template <class Scalar, class Index, class T = Acc<Scalar>>
__device__ __forceinline__ OwnTile<T> own_tile(const Regions& r, u32 block, void* sums) {
  const TileSize size = tile_size(r.h, r.w);
  const u32 across = u32((r.w + size.width - 1) / size.width);
  const i32 y = i32(block / across) * size.height, x = i32(block % across) * size.width;
  const i32 height = min_of(size.height, i32(r.h) - y), width = min_of(size.width, i32(r.w) - x);
  return {static_cast<T*>(sums), height * width, y, x, height, width};
}

// Grid: one-dimensional, groups of kMaps maps for each tile. Dynamic shared memory: the sums of a tile.
template <class Scalar, class Index, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged_backward(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kWarps = kBlockSize / kWarpSize;
  extern __shared__ uint4 memory[];
  __shared__ Entry<T, kMaps> entries[kBlockSize];
  __shared__ int partial[kWarps];
  const Regions& r = args.regions;
  u32 block = blockIdx.x;
  const OwnMaps own = own_maps<kMaps>(r, block);
  const OwnTile<T> tile = own_tile<Scalar, Index>(r, block, memory);
  const i32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const i32 rows = (tile.height + kWarps - 1) / kWarps;
  const i32 y_first = tile.y + warp * rows;
  const i32 y_last = min_of(y_first + rows, tile.y + tile.height) - 1;
#pragma unroll 1
  for (i32 i = threadIdx.x; i < kMaps * tile.pitch; i += kBlockSize) tile.sums[i] = T(0);
#pragma unroll 1
  for (i64 begin = 0; begin < r.k; begin += kBlockSize) {
    Entry<T, kMaps> own_entry;
    const bool listed =
        make_entry<Scalar, Index, kMaps>(args, own, tile, begin + threadIdx.x, own_entry);
    int total;
    const int slot = block_exclusive_sum<kBlockSize>(listed ? 1 : 0, partial, total);
    if (listed) entries[slot] = own_entry;
    __syncthreads();
#pragma unroll 1
    for (i32 base = 0; base < total; base += kWarpSize) {
      const i32 at = base + lane;
      u32 rest = __ballot_sync(0xffffffffu, at < total && entries[at].y_first <= y_last &&
                                                entries[at].y_last >= y_first);
      if (rest == 0) continue;
      // The taps of the next region are on their way while one is added.
      LaneTaps<T> next = first_taps(args, entries[base + __ffs(rest) - 1]);
#pragma unroll 1
      while (rest != 0) {
        const Entry<T, kMaps>& entry = entries[base + __ffs(rest) - 1];
        const LaneTaps<T> taps = next;
        rest &= rest - 1;
        if (rest != 0) next = first_taps(args, entries[base + __ffs(rest) - 1]);
        add_bin(args, entry, taps, tile, y_first, y_last);
        __syncwarp();
      }
    }
  }
  __syncthreads();
  const Index size = Index(r.h) * Index(r.w);
  Scalar* maps = static_cast<Scalar*>(args.maps) + Index(own.image) * Index(r.c) * size +
                 Index(tile.y) * Index(r.w) + tile.x;
  const float inverse = 1.0f / static_cast<float>(tile.width);
#pragma unroll 1
  for (i32 m = 0; m < own.count; ++m) {
    Scalar* map = maps + Index(own.channel(m)) * size;
#pragma unroll 4
    for (i32 i = threadIdx.x; i < tile.pitch; i += kBlockSize) {
      const i32 y = quotient(i, inverse);
      store(map[y * Index(r.w) + (i - y * tile.width)], tile.sums[m * tile.pitch + i]);
    }
  }
}

// ---- by tables -----------------------------------------------------------------------------------------------------

// Grid: x over the rows of bins of the outputs of all images, y over groups of regions.
template <class Scalar, class Index, bool kLast, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const i32 pooled_h = i32(r.pooled_h), pooled_w = i32(r.pooled_w);
  const i32 rows_of_bins = i32(r.c) / pooled_w, outputs = rows_of_bins / pooled_h;
  const i32 image = blockIdx.x / rows_of_bins, row_of_bins = blockIdx.x % rows_of_bins;
  const i32 output = row_of_bins / pooled_h, row_bin = row_of_bins % pooled_h;
  const Index map_size = Index(r.h) * Index(r.w), stride = kLast ? Index(r.c) : 1;
  const Scalar* maps = static_cast<const Scalar*>(args.maps) + Index(image) * Index(r.c) * map_size;
  const i32 across = min_of(pooled_w, kBlockSize), step = kBlockSize / across;
  const i32 first = threadIdx.x / across, first_bin = threadIdx.x % across;
  if (first >= step) return;
#pragma unroll 1
  for (i64 region = i64(blockIdx.y) * step + first; region < r.k; region += i64(gridDim.y) * step) {
    const Span span = static_cast<const Span*>(args.spans)[region];
    const i32 home = span.image;
    // A region of no image has no taps; the blocks of the first image write its zeros.
    if (home != image && !(home < 0 && image == 0)) continue;
    const Table<T> table = roi_align::table_of<T>(args, region);
    const Range rows = table.row_bins[row_bin];
    const bool none = home >= 0 && (span.y_last < span.y_first || span.x_last < span.x_first);
#pragma unroll 1
    for (i32 bin = first_bin; bin < pooled_w; bin += across) {
      const i32 channel = row_of_bins * pooled_w + bin;
      const Scalar* map = maps + (kLast ? Index(channel) : Index(channel) * map_size);
      const Range columns = table.column_bins[bin];
      T sum = none ? T(args.of_none) : T(0);
#pragma unroll 1
      for (i32 x = none ? columns.end : columns.begin; x < columns.end; ++x) {
        const Tap<T> column = table.columns[x];
        T of_column = T(0);
#pragma unroll 4
        for (i32 y = rows.begin; y < rows.end; ++y) {
          const Tap<T> row = table.rows[y];
          of_column +=
              row.weight * load(map[(Index(row.pixel) * Index(r.w) + column.pixel) * stride]);
        }
        sum += column.weight * of_column;
      }
      const Index at = kLast ? (Index(region) * (pooled_h * pooled_w) + row_bin * pooled_w + bin) *
                                       Index(outputs) +
                                   output
                             : Index(region) * Index(r.c) + channel;
      store(static_cast<Scalar*>(args.bins)[at], sum);
      if (args.channels) args.channels[at] = channel;
    }
  }
}

// Adds one region to the rows of the tile that this warp owns.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kWarps,
          class T = Acc<Scalar>>
__device__ __forceinline__ void add_region(const Args& args, i64 region, const TileAt& at,
                                           Tile<T, kTileH, kTileW, kLaneChannels>& tile) {
  const Regions& r = args.regions;
  const i32 pooled_h = i32(r.pooled_h), pooled_w = i32(r.pooled_w);
  const Table<T> table = roi_align::table_of<T>(args, region);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Scalar* bins = static_cast<const Scalar*>(args.bins) + Index(region) * Index(r.c);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const i64 channel = at.channel + lane + i * kWarpSize;
    if (channel >= r.c) continue;
    const i32 row_of_bins = i32(channel) / pooled_w, bin = i32(channel) - row_of_bins * pooled_w;
    const Range rows = table.row_bins[row_of_bins % pooled_h], columns = table.column_bins[bin];
    const T gradient = load(bins[channel]);
#pragma unroll 1
    for (i32 y = rows.begin; y < rows.end; ++y) {
      const Tap<T> row = table.rows[y];
      const i32 local_y = row.pixel - at.y;
      if (local_y < 0 || local_y >= kTileH || local_y % kWarps != warp) continue;
      const T of_row = row.weight * gradient;
      T* sums = tile.sums + local_y * kTileW * tile.kPitch + i * kWarpSize + lane;
#pragma unroll 1
      for (i32 x = columns.begin; x < columns.end; ++x) {
        const Tap<T> column = table.columns[x];
        const i32 local_x = column.pixel - at.x;
        if (local_x < 0 || local_x >= kTileW) continue;
        sums[local_x * tile.kPitch] += column.weight * of_row;
      }
    }
  }
}

// Maps of channels_last; the gradient of bins comes channels first all the same.
template <class Scalar, class Index, int kTileH, int kTileW, int kLaneChannels, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const Args args) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const auto add = [&](i64 region, const TileAt& at, auto& tile) {
    add_region<Scalar, Index, kTileH, kTileW, kLaneChannels, kWarps>(args, region, at, tile);
  };
  roi_align::gather_tile<Scalar, Index, true, kTileH, kTileW, kLaneChannels, kBlockSize>(
      args, args.regions, args.maps, blockIdx.x, 0, add);
}

}  // namespace torchkiln::ps_roi_pool
