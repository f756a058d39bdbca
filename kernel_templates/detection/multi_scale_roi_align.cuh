// roi_align over a pyramid on the GPU: all levels in one launch. A block, or a thread, looks up its level and then does
// what its namesake in roi_align*.cuh does; tables and quads assign the levels.
// spills: up to 36 bytes for half types and wide indices, by ptxas' own choice.
// compile time: backward takes above 250 ms, as its namesake in roi_align_backward.cuh does
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/multi_scale_roi_align.h"
#include "detection/roi_align.cuh"
#include "detection/roi_align_backward.cuh"

namespace torchkiln::multi_scale_roi_align {

using roi_align::AxisBin;
using roi_align::Picture;

// Where a region is pooled: its level, the number of its image among those of all levels (-1 for none), and all regions
// as they lie on that level.
struct Home {
  i32 level, image;
  Regions regions;
};

template <class T>
__device__ __forceinline__ Home home_of(const Regions& r, const Pyramid& pyramid, i64 region) {
  const i32 level = level_of<T>(r, pyramid, region), image = roi_align::image_of<T>(r, region);
  return {level, image < 0 ? -1 : level * i32(r.n) + image, on_level(r, pyramid.levels[level])};
}

// Divides blocks among the levels: that of this block, and its number there. blocks_of(level) says how many a level has;
// a block too many gets a level that is not there.
struct OwnBlock {
  i32 level;
  u32 block;
};
template <bool kCoarseFirst = false, class BlocksOf>
__device__ __forceinline__ OwnBlock own_block(const Pyramid& pyramid, const BlocksOf& blocks_of) {
  const i32 count = i32(pyramid.count);
  u32 block = blockIdx.x;
#pragma unroll 1
  for (i32 i = 0; i < count; ++i) {
    const i32 level = kCoarseFirst ? count - 1 - i : i;
    const u32 blocks = blocks_of(pyramid.levels[level]);
    if (block < blocks) return {level, block};
    block -= blocks;
  }
  return {count, block};
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) tables(const Args args) {
  using T = Acc<Scalar>;
  const AxisBin at = roi_align::own_bin<kBlockSize>(args.regions, blockIdx.x);
  if (at.region >= args.regions.k) return;
  const Home home = home_of<T>(args.regions, args.pyramid, at.region);
  roi_align::Axis<T> axis = roi_align::axis_at<T>(home.regions, at.region, at.columns);
  if (home.image < 0) clear(axis);
  roi_align::write_taps<T>(args, home.regions, at, axis, home.image);
}

template <class Scalar, class Index, int kPlanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) planes(const Args args) {
  const Regions& r = args.regions;
  const u32 blocks = u32(r.n) * u32((r.c + kPlanes - 1) / kPlanes);  // of each level
  const i32 level = i32(blockIdx.x / blocks);
  const Level& own = args.pyramid.levels[level];
  roi_align::average_planes<Scalar, Index, kPlanes, kBlockSize>(
      args, on_level(r, own), own.maps, blockIdx.x - u32(level) * blocks, level * i32(r.n));
}

template <class Scalar, class Index>
__device__ __forceinline__ Picture<Scalar> picture_of(const Args& args, i32 image) {
  const i32 images = i32(args.regions.n), level = image / images;
  const Level& own = args.pyramid.levels[level];
  const Index size = Index(own.h) * Index(own.w) * Index(args.regions.c);
  return {static_cast<const Scalar*>(own.maps) + Index(image - level * images) * size, own.w};
}

template <class Scalar, class Index, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) last(const Args args) {
  roi_align::average_last<Scalar, Index, kVector, kBlockSize>(args);
}

// Grid: as many blocks for each image of each level as the most bands of a level, then one thread per bin of an axis.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) quads(const StagedArgs args) {
  using T = Acc<Scalar>;
  const Regions& r = args.regions;
  const Pyramid& pyramid = args.pyramid;
  const i32 bands = args.table.list.bands.count;
  const i32 lists = bands * i32(r.n) * i32(pyramid.count);
  if (i32(blockIdx.x) < lists) {
    const i32 image = blockIdx.x / bands, band = blockIdx.x % bands;
    if (band >= pyramid.levels[image / i32(r.n)].bands.count) return;
    const auto rows_of = [&](i64 region) {
      const Home home = home_of<T>(r, pyramid, region);
      // The bins of a region of no image are zeros; somebody has to write them.
      roi_align::RowsOfBins<T> rows = {max_of(home.image, 0), i32(home.regions.h),
                                       roi_align::axis_at<T>(home.regions, region, false),
                                       pyramid.levels[home.level].bands};
      if (home.image < 0) clear(rows.axis);
      return rows;
    };
    list_band<kBlockSize>(args.table.list, r.k, i32(r.pooled_h), image, band, rows_of);
    return;
  }
  const AxisBin at = roi_align::own_bin<kBlockSize>(r, blockIdx.x - lists);
  if (at.region >= r.k) return;
  const Home home = home_of<T>(r, pyramid, at.region);
  roi_align::write_quad<T>(args.table, home.regions, at, home.image >= 0);
}

template <class Scalar, class Index, int kMaps, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) staged(const StagedArgs args) {
  const Regions& r = args.regions;
  const u32 groups = u32(r.n * r.c / kMaps);
  const OwnBlock own =
      own_block(args.pyramid, [&](const Level& level) { return groups * u32(level.bands.count); });
  const Level& level = args.pyramid.levels[own.level];
  roi_align::average_staged<Scalar, Index, kMaps, kBlockSize>(args.table, on_level(r, level),
                                                              level.bands, level.maps, args.bins,
                                                              own.block, own.level * i32(r.n));
}

template <class Scalar, class Index, bool kLast, int kTileH, int kTileW, int kLaneChannels,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize, roi_align_backward::kLeastBlocks<Scalar, kBlockSize>)
    backward(const Args args) {
  constexpr int kChannels = kWarpSize * kLaneChannels;
  const Regions& r = args.regions;
  const u32 chunks = u32(r.n * ((r.c + kChannels - 1) / kChannels));
  // Many regions touch each of the few tiles of a coarse map: those blocks take longest.
  const OwnBlock own = own_block<true>(args.pyramid, [&](const Level& level) {
    return chunks * u32((level.h + kTileH - 1) / kTileH) * u32((level.w + kTileW - 1) / kTileW);
  });
  if (own.level >= args.pyramid.count) return;
  const Level& level = args.pyramid.levels[own.level];
  roi_align_backward::gather_average<Scalar, Index, kLast, kTileH, kTileW, kLaneChannels,
                                     kBlockSize>(args, on_level(r, level), level.maps, own.block,
                                                 own.level * i32(r.n));
}

}  // namespace torchkiln::multi_scale_roi_align
