// Arguments and geometry of RoIAlign, shared by CPU and GPU: where a region's samples lie on each axis. (The taps of a
// sample are in geometry/bilinear.h.) Source: He et al., Mask R-CNN, 2017, section 3.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/bilinear.h"

namespace torchkiln::roi_align {

enum Pooling { kAverage = 0, kMax = 1 };
enum BoxType { kFloatBoxes = 0, kHalfBoxes = 1, kBfloat16Boxes = 2, kDoubleBoxes = 3 };

// How regions are laid over maps; the same forward and backward.
struct Regions {
  const void* boxes;  // (k, 5) batch index, x1, y1, x2, y2 in image pixels
  i64 box_type;
  i64 n, c, h, w;  // of the input
  i64 k, pooled_h, pooled_w;
  i64 sampling_ratio;  // samples per bin and axis; 0 or less: one per pixel, rounded up
  i64 aligned;
  double spatial_scale;  // input pixels per image pixel
};

struct Args {
  Regions regions;
  void* maps;  // (n, c, h, w) or (n, h, w, c): the input, or its gradient
  void*
      bins;  // (k, c, pooled_h, pooled_w) or (k, pooled_h, pooled_w, c): the output, or its gradient
  i32* argmax;  // as bins: the number of the winning sample in its bin, -1 for none; kMax only
  void*
      taps;  // (k, row_capacity + column_capacity) Tap: what each bin takes of the rows, then of the columns
  i32*
      begins;  // (k, pooled_h + 1 + pooled_w + 1) the number of the first tap of each bin, and of all
  void* spans;  // (k,) Span
  i64 row_capacity, column_capacity;
};

// The samples of a region on one axis: bin b has `count` of them at start + b * bin + (i + 0.5) * step.
template <class T>
struct Axis {
  T start, bin, step;
  i32 count;
};

// More samples than this per bin are of no use: a map has not as many pixels.
constexpr i32 kMostSamples = 32768;

template <class T>
TORCHKILN_HD Axis<T> axis_of(T low, T high, const Regions& r, i64 pooled) {
  const T scale = T(r.spatial_scale);
  const T offset = r.aligned ? T(0.5) : T(0);
  Axis<T> axis;
  axis.start = low * scale - offset;
  T size = (high * scale - offset) - axis.start;
  if (!r.aligned) size = size < T(1) ? T(1) : size;
  axis.bin = size / T(pooled);
  // A box with exchanged corners is empty, and one that is not finite has no samples.
  const bool finite = size - size == T(0) && axis.start - axis.start == T(0);
  const T wanted = r.sampling_ratio > 0 ? T(r.sampling_ratio) : ceil_of(axis.bin);
  axis.count = !finite || size < T(0) ? 0 : i32(min_of(wanted, T(kMostSamples)));
  axis.step = axis.count > 0 ? axis.bin / T(axis.count) : T(0);
  return axis;
}

template <class T>
TORCHKILN_HD T sample_position(const Axis<T>& axis, i64 bin, i32 i) {
  return axis.start + T(bin) * axis.bin + (T(i) + T(0.5)) * axis.step;
}

// The samples [first, last) of a bin outside of which none can lie in the map; few samples are not worth the divisions.
TORCHKILN_HD i32 clamp_count(double value, i32 count) {
  return value > 0 ? (value < double(count) ? i32(value) : count) : 0;
}
TORCHKILN_HD_CALLED i32 samples_before(double position, double begin, double step, i32 count) {
  return clamp_count((position - begin) / step, count);
}
template <class T>
TORCHKILN_HD void sample_range(const Axis<T>& axis, i64 bin, i64 size, i32& first, i32& last) {
  first = 0;
  last = axis.count;
  if (axis.count <= 8 || !(axis.step > T(0))) return;
  const double step = double(axis.step);
  const double begin = double(axis.start) + double(bin) * double(axis.bin);
  first = samples_before(-1.0 - 2.0 * step, begin, step, axis.count);
  last = samples_before(double(size) + 2.0 * step, begin, step, axis.count);
}

template <class T>
TORCHKILN_HD_CALLED T coordinate(const Regions& r, i64 region, int column) {
  const i64 at = region * 5 + column;
  switch (r.box_type) {
    case kHalfBoxes:
      return T(load(static_cast<const half*>(r.boxes)[at]));
    case kBfloat16Boxes:
      return T(load(static_cast<const bfloat16*>(r.boxes)[at]));
    case kDoubleBoxes:
      return T(static_cast<const double*>(r.boxes)[at]);
    default:
      return T(static_cast<const float*>(r.boxes)[at]);
  }
}

// A region on both axes; batch is -1 when its index is out of range or not a number.
template <class T>
struct Window {
  i64 batch;
  Axis<T> y, x;
};

template <class T>
TORCHKILN_HD Window<T> window_of(const Regions& r, i64 region) {
  Window<T> window;
  const T batch = coordinate<T>(r, region, 0);
  window.batch = batch > T(-1) && batch < T(r.n) ? i64(batch) : -1;
  window.y = axis_of(coordinate<T>(r, region, 2), coordinate<T>(r, region, 4), r, r.pooled_h);
  window.x = axis_of(coordinate<T>(r, region, 1), coordinate<T>(r, region, 3), r, r.pooled_w);
  // Either axis without samples leaves the region without any.
  if (window.y.count == 0 || window.x.count == 0) window.y.count = window.x.count = 0;
  return window;
}

// What one bin takes of one pixel of its axis; 16 bytes, so that a tap is one load.
template <class T>
struct alignas(16) Tap {
  T weight;
  i32 pixel;
  i32 bin;
};

// The pixels that a region touches, both ends included; empty when y_last < y_first. batch as in Window.
struct Span {
  i32 batch, y_first, y_last, x_first, x_last;
};

// Writes the taps of one axis, those of a bin that fall on the same pixel as one, and where each bin begins in them.
// Returns their number: at most min(2 * count * pooled, size + 2 * pooled).
template <class T>
TORCHKILN_HD i32 make_taps(const Axis<T>& axis, i64 pooled, i64 size, Tap<T>* taps, i32* begins) {
  const T share = axis.count > 0 ? T(1) / T(axis.count) : T(0);
  i32 n = 0;
  for (i64 bin = 0; bin < pooled; ++bin) {
    const i32 begin = n;
    begins[bin] = n;
    i32 first, last;
    sample_range(axis, bin, size, first, last);
    for (i32 i = first; i < last; ++i) {
      const Taps<T> t = taps_at(sample_position(axis, bin, i), i32(size));
      if (!t.inside) continue;
      // Samples of a bin ascend, so a pixel that is there already is the last one or the one before it.
      if (n == begin || taps[n - 1].pixel < t.low) {
        taps[n++] = {T(0), t.low, i32(bin)};
      }
      i32 low = n - 1;
      if (taps[low].pixel != t.low) --low;
      taps[low].weight += t.weight_low * share;
      if (t.high == t.low) continue;
      if (taps[n - 1].pixel < t.high) taps[n++] = {T(0), t.high, i32(bin)};
      taps[n - 1].weight += t.weight_high * share;
    }
  }
  begins[pooled] = n;
  return n;
}

}  // namespace torchkiln::roi_align
