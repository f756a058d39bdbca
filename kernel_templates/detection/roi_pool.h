// Arguments and geometry of roi_pool, shared by CPU and GPU.
// Source: Girshick 2015, "Fast R-CNN", section 2.1. Two rules for the corners: rounded and inclusive (Caffe,
// torchvision), or as they are with x2 and y2 one pixel further (mmcv).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bands.h"
#include "common/types.h"

namespace torchkiln::roi_pool {

struct Shape {
  i64 images, channels, height, width;
  i64 rois, pooled_height, pooled_width;
  double spatial_scale;
  float inverse_pooled_height, inverse_pooled_width;  // 1 / pooled, rounded
  i64 rounding;
};

constexpr i64 kMaxPooled = 1024;  // as far as quotient() is exact

// Columns of a map that a block of the backward sums at most, so that a row of any map fits into shared memory.
constexpr i32 kColumns = 8192;

// Side of the windows whose greatest cells the forward keeps of large maps.
constexpr i32 kWindowSize = 4;

struct Args {
  const void* input;  // (images, channels, height, width), or channels last
  const void* boxes;  // (rois, 5) image, x1, y1, x2, y2, in accumulator type
  void* output;       // (rois, channels, pooled_height, pooled_width), layout of input
  void* argmax;       // cell codes, same shape and layout; or null
  Shape shape;
  BandList list;  // channels first only, as `edges`
  const u32*
      edges;  // (rois, pooled_height + pooled_width) begin | end << 16 of each bin, rows before columns
};

struct BackwardArgs {
  const void* grad_output;  // shape and layout of the output
  const void* argmax;
  const void* boxes;
  void* grad_input;
  Shape shape;
  BandList list;  // channels first only
};

struct ListArgs {
  const void* boxes;
  Shape shape;
  BandList list;
  u32* edges;  // written if not null
};

// A cell as y << half | x, so that nobody divides by the width. Two bytes if both sides fit into one, else four; all
// ones for an empty bin.
constexpr i64 kMaxNarrowSide = 254, kMaxSide = 65534;
template <int kBytes>
struct CodeOf {
  using Type = u32;
};
template <>
struct CodeOf<2> {
  using Type = u16;
};
template <int kBytes>
using Code = typename CodeOf<kBytes>::Type;
template <int kBytes>
constexpr Code<kBytes> kNoCell = Code<kBytes>(~u32(0));
template <int kBytes>
TORCHKILN_HD Code<kBytes> encode(i32 y, i32 x) {
  return Code<kBytes>(u32(y) << (4 * kBytes) | u32(x));
}

// Half away from zero, without the error of adding 0.5 below it.
template <class T>
TORCHKILN_HD T round_away(T x) {
  const T magnitude = x < T(0) ? -x : x;
  const T whole = floor_of(magnitude);
  const T rounded = magnitude - whole >= T(0.5) ? whole + T(1) : whole;
  return x < T(0) ? -rounded : rounded;
}

TORCHKILN_HD i32 clamp_cell(i32 cell, i32 limit) {
  return cell < 0 ? 0 : (cell > limit ? limit : cell);
}

// One side of a region, cut into bins.
template <class T>
struct Axis {
  i32 pooled, limit;  // bins; cells of the image
  float inverse;      // 1 / pooled
  bool rounding, is_empty;
  i32 first, whole, rest;  // rounded: first cell, and size = whole * pooled + rest
  T start, bin;            // not rounded

