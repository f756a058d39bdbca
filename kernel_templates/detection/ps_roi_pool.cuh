// ps_roi_align and ps_roi_pool on the GPU, by the tables of roi_align: what a bin takes of rows and of columns.
//
//   tables    one thread per bin of an axis of a region: merged samples, or whole cells
//   forward   a block stays on the maps of a row of bins (channels that are neighbours) and walks all regions of their
//             image, so that these maps are fetched from L2 once and then hit L1; one thread, one bin
//   backward  roi_align's tiles of the gradient, lanes on channels. A lane's bin is that of its channel, so it adds its
//             own taps; gradients of bins lie as channels do, and are read as one piece. No atomics, no zero fill, the
//             same bits every time
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

// The gradient of bins comes channels first, whatever the layout of the maps.
template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const Args args) {
  constexpr int kWarps = kBlockSize / kWarpSize;
  const auto add = [&](i64 region, const TileAt& at, auto& tile) {
    add_region<Scalar, Index, kTileH, kTileW, kLaneChannels, kWarps>(args, region, at, tile);
  };
  roi_align::gather_tile<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels, kBlockSize>(
      args, args.regions, args.maps, blockIdx.x, 0, add);
}

}  // namespace torchkiln::ps_roi_pool
