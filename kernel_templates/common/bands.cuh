// Work on feature maps that stay in shared memory. A map (height x width) that is too large is cut into bands of rows,
// one block each; a list names the rows of bins that a band computes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bands.h"
#include "common/scan.cuh"

namespace torchkiln {

// One block lists what belongs to band `band` of image `image`, in the order of the regions. rows_of(region) returns
//   image             the region's, or -1: nobody lists it
//   bands(row)        the bands to which a row of bins belongs; they ascend with the row
// Every block counts what lies before its part, so that no two need to talk.
template <int kBlockSize, class RowsOf>
__device__ __forceinline__ void list_band(const BandList& list, i64 regions, i32 rows, i32 image,
                                          i32 band, const RowsOf& rows_of) {
  __shared__ int shared[kBlockSize / kWarpSize];
  // The region's rows in bands before this one, and those in it, which are neighbours.
  const auto look = [&](i64 region, Range& own) {
    const auto of_region = rows_of(region);
    own = {0, 0};
    if (of_region.image < 0 || of_region.image > image) return 0;
    const bool here = of_region.image == image;
    i32 before = 0;
#pragma unroll 1
    for (i32 row = 0; row < rows; ++row) {
      const Range r = of_region.bands(row);
      before += max_of((here ? min_of(r.end, band) : r.end) - r.begin, 0);
      if (here && r.begin <= band && band < r.end)
        own = {own.is_empty() ? row : own.begin, row + 1};
    }
    return before;
  };
  // One loop for both passes: the code runs once, so its size is what costs.
  int place = 0, begin = 0;
#pragma unroll 1
  for (int pass = image > 0 || band > 0 ? 0 : 1; pass < 2; ++pass) {
    int before = 0;
#pragma unroll 1
    for (i64 first = 0; first < regions; first += kBlockSize) {
      const i64 region = first + threadIdx.x;
      Range own = {0, 0};
      if (region < regions) before += look(region, own);
      if (pass == 0) continue;
      int total;
      const int offset = block_exclusive_sum<kBlockSize>(own.end - own.begin, shared, total);
      BandEntry* entries = list.entries + place + offset;
#pragma unroll 1
      for (i32 row = own.begin; row < own.end; ++row) *entries++ = {i32(region), row};
      place += total;
    }
    if (pass == 0) {
      block_exclusive_sum<kBlockSize>(before, shared, begin);
      place = begin;
    }
  }
  if (threadIdx.x == 0) list.parts[image * list.bands.count + band] = {begin, place};
}

}  // namespace torchkiln
