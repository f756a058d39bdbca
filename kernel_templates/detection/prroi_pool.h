// Geometry of prroi_pool, shared by CPU and GPU: the average of a bin is the integral of the map, interpolated between
// pixels and 0 beyond those around it, over the bin's area. It is separable, so a bin takes of each row and of each
// column the integral of its interpolation; the arguments are roi_align's.
// Source: Jiang et al., Acquisition of Localization Confidence for Accurate Object Detection, 2018, section 3.2.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/any_float.h"
#include "detection/roi_align.h"

namespace torchkiln::prroi_pool {

using roi_align::Regions;
using roi_align::Tap;

struct BoxArgs {
  Regions regions;
  const void* maps;
  const void* gradients;  // of the bins; layout of the maps
  void* grad_boxes;       // (k, 5), dtype of the boxes
  void* taps;             // as in roi_align::Args
  Range* ranges;
  void* spans;
  i64 row_capacity, column_capacity;
};

// For maps of channels first, in bands.
struct StagedArgs {
  Regions regions;
  const void* maps;
  void* bins;
  void* taps;  // as in roi_align::Args
  Range* ranges;
  void* spans;
  i64 row_capacity, column_capacity;
  BandList list;
};

// The bins of a region on one axis, with the functions of roi_align::Axis. Of no length: empty.
template <class T>
struct Edges {
  T start, bin;

  TORCHKILN_HD T at(i64 i) const { return start + rounded_product(T(i), bin); }
};

template <class T>
TORCHKILN_HD Edges<T> edges_at(const Regions& r, i64 region, bool columns) {
  const T scale = T(r.spatial_scale);
  const T low = rounded_product(roi_align::coordinate<T>(r, region, columns ? 1 : 2), scale);
  const T high = rounded_product(roi_align::coordinate<T>(r, region, columns ? 3 : 4), scale);
  const T size = high - low;
  const bool exists = size > T(0) && size - size == T(0) && low - low == T(0);
  const T pooled = T(columns ? r.pooled_w : r.pooled_h);
  return {exists ? low : T(0), exists ? count_quotient(size, pooled) : T(0)};
}

template <class T>
TORCHKILN_HD bool is_empty(const Edges<T>& axis) {
  return !(axis.bin > T(0));
}
template <class T>
TORCHKILN_HD void clear(Edges<T>& axis) {
  axis.bin = T(0);
}

// What a position takes of a pixel.
template <class T>
TORCHKILN_HD T weight_at(T position, i32 pixel) {
  const T distance = position - T(pixel);
  return max_of(T(1) - (distance < T(0) ? -distance : distance), T(0));
}

// The mean of weight_at over [low, high].
template <class T>
TORCHKILN_HD T mean_weight(T low, T high, i32 pixel) {
  const T length = high - low;
  if (!(length > T(0))) return weight_at(low, pixel);
  const T rising = max_of(low, T(pixel) - T(1)), top = min_of(max_of(low, T(pixel)), high);
  const T falling = min_of(high, T(pixel) + T(1));
  // Each side of the pixel: length times the weight in the middle.
  T sum = T(0);
  if (top > rising) sum += (top - rising) * ((rising + top) / T(2) - (T(pixel) - T(1)));
  if (falling > top) sum += (falling - top) * (T(pixel) + T(1) - (top + falling) / T(2));
  return close_quotient(sum, length);
}

// The pixel at or below a position, from 0 to `most`.
template <class T>
TORCHKILN_HD i32 pixel_below(T position, i64 most) {
  return position > T(0) ? i32(min_of(floor_of(position), T(most))) : 0;
}

template <class T>
TORCHKILN_HD i32 make_taps(const Edges<T>& axis, i64 bin, i64 size, Tap<T>* taps) {
  if (is_empty(axis)) return 0;
  const T low = axis.at(bin), high = axis.at(bin + 1);
  const i32 first = pixel_below(low, size);
  const i32 last = high < T(-1) ? -1 : pixel_below(high + T(1), size - 1);
  i32 n = 0;
  for (i32 pixel = first; pixel <= last; ++pixel) {
    taps[n++] = {mean_weight(low, high, pixel), pixel, i32(bin)};
  }
  return n;
}
template <class T>
TORCHKILN_HD i32 first_pixel(const Edges<T>& axis, i64 bin, i64 size) {
  return pixel_below(axis.at(bin), size - 1);
}
template <class T>
TORCHKILN_HD i32 last_pixel(const Edges<T>& axis, i64 pooled, i64 size) {
  return pixel_below(axis.at(pooled) + T(1), size - 1);
}
// A bin has two pixels more than lie between its edges, and one to spare for rounding.
template <class T>
TORCHKILN_HD i32 first_tap(const Edges<T>& axis, i64 bin, i64, i64 size, i64) {
  return first_pixel(axis, bin, size) - first_pixel(axis, 0, size) + i32(3 * bin);
}

// The gradient of an average along one axis of its bin: that of its edges, and from there of the region's two corners.
// `of_low` and `of_high`: the averages over these edges alone.
template <class T>
struct CornerGradient {
  T low, high;
};
template <class T>
TORCHKILN_HD CornerGradient<T> corner_gradient(const Edges<T>& axis, i64 bin, i64 pooled, T average,
                                               T of_low, T of_high, T scale) {
  const T length = axis.at(bin + 1) - axis.at(bin);
  if (!(length > T(0))) return {T(0), T(0)};
  const T factor = close_quotient(scale, length);
  const T first = count_quotient(T(bin), T(pooled)), last = count_quotient(T(bin + 1), T(pooled));
  const T low = (average - of_low) * factor, high = (of_high - average) * factor;
  return {low * (T(1) - first) + high * (T(1) - last), low * first + high * last};
}

// One bin of one channel along both axes.
template <class T>
struct Average {
  T whole, left, right, top, bottom;  // over the bin, and over its edges
};

// `value(row, column)` reads the map.
template <class T, class Value>
TORCHKILN_HD Average<T> average_of(const Edges<T>& y, const Edges<T>& x, i64 row_bin,
                                   i64 column_bin, const Tap<T>* rows, i32 row_count,
                                   const Tap<T>* columns, i32 column_count, const Value& value) {
  const T left = x.at(column_bin), right = x.at(column_bin + 1);
  const T top = y.at(row_bin), bottom = y.at(row_bin + 1);
  Average<T> sum = {T(0), T(0), T(0), T(0), T(0)};
  for (i32 i = 0; i < row_count; ++i) {
    const Tap<T> row = rows[i];
    T whole = T(0), at_left = T(0), at_right = T(0);
    for (i32 j = 0; j < column_count; ++j) {
      const Tap<T> column = columns[j];
      const T v = value(row.pixel, column.pixel);
      whole += column.weight * v;
      at_left += weight_at(left, column.pixel) * v;
      at_right += weight_at(right, column.pixel) * v;
    }
    sum.whole += row.weight * whole;
    sum.left += row.weight * at_left;
    sum.right += row.weight * at_right;
    sum.top += weight_at(top, row.pixel) * whole;
    sum.bottom += weight_at(bottom, row.pixel) * whole;
  }
  return sum;
}

}  // namespace torchkiln::prroi_pool
