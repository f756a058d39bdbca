// Tables of RoIAlign on the GPU: taps (pixel, weight) of the bins of each axis of a region, written and found again.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/roi_align.h"

namespace torchkiln::roi_align {

// One bin of an axis of a region.
struct AxisBin {
  i64 region, bin;
  bool columns;
};

// A thread's own; region is r.k or more for those that have none.
template <int kBlockSize>
__device__ __forceinline__ AxisBin own_bin(const Regions& r, u32 block) {
  const i64 item = i64(block) * kBlockSize + threadIdx.x;
  const i64 axes = r.pooled_h + r.pooled_w, region = divided(item, axes),
            bin = item - region * axes;
  const bool columns = bin >= r.pooled_h;
  return {region, columns ? bin - r.pooled_h : bin, columns};
}

// Writes the taps of a bin, and with the first one where its region lies. `image` as in Span; the axis of a region of no
// map is empty. The functions of AnyAxis are those of roi_align::Axis.
template <class T, class AnyArgs, class AnyAxis>
__device__ __forceinline__ void write_taps(const AnyArgs& args, const Regions& r, const AxisBin& at,
                                           const AnyAxis& axis, i32 image) {
  const i64 pooled = at.columns ? r.pooled_w : r.pooled_h, size = at.columns ? r.w : r.h;
  const i64 capacity = at.columns ? args.column_capacity : args.row_capacity;
  Tap<T>* taps = static_cast<Tap<T>*>(args.taps) +
                 at.region * (args.row_capacity + args.column_capacity) +
                 (at.columns ? args.row_capacity : 0);
  const bool empty = is_empty(axis);
  const i32 begin = empty ? 0 : first_tap(axis, at.bin, pooled, size, capacity);
  const i32 n = make_taps(axis, at.bin, size, taps + begin);
  args.ranges[at.region * (r.pooled_h + r.pooled_w) + (at.columns ? r.pooled_h : 0) + at.bin] = {
      begin, begin + n};
  // Places up to the next bin's stay empty.
  const i32 next = !empty && at.bin + 1 < pooled
                       ? first_tap(axis, at.bin + 1, pooled, size, capacity)
                       : begin + n;
  for (i32 i = begin + n; i < next; ++i) taps[i] = {T(0), -1, i32(at.bin)};
  if (at.bin != 0) return;
  Span& span = static_cast<Span*>(args.spans)[at.region];
  const i32 low = empty ? 0 : first_pixel(axis, 0, size);
  const i32 high = empty ? -1 : last_pixel(axis, pooled, size);
  if (at.columns) {
    span.x_first = low;
    span.x_last = high;
  } else {
    span.image = image;
    span.y_first = low;
    span.y_last = high;
  }
}

// One thread per bin of an axis of a region.
// The taps of one region.
template <class T>
struct Table {
  const Tap<T>* rows;
  const Tap<T>* columns;
  const Range* row_bins;
  const Range* column_bins;
};

template <class T, class AnyArgs>
__device__ __forceinline__ Table<T> table_of(const AnyArgs& args, i64 region) {
  const Regions& r = args.regions;
  Table<T> table;
  table.rows =
      static_cast<const Tap<T>*>(args.taps) + region * (args.row_capacity + args.column_capacity);
  table.columns = table.rows + args.row_capacity;
  table.row_bins = args.ranges + region * (r.pooled_h + r.pooled_w);
  table.column_bins = table.row_bins + r.pooled_h;
  return table;
}

}  // namespace torchkiln::roi_align
