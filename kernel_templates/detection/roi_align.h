// Arguments and geometry of RoIAlign, shared by CPU and GPU: where a region's samples lie on each axis. (The taps of a
// sample are in geometry/bilinear.h.) Source: He et al., Mask R-CNN, 2017, section 3.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/any_float.h"
#include "common/bands.h"
#include "common/types.h"
#include "geometry/bilinear.h"

namespace torchkiln::roi_align {

enum Pooling { kAverage = 0, kMax = 1 };

// How regions are laid over maps; the same forward and backward.
struct Regions {
  const void* boxes;  // (k, 5) batch index, x1, y1, x2, y2 in image pixels
  i64 box_type;       // FloatType
  i64 n, c, h, w;     // of the input
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
  Range* ranges;  // (k, pooled_h + pooled_w) where each bin's taps lie among those of its axis
  void* spans;    // (k,) Span
  i64 row_capacity, column_capacity;
};

// Backward of averages: the pixels that a warp owns, and the bins of an axis whose weights are held at once: half a warp.
constexpr int kPatchH = 2, kPatchW = 4, kHeldBins = 16;

// For at most kQuadSamples samples per bin and axis, on maps of channels first: all taps of a bin have a fixed place.
constexpr i64 kQuadSamples = 2;
constexpr i64 kMostQuadPixels = 65534;
constexpr u16 kNoPixel = 65535;
template <class T>
struct alignas(16) QuadWeights {
  T at[2 * kQuadSamples];
};
struct alignas(8) QuadPixels {
  u16 at[2 * kQuadSamples];  // kNoPixel: the bin has no sample
};
struct StagedTable {
  void* weights;       // (k, pooled_h + pooled_w) QuadWeights, rows before columns
  QuadPixels* pixels;  // the same shape
  BandList list;
};
struct StagedArgs {
  Regions regions;
  const void* maps;
  void* bins;
  StagedTable table;
};

// Elements from the band of one map to that of the next; each begins at 16 bytes.
TORCHKILN_HD i32 band_pitch(i32 height, i32 width) { return (height * width + 15) / 16 * 16; }

// The samples of a region on one axis: bin b has `count` of them at start + b * bin + (i + 0.5) * step, counted from the
// pixel `origin`.
template <class T>
struct Axis {
  T start, bin, step;
  i32 count, origin;
};

// More samples than this per bin are of no use: a map has not as many pixels.
constexpr i32 kMostSamples = 32768;

template <class T>
TORCHKILN_HD Axis<T> axis_of(T low, T high, const Regions& r, i64 pooled) {
  const T scale = T(r.spatial_scale);
  const T offset = r.aligned ? T(0.5) : T(0);
  Axis<T> axis;
  axis.origin = origin_of(rounded_product(low, scale));
  const T from = offset + T(axis.origin);
  axis.start = fused(low, scale, -from);
  T size = fused(high, scale, -from) - axis.start;
  if (!r.aligned) size = size < T(1) ? T(1) : size;
  axis.bin = count_quotient(size, T(pooled));
  // A box with exchanged corners is empty, and one that is not finite has no samples.
  const bool finite = size - size == T(0) && axis.start - axis.start == T(0);
  const T wanted = r.sampling_ratio > 0 ? T(r.sampling_ratio) : ceil_of(axis.bin);
  axis.count = !finite || size < T(0) ? 0 : i32(min_of(wanted, T(kMostSamples)));
  axis.step = axis.count > 0 ? count_quotient(axis.bin, T(axis.count)) : T(0);
  return axis;
}

// From the origin.
template <class T>
TORCHKILN_HD T sample_position(const Axis<T>& axis, i64 bin, i32 i) {
  return axis.start + rounded_product(T(bin), axis.bin) + rounded_product(T(i) + T(0.5), axis.step);
}
template <class T>
TORCHKILN_HD Taps<T> sample_taps(const Axis<T>& axis, i64 bin, i32 i, i64 size) {
  return taps_at(sample_position(axis, bin, i), axis.origin, i32(size));
}
// The pixel of the map that is nearest below a position from the origin.
template <class T>
TORCHKILN_HD i32 pixel_below(const Axis<T>& axis, T position, i64 size) {
  const T first = T(-axis.origin), last = T(i32(size) - 1 - axis.origin);
  return axis.origin + i32(floor_of(max_of(first, min_of(position, last))));
}

// The samples [first, last) of a bin outside of which none can lie in the map, and `spare` more on both sides; few samples
// are not worth the divisions. For a maximum one to spare, which is 0, stands for all on its side.
TORCHKILN_HD i32 clamp_count(double value, i32 count) {
#if defined(__CUDACC_RTC__)
  // The instruction stops at the ends of the range, and makes no positive number of NaN.
  return min_of(max_of(__double2int_rz(value), 0), count);
#else
  return value > 0 ? (value < double(count) ? i32(value) : count) : 0;
#endif
}
struct SampleRange {
  i32 first, last;
};
TORCHKILN_HD_CALLED SampleRange samples_inside(double begin, double step, i64 size, i32 count) {
  const double inverse = rough_reciprocal(step);  // for each of two samples more
  return {clamp_count((-1.0 - begin) * inverse - 2.0, count),
          clamp_count((double(size) - begin) * inverse + 2.0, count)};
}
template <class T>
TORCHKILN_HD void sample_range(const Axis<T>& axis, i64 bin, i64 size, i32& first, i32& last,
                               i32 spare = 0) {
  first = 0;
  last = axis.count;
  if (axis.count <= 8 || !(axis.step > T(0))) return;
  const double step = double(axis.step);
  const double begin = double(axis.origin) + double(axis.start) + double(bin) * double(axis.bin);
  const SampleRange inside = samples_inside(begin, step, size, axis.count);
  first = max_of(inside.first - spare, 0);
  last = min_of(inside.last + spare, axis.count);
}

template <class T>
TORCHKILN_HD T coordinate(const Regions& r, i64 region, int column) {
  return load_as_called<T>(r.boxes, r.box_type, region * 5 + column);
}

// One axis of a region.
template <class T>
TORCHKILN_HD Axis<T> axis_at(const Regions& r, i64 region, bool columns) {
  return axis_of(coordinate<T>(r, region, columns ? 1 : 2),
                 coordinate<T>(r, region, columns ? 3 : 4), r, columns ? r.pooled_w : r.pooled_h);
}

// A region on both axes; batch is -1 when its index is out of range or not a number.
template <class T>
struct Window {
  i64 batch;
  Axis<T> y, x;
};

// The image of a region, or -1.
template <class T>
TORCHKILN_HD i32 image_of(const Regions& r, i64 region) {
  const T batch = coordinate<T>(r, region, 0);
  return batch > T(-1) && batch < T(r.n) ? i32(batch) : -1;
}

template <class T>
TORCHKILN_HD Window<T> window_of(const Regions& r, i64 region) {
  Window<T> window;
  window.batch = image_of<T>(r, region);
  window.y = axis_at<T>(r, region, false);
  window.x = axis_at<T>(r, region, true);
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

// The pixels that a region touches, both ends included; empty when y_last < y_first. image: the number of its maps among
// those of all images (and of all levels, level by level), -1 for none.
struct Span {
  i32 image, y_first, y_last, x_first, x_last;
};

// Writes the taps of one bin, those that fall on the same pixel as one, and returns their number: at most 2 * count, and
// at most two more than the pixels from the bin's first sample to its last one.
template <class T>
TORCHKILN_HD i32 make_taps(const Axis<T>& axis, i64 bin, i64 size, Tap<T>* taps) {
  const T share = axis.count > 0 ? count_quotient(T(1), T(axis.count)) : T(0);
  i32 n = 0, first, last;
  sample_range(axis, bin, size, first, last);
  for (i32 i = first; i < last; ++i) {
    const Taps<T> t = sample_taps(axis, bin, i, size);
    if (!t.inside) continue;
    // Samples of a bin ascend, so a pixel that is there already is the last one or the one before it.
    if (n == 0 || taps[n - 1].pixel < t.low) taps[n++] = {T(0), t.low, i32(bin)};
    i32 low = n - 1;
    if (taps[low].pixel != t.low) --low;
    taps[low].weight += t.weight_low * share;
    if (t.high == t.low) continue;
    if (taps[n - 1].pixel < t.high) taps[n++] = {T(0), t.high, i32(bin)};
    taps[n - 1].weight += t.weight_high * share;
  }
  return n;
}

// The pixel of the map nearest to a bin's first sample.
template <class T>
TORCHKILN_HD i32 first_pixel(const Axis<T>& axis, i64 bin, i64 size) {
  return pixel_below(axis, sample_position(axis, bin, 0), size);
}

// No tap lies behind the pixel of the last sample.
template <class T>
TORCHKILN_HD i32 last_pixel(const Axis<T>& axis, i64 pooled, i64 size) {
  return pixel_below(axis, axis.start + rounded_product(T(pooled), axis.bin) + T(1), size);
}

template <class T>
TORCHKILN_HD bool is_empty(const Axis<T>& axis) {
  return axis.count == 0;
}
template <class T>
TORCHKILN_HD void clear(Axis<T>& axis) {
  axis.count = 0;
}

// Where the taps of a bin begin: a fixed number of places each where the capacity was made for it; else after as many
// as the bins before can have (one more each, lest rounding moves a sample over a pixel).
template <class T>
TORCHKILN_HD i32 first_tap(const Axis<T>& axis, i64 bin, i64 pooled, i64 size, i64 capacity) {
  if (capacity == 2 * i64(axis.count) * pooled) return i32(2 * axis.count * bin);
  return first_pixel(axis, bin, size) - first_pixel(axis, 0, size) + i32(3 * bin);
}

}  // namespace torchkiln::roi_align
