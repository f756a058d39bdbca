// The frame of operators that pool bilinear samples at points of any place: rotated and curved regions, borders of
// boxes. Shared by CPU and GPU. An operator is a struct, in a header of its own, that says
//   patch<T>(args, group, bin)   where the samples of a bin lie, before clip()
//   kMaximum                     bins are the greatest sample, not the weighted sum
//   kIdentity                    the input is added: a bin for each of its pixels
//   kOriented                    channels are turned: each is a blend of two neighbouring orientations
//   kBordered                    bins take turns at `kBorders` blocks of channels
//   kByImage                     groups are images; otherwise the first column of a box names its image
// Floor: e (touched share of the maps + output) bytes of memory. What binds are the taps: 4 e for each sample and
// channel through L1 and L2, and in the gradient as many additions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "detection/roi_align.h"
#include "geometry/bilinear.h"

namespace torchkiln::sampled_roi {

constexpr i64 kBorders = 4;
// Most bins that one block or task works on at once.
constexpr i32 kMostBins = 64;
// Pixels of a tile of the gradient that one block sums.
constexpr i32 kTileSide = 8;
// Up to here samples are not worth a look at which of them lie in the map.
constexpr i32 kFewSamples = 64;

struct Args {
  const void* boxes;           // as the operator says, of box_type
  i64 box_type;                // FloatType
  i64 n, c, h, w;              // of the maps
  i64 groups, bins, channels;  // of the output; none is 2^31, for 64-bit divisions are long
  i64 pooled_h, pooled_w;
  i64 samples;  // per bin and axis, 0 or less for one per pixel; or as the operator says
  i64 hint;     // how many samples a bin has, where that is known; else a guess
  i64 aligned, clockwise, orientations;
  double spatial_scale;
  void* maps;  // (n, c, h, w) or (n, h, w, c): the input; or its gradient, (n, h, w, c) sums
  void*
      output;   // (groups, channels, bins) or (groups, bins, channels): the output, or its gradient
  i32* argmax;  // as output: the winning sample, -1 for none; kMaximum only, null if not wanted
};

// Samples of a bin: row i and column j lie at (y, x) + i * row + j * column, counted from the pixel (origin_y, origin_x).
template <class T>
struct Patch {
  i32 image, rows, columns;
  i32 origin_y, origin_x;
  i32 turn;  // kOriented: output orientation o takes o - turn, and the one after it by `blend`
  T y, x, row_y, row_x, column_y, column_x;
  T share;  // the weight of a sample
  T blend;

