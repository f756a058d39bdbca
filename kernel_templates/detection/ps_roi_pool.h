// Arguments and geometry of ps_roi_align and ps_roi_pool, shared by CPU and GPU. Each bin is the average of a channel of
// its own: of bilinear samples as in roi_align, or of whole cells.
// Source: Dai et al., R-FCN, 2016, section 2.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/roi_align.h"
#include "detection/roi_pool.h"

namespace torchkiln::ps_roi_pool {

using roi_align::Regions;
using roi_align::Tap;

enum Pooling { kSamples = 0, kCells = 1 };

struct Args {
  Regions regions;  // c: channels of the maps, pooled_h * pooled_w for each of the bins
  void* maps;       // the input, or its gradient
  void* bins;       // (k, c / pooled_h / pooled_w, pooled_h, pooled_w), or its gradient
  i32* channels;    // as bins: the channel that each bin is made of; or null
  void* taps;       // as in roi_align::Args
  Range* ranges;
  void* spans;
  i64 row_capacity, column_capacity;
  i64 margin;     // kCells: so many of the last rows and columns are never pooled
  float of_none;  // kSamples: the bins of a region without samples
};

// The tiles that staged_backward cuts maps into: a few rows.
constexpr i32 kMostTileWidth = 32;
struct TileSize {
  i32 height, width;
};
TORCHKILN_HD i32 even_part(u32 size, u32 most) {
  const u32 parts = (size + most - 1) / most;
  return i32((size + parts - 1) / parts);
}
TORCHKILN_HD TileSize tile_size(i64 h, i64 w, i64 most_rows) {
  return {even_part(u32(h), u32(most_rows)), even_part(u32(w), u32(kMostTileWidth))};
}
// Sums from one pixel to the next: odd, so that neither outputs nor pixels meet in a bank.
TORCHKILN_HD i32 sum_pitch(i32 outputs) { return outputs | 1; }

// The cells of a region on one axis, with the functions of roi_align::Axis.
template <class T>
struct Cells {
  roi_pool::Axis<T> bins;
};

template <class T>
TORCHKILN_HD bool is_empty(const Cells<T>& axis) {
  return axis.bins.is_empty;
}
template <class T>
TORCHKILN_HD void clear(Cells<T>& axis) {
  axis.bins.is_empty = true;
}

template <class T>
TORCHKILN_HD i32 make_taps(const Cells<T>& axis, i64 bin, i64, Tap<T>* taps) {
  const Range cells = axis.bins.bin_of(i32(bin));
  const i32 n = cells.end - cells.begin;
  const T share = n > 0 ? count_quotient(T(1), T(n)) : T(0);
  for (i32 i = 0; i < n; ++i) taps[i] = {share, cells.begin + i, i32(bin)};
  return max_of(n, 0);
}
template <class T>
TORCHKILN_HD i32 first_pixel(const Cells<T>& axis, i64 bin, i64 size) {
  return min_of(axis.bins.begin(i32(bin)), i32(size - 1));
}
template <class T>
TORCHKILN_HD i32 last_pixel(const Cells<T>& axis, i64 pooled, i64) {
  return axis.bins.end(i32(pooled - 1)) - 1;
}
// Neighbouring bins share a cell at most.
template <class T>
TORCHKILN_HD i32 first_tap(const Cells<T>& axis, i64 bin, i64, i64, i64) {
  return axis.bins.begin(i32(bin)) - axis.bins.begin(0) + i32(bin);
}

template <class T>
TORCHKILN_HD Cells<T> cells_at(const Args& args, i64 region, bool columns) {
  const Regions& r = args.regions;
  const T low = roi_align::coordinate<T>(r, region, columns ? 1 : 2);
  const T high = roi_align::coordinate<T>(r, region, columns ? 3 : 4);
  const i64 pooled = columns ? r.pooled_w : r.pooled_h;
  const i64 limit = (columns ? r.w : r.h) - args.margin;
  const bool finite = roi_pool::is_finite(low) && roi_pool::is_finite(high);
  Cells<T> axis = {{i32(pooled), i32(limit), count_quotient(1.0f, static_cast<float>(pooled)), true,
                    !finite, 0, 0, 0, T(0), T(0)}};
  const T scale = T(r.spatial_scale);
  // The last corner is one behind the last cell.
  if (finite) {
    roi_pool::cut_cells(axis.bins, roi_pool::round_away(rounded_product(low, scale)),
                        roi_pool::round_away(rounded_product(high, scale)) - T(1));
  }
  return axis;
}

}  // namespace torchkiln::ps_roi_pool