  TORCHKILN_HD i32 begin(i32 p) const {
    if (rounding) return clamp_cell(first + p * whole + quotient(p * rest, inverse), limit);
    return to_cell(floor_of(start + rounded_product(T(p), bin)));
  }
  // One past the last cell.
  TORCHKILN_HD i32 end(i32 p) const {
    if (rounding) {
      const i32 part = quotient((p + 1) * rest + pooled - 1, inverse);
      return clamp_cell(first + (p + 1) * whole + part, limit);
    }
    return to_cell(ceil_of(start + rounded_product(T(p + 1), bin)));
  }
  TORCHKILN_HD Range bin_of(i32 p) const {
    return is_empty ? Range{0, 0} : Range{begin(p), end(p)};
  }
  TORCHKILN_HD i32 to_cell(T x) const { return i32(min_of(T(limit), x > T(0) ? x : T(0))); }
};

// Cuts the whole cells from `low` to `high`, both included and at least one, into bins.
template <class T>
TORCHKILN_HD void cut_cells(Axis<T>& axis, T low, T high) {
  constexpr T kFarAway = T(1 << 29);  // sums of two stay inside of 32 bits
  const T first = max_of(-kFarAway, min_of(kFarAway, low));
  const T last = max_of(-kFarAway, min_of(kFarAway, high));
  axis.first = i32(first);
  const i32 size = last < first ? 1 : i32(last) - axis.first + 1;
  axis.whole = i32(u32(size) / u32(axis.pooled));
  axis.rest = size - axis.whole * axis.pooled;
}

template <class T>
TORCHKILN_HD Axis<T> make_axis(T low, T high, T scale, bool rounding, i64 pooled, float inverse,
                               i64 limit) {
  Axis<T> axis = {i32(pooled), i32(limit), inverse, rounding, false, 0, 0, 0, T(0), T(0)};
  axis.start = rounded_product(low, scale);
  if (rounding) {
    cut_cells(axis, round_away(axis.start), round_away(rounded_product(high, scale)));
  } else {
    const T size = rounded_product(high + T(1), scale) - axis.start;
    axis.is_empty = !(size > T(0));
    axis.bin = size - size == T(0) ? count_quotient(size, T(pooled)) : size;
  }
  return axis;
}

template <class T>
struct Region {
  i32 image;  // -1: its bins are all empty
  Axis<T> y, x;
};

template <class T>
TORCHKILN_HD bool is_finite(T x) {
  return x - x == T(0);
}

// A batch index that is no image of ours, or a coordinate that is no finite number, leaves the region empty.
template <class T>
TORCHKILN_HD Region<T> load_region(const T* boxes, i64 index, const Shape& shape) {
  const T* row = boxes + 5 * index;
  const T image = row[0], x1 = row[1], y1 = row[2], x2 = row[3], y2 = row[4];
  const T scale = T(shape.spatial_scale);
  const bool finite = is_finite(x1) && is_finite(y1) && is_finite(x2) && is_finite(y2);
  const bool known = image > T(-1) && image < T(shape.images);
  Region<T> region;
  region.image = known && finite ? i32(image) : -1;
  const bool rounding = shape.rounding != 0;
  region.y = make_axis(finite ? y1 : T(0), finite ? y2 : T(0), scale, rounding, shape.pooled_height,
                       shape.inverse_pooled_height, shape.height);
  region.x = make_axis(finite ? x1 : T(0), finite ? x2 : T(0), scale, rounding, shape.pooled_width,
                       shape.inverse_pooled_width, shape.width);
  return region;
}

// The bin's greatest element so far. NaN is greater than any number, and the first of equals wins.
template <class T>
struct Best {
  T value;
  i32 y, x;
  TORCHKILN_HD void take(T other, i32 other_y, i32 other_x) {
    if (!(other <= value) && !is_nan(value)) {
      value = other;
      y = other_y;
      x = other_x;
    }
  }
};

// What to start from: its cell is the first one, in case nothing is greater than -infinity.
template <class T>
TORCHKILN_HD Best<T> worst(i32 y, i32 x) {
  return {T(bits_float(0xff800000u)), y, x};  // -infinity
}

// Where bin (ph, pw) of a channel lies in the output, argmax and grad_output.
template <bool kChannelsLast>
TORCHKILN_HD i64 output_offset(const Shape& s, i64 roi, i64 channel, i32 bin) {
  const i64 bins = s.pooled_height * s.pooled_width;
  return kChannelsLast ? (roi * bins + bin) * s.channels + channel
                       : (roi * s.channels + channel) * bins + bin;
}

template <class Index, bool kChannelsLast>
TORCHKILN_HD Index input_offset(const Shape& s, i32 image, i64 channel, i32 y, i32 x) {
  const Index height = Index(s.height), width = Index(s.width), channels = Index(s.channels);
  return kChannelsLast ? ((Index(image) * height + y) * width + x) * channels + Index(channel)
                       : ((Index(image) * channels + Index(channel)) * height + y) * width + x;
}

}  // namespace torchkiln::roi_pool