  TORCHKILN_HD i32 count() const { return rows * columns; }
};

template <class T>
TORCHKILN_HD T number(const Args& args, i64 at) {
  return load_as_called<T>(args.boxes, args.box_type, at);
}

// kCount of them, `step` apart. They move on as they come, for registers have no index: so the code is there once.
template <class T, int kCount>
struct Numbers {
  T at[kCount];
};
template <class T, int kCount>
TORCHKILN_HD Numbers<T, kCount> numbers(const void* boxes, i64 box_type, i64 at, i64 step = 1) {
  Numbers<T, kCount> row = {};
  TORCHKILN_ROLLED
  for (int i = 0; i < kCount; ++i) {
    for (int k = 1; k < kCount; ++k) row.at[k - 1] = row.at[k];
    row.at[kCount - 1] = load_as<T>(boxes, box_type, at + i * step);
  }
  return row;
}

// The image that a region names by a number, -1 for none.
template <class T>
TORCHKILN_HD i32 image_named(const Args& args, T image) {
  return image > T(-1) && image < T(args.n) ? i32(image) : -1;
}
template <class T>
TORCHKILN_HD i32 image_of(const Args& args, i64 at) {
  return image_named(args, number<T>(args, at));
}

// value * scale - offset, as a pixel and the rest, which is rounded once.
template <class T>
struct Coordinate {
  i32 origin;
  T rest;
};
template <class T>
TORCHKILN_HD Coordinate<T> coordinate(T value, T scale, T offset) {
  const i32 origin = origin_of(rounded_product(value, scale));
  return {origin, fused(value, scale, -(offset + T(origin)))};
}

// The same patch, counted from the pixel of its first sample.
template <class T>
TORCHKILN_HD Patch<T> settled(Patch<T> p) {
  const i32 down = origin_of(p.y), across = origin_of(p.x);
  p.origin_y += down;
  p.origin_x += across;
  p.y -= T(down);
  p.x -= T(across);
  return p;
}

// Samples on one axis of a bin; none for a size that is negative or not a number.
template <class T>
TORCHKILN_HD i32 sample_count(const Args& args, T bin) {
  const T wanted = args.samples > 0 ? T(args.samples) : ceil_of(bin);
  return bin >= T(0) ? i32(min_of(wanted, T(roi_align::kMostSamples))) : 0;
}

// Leaves out rows and columns that lie off the map: a region may be a thousand times larger than it. In place: a patch in
// registers would cost the whole kernel twenty.
template <class T>
TORCHKILN_HD void leave_out(Patch<T>& p, i32 h, i32 w) {
  const double row_y = double(p.row_y), row_x = double(p.row_x);
  const double column_y = double(p.column_y), column_x = double(p.column_x);
  const double y = double(p.y) + p.origin_y, x = double(p.x) + p.origin_x;
  const double det = row_y * column_x - row_x * column_y;
  const double inverse = rough_reciprocal(det);  // of bounds that have a sample to spare
  if (!(inverse - inverse == 0)) return;
  double low_i = 1e30, high_i = -1e30, low_j = 1e30, high_j = -1e30;
  TORCHKILN_ROLLED
  for (int corner = 0; corner < 4; ++corner) {
    const double dy = (corner & 1 ? double(h) : -1.0) - y;
    const double dx = (corner & 2 ? double(w) : -1.0) - x;
    const double i = (dy * column_x - dx * column_y) * inverse;
    const double j = (dx * row_y - dy * row_x) * inverse;
    low_i = min_of(i, low_i);
    high_i = max_of(i, high_i);
    low_j = min_of(j, low_j);
    high_j = max_of(j, high_j);
  }
  const i32 i = roi_align::clamp_count(low_i - 1, p.rows);
  const i32 j = roi_align::clamp_count(low_j - 1, p.columns);
  p.rows = roi_align::clamp_count(high_i + 2, p.rows) - i;
  p.columns = roi_align::clamp_count(high_j + 2, p.columns) - j;
  if (p.rows <= 0 || p.columns <= 0) p.rows = p.columns = 0;
  p.y = T(y + i * row_y + j * column_y - p.origin_y);
  p.x = T(x + i * row_x + j * column_x - p.origin_x);
}

// The same where it is worth it: of grids, whose samples nobody numbers.
template <class Op, class T>
TORCHKILN_HD void clip(Patch<T>& p, const Args& args) {
  if constexpr (!Op::kMaximum && !Op::kIdentity) {
    if (p.count() > kFewSamples) leave_out(p, i32(args.h), i32(args.w));
  }
}

// A grid of samples, averaged; `finite` says whether all that it was made of is a number.
template <class T>
TORCHKILN_HD Patch<T> average(Patch<T> p, bool finite) {
  if (!finite || p.image < 0 || p.rows == 0 || p.columns == 0) p.rows = p.columns = 0;
  p.share = p.rows > 0 ? count_quotient(T(1), T(p.rows) * T(p.columns)) : T(0);
  return settled(p);
}

// A number, and not infinite.
template <class T>
TORCHKILN_HD bool is_finite(T x) {
  return x - x == T(0);
}

// Bins that are worked on at once: as many samples as there are entries in a table, all parts about equal. And how many
// parts that makes.
struct Division {
  i32 at_once, parts;
};
TORCHKILN_HD Division divided_bins(i64 bins, i64 hint, i32 entries) {
  const u32 fitting = u32(entries) / u32(max_of(hint, i64(1)));
  const u32 most = max_of(u32(1), min_of(u32(kMostBins), fitting)), all = u32(bins);
  const u32 parts = (all + most - 1) / most;
  // Parts of this size are no fewer: `most` is no less.
  return {i32((all + parts - 1) / parts), i32(parts)};
}

// Where a sample lies, counted from a pixel.
template <class T>
struct Point {
  T y, x;
  i32 origin_y, origin_x;
};

// What a sample takes of the four pixels around it; pixels[0] is -1 for a sample outside.
struct alignas(16) Pixels {
  i32 at[4];
};
template <class T>
struct alignas(16) Weights {
  T at[4];
};

// pixel(y, x) numbers the pixels.
template <class T, class Pixel>
TORCHKILN_HD void take(Point<T> point, i32 h, i32 w, T share, const Pixel& pixel, Pixels& pixels,
                       Weights<T>& weights) {
  const Taps<T> y = taps_at(point.y, point.origin_y, h);
  const Taps<T> x = taps_at(point.x, point.origin_x, w);
  if (!y.inside || !x.inside) {
    pixels = {{-1, -1, -1, -1}};
    weights = {{T(0), T(0), T(0), T(0)}};
    return;
  }
  pixels = {
      {pixel(y.low, x.low), pixel(y.low, x.high), pixel(y.high, x.low), pixel(y.high, x.high)}};
  const T low = y.weight_low * share, high = y.weight_high * share;
  weights = {{low * x.weight_low, low * x.weight_high, high * x.weight_low, high * x.weight_high}};
}

// What the operators have in common.
struct Operator {
  static constexpr bool kMaximum = false, kIdentity = false, kOriented = false;
  static constexpr bool kBordered = false, kByImage = false;

  template <class T>
  TORCHKILN_HD static Point<T> point(const Patch<T>& p, i32 sample) {
    const i32 i = i32(u32(sample) / u32(p.columns)), j = sample - i * p.columns;
    return {p.y + rounded_product(T(i), p.row_y) + rounded_product(T(j), p.column_y),
            p.x + rounded_product(T(i), p.row_x) + rounded_product(T(j), p.column_x), p.origin_y,
            p.origin_x};
  }
};

// A sample of the patch; outside of every map where it has not as many.
template <class Op, class T>
TORCHKILN_HD Point<T> point_of(const Patch<T>& p, i32 sample) {
  return sample < p.count() ? Op::point(p, sample) : Point<T>{T(-2), T(-2), 0, 0};
}

// The orientation that lies `steps` behind another (or before, when negative), which are no more than there are
// orientations.
TORCHKILN_HD i32 turned(i32 own, i32 steps, i32 orientations) {
  const i32 rest = own - steps;
  const i32 least = rest < 0 ? rest + orientations : rest;
  return least < orientations ? least : least - orientations;
}
// The same of a channel, among blocks of orientations.
template <class Index>
TORCHKILN_HD Index turned_channel(Index channel, i32 steps, i32 orientations) {
  const i32 own = i32(u32(channel) % u32(orientations));
  return channel + Index(turned(own, steps, orientations) - own);
}

}  // namespace torchkiln::sampled_roi
