// prroi_pool on the GPU, by roi_align's table with other taps: as many as a bin has pixels.
//
//   tables    one thread per bin of an axis of a region: the integral of each pixel's interpolation
//   lists     the same, and what each band of a map has to do
//   staged    NCHW: a block keeps bands of kMaps maps in shared memory. A warp takes a row of bins: lanes are neighbouring
//             columns, which they sum over the rows, so that a pixel is read once for all bins of the row; four lanes a bin
//             then sum over its columns
//             (averages on channels_last, or where no band fits, are roi_align's last and planes; the gradient of maps is
//             its backward)
//   boxes     the gradient of boxes, one block a region: a thread goes through bins of channels with their edges, then
//             the block sums in a fixed order
// spills: up to 36 bytes where 1024 threads leave 64 registers each, and by ptxas' own choice in lists.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "detection/prroi_pool.h"
#include "detection/roi_align.cuh"

namespace torchkiln::prroi_pool {

using roi_align::Args;
using roi_align::AxisBin;
using roi_align::Span;
using roi_align::Table;

template <class T, int kBlockSize, class AnyArgs>
__device__ __forceinline__ void write_table(const AnyArgs& args, u32 block) {
  const AxisBin at = roi_align::own_bin<kBlockSize>(args.regions, block);
  if (at.region >= args.regions.k) return;
  const i32 image = roi_align::image_of<T>(args.regions, at.region);
  Edges<T> axis = edges_at<T>(args.regions, at.region, at.columns);
  if (image < 0) clear(axis);
  roi_align::write_taps<T>(args, args.regions, at, axis, image);
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) tables(const Args args) {
  write_table<Acc<Scalar>, kBlockSize>(args, blockIdx.x);
}

// Where the bands begin for a region's rows of bins.
template <class T>
struct RowsOfBins {
  i32 image, size;
  Edges<T> axis;
  Bands cut;

  __device__ __forceinline__ Range bands(i32 row) const {
    const i32 band = is_empty(axis) ? 0 : band_of(cut, first_pixel(axis, row, size));
    return {band, band + 1};
  }
};

// Grid: one block per band of each image, then one thread per bin of an axis of a region.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) lists(const StagedArgs args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const i32 bands = args.list.bands.count, of_bands = bands * i32(r.n);
  if (i32(blockIdx.x) >= of_bands) {
    write_table<T, kBlockSize>(args, blockIdx.x - of_bands);
    return;
  }
  const auto rows_of = [&](i64 region) {
    const i32 image = roi_align::image_of<T>(r, region);
    // The bins of a region of no image are zeros; somebody has to write them.
    RowsOfBins<T> rows = {max_of(image, 0), i32(r.h), edges_at<T>(r, region, false),
                          args.list.bands};
    if (image < 0) clear(rows.axis);
    return rows;
  };
  list_band<kBlockSize>(args.list, r.k, i32(r.pooled_h), blockIdx.x / bands, blockIdx.x % bands,
                        rows_of);
}

constexpr int kLaneColumns = 2, kStripe = kLaneColumns * kWarpSize;  // columns of a warp at a time

// The band of a block.
template <class Scalar>
struct OwnBand {
  const Scalar* cells;  // of the first map, which the others follow
  const Scalar* map;    // all of it in memory
  i32 pitch, top, height, width;
};

// Adds rows begin to end to the sums of a lane's columns, of which `columns` are there; lane i has the weight of row i.
template <int kUnrolled, class Scalar, class Index, class T, int kMaps>
__device__ __forceinline__ void add_rows(const Scalar* from, Index pitch, i32 width, T weights,
                                         i32 begin, i32 end, i32 columns,
                                         T (&sums)[kMaps][kLaneColumns]) {
#pragma unroll kUnrolled
  for (i32 i = begin; i < end; ++i, from += width) {
    const T weight = __shfl_sync(0xffffffffu, weights, i);
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      if (j >= columns) break;
#pragma unroll
      for (int m = 0; m < kMaps; ++m) sums[m][j] += weight * load(from[m * pitch + j * kWarpSize]);
    }
  }
}

