// Bands of rows of feature maps, and lists of what each band computes. Shared by CPU and GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

struct Range {
  i32 begin, end;
  TORCHKILN_HD bool is_empty() const { return end <= begin; }
};

// Band b keeps the rows [b * step, b * step + height) of a map. It owns its first `step` rows, the last band all that
// are left; the others are there for bins that begin in its own rows and end below them.
struct Bands {
  i32 count, step, height;
};

TORCHKILN_HD i32 band_of(const Bands& bands, i32 y) {
  return min_of(max_of(y, 0) / bands.step, bands.count - 1);
}

// One row of bins of one region.
struct alignas(8) BandEntry {
  i32 region, row;
};

struct BandList {
  Bands bands;
  BandEntry* entries;  // of all bands of all images, one after the other
  Range* parts;        // (images, bands.count) where each band's entries lie
};

}  // namespace torchkiln
