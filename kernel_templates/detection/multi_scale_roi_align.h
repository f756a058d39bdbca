// Arguments and level assignment of multi_scale_roi_align, shared by CPU and GPU: roi_align on the level of a pyramid that
// suits the size of each region. Source: Lin et al., Feature Pyramid Networks, 2017, section 4.2.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/roi_align.h"

namespace torchkiln::multi_scale_roi_align {

using roi_align::Regions;

constexpr int kMostLevels = 8;

struct Level {
  void* maps;  // (n, c, h, w) or (n, h, w, c): an input, or its gradient
  double spatial_scale;
  i32 h, w;
  Bands bands;  // StagedArgs only
};

struct Pyramid {
  Level levels[kMostLevels];
  // Level i + 1 and above get the boxes of at least this area; a box of less, or that is not finite, gets level 0.
  double areas[kMostLevels - 1];
  i64 count;
};

// Images are numbered level by level: level * n + image.
struct Args {
  Regions regions;  // its h, w and spatial_scale are those of no level
  Pyramid pyramid;
  void* bins;
  void* taps;  // as in roi_align::Args
  Range* ranges;
  void* spans;
  i64 row_capacity, column_capacity;
};

struct StagedArgs {
  Regions regions;
  Pyramid pyramid;
  void* bins;
  roi_align::StagedTable table;  // its bands: the most of any level
};

template <class T>
TORCHKILN_HD i32 level_of(const Regions& r, const Pyramid& pyramid, i64 region) {
  const T width = roi_align::coordinate<T>(r, region, 3) - roi_align::coordinate<T>(r, region, 1);
  const T height = roi_align::coordinate<T>(r, region, 4) - roi_align::coordinate<T>(r, region, 2);
  const T area = width * height;
  i32 level = 0;
  for (int i = 0; i < kMostLevels - 1; ++i) {
    if (i + 1 < pyramid.count && area >= T(pyramid.areas[i])) level = i + 1;
  }
  return level;
}

// The regions as they lie on one level.
TORCHKILN_HD Regions on_level(Regions r, const Level& level) {
  r.h = level.h;
  r.w = level.w;
  r.spatial_scale = level.spatial_scale;
  return r;
}

}  // namespace torchkiln::multi_scale_roi_align