// The sums of a lane's columns over the rows of a bin, which are neighbours. Their taps come at once, one a lane.
template <class Scalar, class Index, int kMaps, class T = Acc<Scalar>>
__device__ __forceinline__ void sum_rows(const OwnBand<Scalar>& band, Index map_size,
                                         const Tap<T>* taps, i32 count, i32 x, i32 columns,
                                         T (&sums)[kMaps][kLaneColumns]) {
#pragma unroll 1
  for (i32 base = 0; base < count; base += kWarpSize) {
    const i32 lane = threadIdx.x % kWarpSize, rows = min_of(count - base, i32(kWarpSize));
    const Tap<T> own = lane < rows ? taps[base + lane] : Tap<T>{T(0), 0, 0};
    const i32 first = __shfl_sync(0xffffffffu, own.pixel, 0);
    const i32 in_band = min_of(max_of(band.top + band.height - first, 0), rows);
    add_rows<4>(band.cells + (first - band.top) * band.width + x, band.pitch, band.width,
                own.weight, 0, in_band, columns, sums);
    // A bin that ends below the band, which is rare: out of the whole map.
    add_rows<1>(band.map + Index(first + in_band) * band.width + x, map_size, band.width,
                own.weight, in_band, rows, columns, sums);
  }
}

// Grid: one block per band of kMaps maps. Dynamic shared memory: their bands.
template <class Scalar, class Index, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged(const StagedArgs args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize, kBins = kWarpSize / roi_align::kLanesPerBin;
  extern __shared__ uint4 memory[];
  __shared__ T stripes[kWarps][kMaps][kStripe];
  const Regions& r = args.regions;
  const BandList& list = args.list;
  const i32 group = divided(i32(blockIdx.x), list.bands.count), plane = group * kMaps;
  const i32 number = i32(blockIdx.x) - group * list.bands.count;
  const i32 image = divided(plane, i32(r.c)), channel = plane - image * i32(r.c);
  const Range part = list.parts[image * list.bands.count + number];
  if (part.is_empty()) return;
  const Index map_size = Index(r.h) * Index(r.w);
  OwnBand<Scalar> band;
  band.cells = reinterpret_cast<Scalar*>(memory);
  band.map = static_cast<const Scalar*>(args.maps) + Index(plane) * map_size;
  band.width = i32(r.w);
  band.pitch = roi_align::band_pitch(list.bands.height, band.width);
  band.top = number * list.bands.step;
  band.height = min_of(list.bands.height, i32(r.h) - band.top);
#pragma unroll 1
  for (int m = 0; m < kMaps; ++m) {
    roi_align::stage<kBlockSize>(band.map + m * map_size + Index(band.top) * band.width,
                                 band.height * band.width,
                                 reinterpret_cast<Scalar*>(memory) + m * band.pitch);
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, warp = warp_number();
  const int sub = lane % roi_align::kLanesPerBin;
  const i32 pooled_w = i32(r.pooled_w);
  const Index bins = Index(r.pooled_h) * pooled_w;
  Scalar* all_bins = static_cast<Scalar*>(args.bins) + channel * bins;
  BandEntry next = list.entries[min_of(part.begin + warp, part.end - 1)];
#pragma unroll 1
  for (i32 i = part.begin + warp; i < part.end; i += kWarps) {
    const BandEntry entry = next;
    next = list.entries[min_of(i + kWarps, part.end - 1)];
    const Table<T> table = roi_align::table_of<T>(args, entry.region);
    const Span span = static_cast<const Span*>(args.spans)[entry.region];
    const Range rows = table.row_bins[entry.row];
    Scalar* out = all_bins + Index(entry.region) * Index(r.c) * bins + entry.row * pooled_w;
#pragma unroll 1
    for (i32 first_bin = 0; first_bin < pooled_w; first_bin += kBins) {
      const i32 bin = first_bin + lane / roi_align::kLanesPerBin;
      const bool has_bin = bin < pooled_w;
      const Range columns = has_bin ? table.column_bins[bin] : Range{0, 0};
      // A bin's columns are neighbours; the lane's first two are on their way while it sums rows.
      constexpr i32 kStep = roi_align::kLanesPerBin;
      const i32 own = columns.begin + sub;
      const Tap<T> first = own < columns.end ? table.columns[own] : Tap<T>{T(0), 0, 0};
      const T second = own + kStep < columns.end ? table.columns[own + kStep].weight : T(0);
      T sums[kMaps] = {};
#pragma unroll 1
      for (i32 x = rows.is_empty() ? span.x_last + 1 : span.x_first; x <= span.x_last;
           x += kStripe) {
        T of_columns[kMaps][kLaneColumns] = {};
        const i32 columns_left = span.x_last - x - lane + kWarpSize;
        sum_rows<Scalar, Index, kMaps>(band, map_size, table.rows + rows.begin,
                                       rows.end - rows.begin, x + lane, columns_left / kWarpSize,
                                       of_columns);
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
#pragma unroll
          for (int j = 0; j < kLaneColumns; ++j) {
            stripes[warp][m][lane + j * kWarpSize] = of_columns[m][j];
          }
        }
        __syncwarp();
        i32 at = first.pixel - x;
#pragma unroll 1
        for (i32 c = own; c < columns.end; c += kStep, at += kStep) {
          if (at < 0 || at >= kStripe) continue;
          const T weight =
              c == own ? first.weight : (c == own + kStep ? second : table.columns[c].weight);
#pragma unroll
          for (int m = 0; m < kMaps; ++m) sums[m] += weight * stripes[warp][m][at];
        }
        __syncwarp();
      }
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
#pragma unroll
        for (int offset = roi_align::kLanesPerBin / 2; offset > 0; offset /= 2) {
          sums[m] += __shfl_xor_sync(0xffffffffu, sums[m], offset);
        }
        if (sub == 0 && has_bin) store(out[m * bins + bin], sums[m]);
      }
    }
  }
}

