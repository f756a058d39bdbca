// ps_roi_align and ps_roi_pool on the GPU. All regions take the same bin out of a map, and outputs share the geometry of
// a bin.
//
//   staged    NCHW, maps that fit into shared memory: a block keeps those of kMaps outputs of one bin and walks all
//             regions; one thread, one region, its geometry included
//
// The others go by the tables of roi_align, what a bin takes of rows and of columns:
//
//   tables    one thread per bin of an axis of a region: merged samples, or whole cells
//   forward   a block stays on the maps of a row of bins (channels that are neighbours) and walks all regions of their
//             image, so that these maps are fetched from L2 once and then hit L1; one thread, one bin
//
// Maps in channels_last are copied for the staged one: those of one bin lie far apart there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/ps_roi_pool.h"
#include "detection/roi_align.cuh"

namespace torchkiln::ps_roi_pool {

using roi_align::AxisBin;
using roi_align::Span;
using roi_align::Table;

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

// ---- forward: maps in shared memory -----------------------------------------------------------------------------------------

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
  const i32 outputs = divided(i32(r.c), own.bins);
  const u32 groups = u32(outputs + kMaps - 1) / kMaps;
  own.bin = i32(block % u32(own.bins));
  block /= u32(own.bins);
  own.output = i32(block % groups) * kMaps;
  block /= groups;
  own.image = i32(block % u32(r.n));
  block /= u32(r.n);
  own.row_bin = divided(own.bin, i32(r.pooled_w));
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
  const T share_y = count_quotient(T(1), T(y.count));
  const T share_x = count_quotient(T(1), T(x.count));
  i32 y_first, y_last, x_first, x_last;
  sample_range(y, own.row_bin, r.h, y_first, y_last);
  sample_range(x, own.column_bin, r.w, x_first, x_last);
#pragma unroll 1
  for (i32 i = y_first; i < y_last; ++i) {
    const Taps<T> row = sample_taps(y, own.row_bin, i, r.h);
    if (!row.inside) continue;
    const Scalar* low = cells + row.low * width;
    const Scalar* high = cells + row.high * width;
    const T of_low = row.weight_low * share_y, of_high = row.weight_high * share_y;
#pragma unroll 1
    for (i32 j = x_first; j < x_last; ++j) {
      const Taps<T> column = sample_taps(x, own.column_bin, j, width);
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
  const T share_y = count_quotient(T(1), T(rows.end - rows.begin));
  const T share_x = count_quotient(T(1), T(columns.end - columns.begin));
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

// Copies maps that lie `step` apart to shared memory, kWidth elements at once, those of all maps in flight together. In the
// place of those that are not there stands the last one: they are read all the same.
template <int kWidth, int kMaps, int kBlockSize, class Scalar, class Index>
__device__ __forceinline__ void copy_maps(const Scalar* from, Index step, i32 count, i32 size,
                                          Scalar* to, i32 pitch) {
  struct Cells {
    Pack<Scalar, kWidth> of_map[kMaps];
  };
  const auto load_cells = [&](i32 i) {
    Cells cells;
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      cells.of_map[m] = load_pack<kWidth>(from + min_of(m, count - 1) * step + i * kWidth);
    }
    return cells;
  };
  const auto store_cells = [&](i32 i, const Cells& cells) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      store_pack<kWidth>(to + m * pitch + i * kWidth, cells.of_map[m]);
    }
  };
  at_once<4, kBlockSize>(size / kWidth, load_cells, store_cells);
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
  const Index step = Index(own.bins) * size;
  const Scalar* first = maps + Index(own.channel(0)) * size;
  if (size % 2 == 0 && reinterpret_cast<u64>(first) % (2 * sizeof(Scalar)) == 0) {
    copy_maps<2, kMaps, kBlockSize>(first, step, own.count, size, cells, pitch);
  } else {
    copy_maps<1, kMaps, kBlockSize>(first, step, own.count, size, cells, pitch);
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
      const Index at =
          first + (args.bins_last ? own.bin * i32(args.outputs) + own.output + m : channel);
      store(static_cast<Scalar*>(args.bins)[at], sums[m]);
      if (args.channels) args.channels[at] = channel;
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
  const i32 rows_of_bins = divided(i32(r.c), pooled_w), outputs = divided(rows_of_bins, pooled_h);
  const i32 image = divided(i32(blockIdx.x), rows_of_bins);
  const i32 row_of_bins = i32(blockIdx.x) - image * rows_of_bins;
  const i32 output = divided(row_of_bins, pooled_h), row_bin = row_of_bins - output * pooled_h;
  const Index map_size = Index(r.h) * Index(r.w), stride = kLast ? Index(r.c) : 1;
  const Scalar* maps = static_cast<const Scalar*>(args.maps) + Index(image) * Index(r.c) * map_size;
  const i32 across = min_of(pooled_w, kBlockSize), step = divided(kBlockSize, across);
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

}  // namespace torchkiln::ps_roi_pool
