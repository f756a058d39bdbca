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
  i64 bins_last;  // (k, pooled_h, pooled_w, outputs) instead
  i64 margin;     // kCells: so many of the last rows and columns are never pooled
  float of_none;  // kSamples: the bins of a region without samples
};

// How gradients of maps are cut into parts, one for each block of gather: a tile of the maps of `bins` neighbouring bins of
// `outputs` outputs, a thread for each of its pixels and bins. `entries` regions are laid out at once.
struct Cut {
  i32 outputs, bins, height, width, entries;

  // Rows of the tile, then columns for each of the bins.
  TORCHKILN_HD i32 lines() const { return height + bins * width; }
  // Numbers of an entry: for each line what samples give to it, or of cells one for all rows, and for the columns of each bin.
  TORCHKILN_HD i32 weights(int pooling) const { return pooling == kCells ? 1 + bins : lines(); }
};
TORCHKILN_HD i32 even_part(i64 size, i32 most) {
  const u32 parts = (u32(size) + u32(most) - 1) / u32(most);
  return i32((u32(size) + parts - 1) / parts);
}
// Of a batch: gradients, weights, and which entries take any of a line.
TORCHKILN_HD i32 batch_bytes(const Cut& cut, int pooling, i32 most_outputs, i32 sum_bytes) {
  const i32 sums = cut.bins * most_outputs + cut.weights(pooling);
  return cut.entries * sums * sum_bytes + cut.entries / 8 * cut.lines();
}
TORCHKILN_HD Cut cut_of(i64 outputs, i64 pooled_w, i64 h, i64 w, bool channels_last, int pooling,
                        i32 most_outputs, i32 threads, i32 sum_bytes) {
  constexpr i32 kMostHeight = 32, kMostBytes = 48 * 1024;
  Cut cut;
  cut.outputs = even_part(outputs, most_outputs);
  // Those of a row lie side by side in channels_last.
  cut.bins = channels_last ? even_part(pooled_w, 8) : 1;
  cut.width = even_part(w, channels_last ? 16 : 32);
  cut.height = even_part(h, min_of(i32(u32(threads) / u32(cut.bins * cut.width)), kMostHeight));
  cut.entries = 128;
  while (cut.entries > 32 && batch_bytes(cut, pooling, most_outputs, sum_bytes) > kMostBytes) {
    cut.entries /= 2;
  }
  return cut;
}

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
