// prroi_pool on the GPU. Averages and the gradient of maps are roi_align's planes, last and backward, by another table.
//
//   tables    one thread per bin of an axis of a region: the integral of each pixel's interpolation
//   boxes     the gradient of boxes, one block a region: a thread goes through bins of channels with their edges, then
//             the block sums in a fixed order
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "detection/prroi_pool.h"
#include "detection/roi_align.cuh"

namespace torchkiln::prroi_pool {

using roi_align::Args;
using roi_align::AxisBin;

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) tables(const Args args) {
  using T = Acc<Scalar>;
  const AxisBin at = roi_align::own_bin<kBlockSize>(args.regions, blockIdx.x);
  if (at.region >= args.regions.k) return;
  const i32 image = roi_align::image_of<T>(args.regions, at.region);
  Edges<T> axis = edges_at<T>(args.regions, at.region, at.columns);
  if (image < 0) clear(axis);
  roi_align::write_taps<T>(args, args.regions, at, axis, image);
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
    const i32 channel = i32(kLast ? item % channels : item / n_bins);
    const i32 bin = i32(kLast ? item / channels : item % n_bins);
    const i32 row_bin = bin / pooled_w, column_bin = bin - row_bin * pooled_w;
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
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T sum = block_sum<kBlockSize>(sums[i], shared);
    if (threadIdx.x == 0) store_as(args.grad_boxes, r.box_type, region * 5 + 1 + i, sum);
  }
  if (threadIdx.x == 0) store_as(args.grad_boxes, r.box_type, region * 5, T(0));
}

}  // namespace torchkiln::prroi_pool