template <class Scalar, class Index, bool kLast, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) boxes(const BoxArgs args) {
  using T = Acc<Scalar>;
  __shared__ T shared[kBlockSize / kWarpSize];
  const Regions& r = args.regions;
  const i64 region = blockIdx.x;
  const i32 image = static_cast<const roi_align::Span*>(args.spans)[region].image;
  const auto table = roi_align::table_of<T>(args, region);
  const Edges<T> y = edges_at<T>(r, region, false), x = edges_at<T>(r, region, true);
  const i32 pooled_w = i32(r.pooled_w), n_bins = i32(r.pooled_h) * pooled_w;
  const i32 channels = i32(r.c);
  const Index map_size = Index(r.h) * Index(r.w), stride = kLast ? Index(r.c) : 1;
  const Scalar* maps =
      static_cast<const Scalar*>(args.maps) + Index(max_of(image, 0)) * Index(r.c) * map_size;
  const Scalar* gradients =
      static_cast<const Scalar*>(args.gradients) + Index(region) * Index(r.c) * n_bins;
  T sums[4] = {};  // of x1, y1, x2, y2
  const bool exists = image >= 0 && !is_empty(y) && !is_empty(x);
#pragma unroll 1
  for (i64 item = exists ? threadIdx.x : i64(channels) * n_bins; item < i64(channels) * n_bins;
       item += kBlockSize) {
    const i64 within = kLast ? channels : n_bins, outer = divided(item, within);
    const i32 inner = i32(item - outer * within);
    const i32 channel = kLast ? inner : i32(outer), bin = kLast ? i32(outer) : inner;
    const i32 row_bin = divided(bin, pooled_w), column_bin = bin - row_bin * pooled_w;
    const Scalar* map = maps + (kLast ? Index(channel) : Index(channel) * map_size);
    const Range rows = table.row_bins[row_bin], columns = table.column_bins[column_bin];
    const auto value = [&](i32 row, i32 column) {
      return T(load(map[(Index(row) * Index(r.w) + column) * stride]));
    };
    const Average<T> a =
        average_of(y, x, row_bin, column_bin, table.rows + rows.begin, rows.end - rows.begin,
                   table.columns + columns.begin, columns.end - columns.begin, value);
    const T gradient = load(gradients[item]), scale = T(r.spatial_scale) * gradient;
    const CornerGradient<T> of_x =
        corner_gradient(x, column_bin, r.pooled_w, a.whole, a.left, a.right, scale);
    const CornerGradient<T> of_y =
        corner_gradient(y, row_bin, r.pooled_h, a.whole, a.top, a.bottom, scale);
    sums[0] += of_x.low;
    sums[1] += of_y.low;
    sums[2] += of_x.high;
    sums[3] += of_y.high;
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const T sum = block_sum<kBlockSize>(sums[0], shared);
#pragma unroll
    for (int k = 1; k < 4; ++k) sums[k - 1] = sums[k];  // registers have no index
    if (threadIdx.x == 0) store_as_called(args.grad_boxes, r.box_type, region * 5 + 1 + i, sum);
  }
  if (threadIdx.x == 0) store_as_called(args.grad_boxes, r.box_type, region * 5, T(0));
}

}  // namespace torchkiln::prroi_pool
