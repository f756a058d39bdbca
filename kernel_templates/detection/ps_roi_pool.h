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

// How gradients of maps are cut into parts, one for each block of gather: a tile of the maps of `bins` neighbouring bins of
// `outputs` outputs. `entries` regions are laid out at once.
struct Cut {
  i32 outputs, bins, height, width, entries;
  i32 of_outputs, of_bins, down, across;  // the number of parts

  // Rows of the tile, then columns for each of the bins.
  TORCHKILN_HD i32 lines() const { return height + bins * width; }
  // Numbers of an entry: what samples give to each line; of cells one for all rows, and one for the columns of each bin.
  TORCHKILN_HD i32 weights(int pooling) const { return pooling == kCells ? 1 + bins : lines(); }
};

struct Args {
  Regions regions;  // c: channels of the maps, pooled_h * pooled_w for each of the bins
  void* maps;       // the input, or its gradient
  void* bins;       // (k, c / pooled_h / pooled_w, pooled_h, pooled_w), or its gradient
  i32* channels;    // as bins: the channel that each bin is made of; or null
  void* taps;       // as in roi_align::Args
  Range* ranges;
  void* spans;
  i64 row_capacity, column_capacity;
  i64 bins_last;  // (k, pooled_h, pooled_w, outputs) instead
  i64 margin;     // kCells: so many of the last rows and columns are never pooled
  float of_none;  // kSamples: the bins of a region without samples
  i64 outputs;    // c / pooled_h / pooled_w
  Cut cut;        // of the gradient
};

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
TORCHKILN_HD Cells<T> cells_of(const Args& args, T low, T high, bool columns) {
  const Regions& r = args.regions;
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
template <class T>
TORCHKILN_HD Cells<T> cells_at(const Args& args, i64 region, bool columns) {
  const Regions& r = args.regions;
  return cells_of(args, roi_align::coordinate<T>(r, region, columns ? 1 : 2),
                  roi_align::coordinate<T>(r, region, columns ? 3 : 4), columns);
}

}  // namespace torchkiln::ps_roi_pool
