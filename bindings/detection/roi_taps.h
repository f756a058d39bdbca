// Tables of taps for the kernels that pool regions (roi_align.h): their sizes and memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <vector>

#include "bindings/detection/layout_copy.h"
#include "bindings/detection/roi_align.h"
#include "bindings/support/cuda.h"
#include "detection/roi_align.h"

namespace torchkiln::bindings {

// The taps of all regions, made once for all channels; they live until the launch that reads them is queued.
template <class Args>
struct TapTable {
  Tensor memory;
  std::int64_t tap_bytes, range_bytes, span_bytes;

  std::array<Buffer, 3> read() const {
    return {reads(offsetof(Args, taps), tap_bytes), reads(offsetof(Args, ranges), range_bytes),
            reads(offsetof(Args, spans), span_bytes)};
  }
  std::array<Buffer, 3> written() const {
    return {writes(offsetof(Args, taps), tap_bytes), writes(offsetof(Args, ranges), range_bytes),
            writes(offsetof(Args, spans), span_bytes)};
  }
};

// Elements that one thread of `last` handles: 16 bytes, or 1 when the channels do not divide.
inline std::int64_t vector_width(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}

// roi_align's kernels, with whatever taps are in the table: averages, and the gradient of the maps, for which
// the gradient of the bins has channels innermost.
void average_by_table(const CudaPlace& place, const RoiAlignPlan& p,
                      const TapTable<roi_align::Args>& table);
void gather_by_table(const CudaPlace& place, const RoiAlignPlan& p,
                     const TapTable<roi_align::Args>& table);

// The tiles of roi_align_backward.cuh.
struct TileTunables {
  std::int64_t tile_h, tile_w, lane_channels, block_size;

  // The sums must fit into static shared memory, which is 48 KB.
  static constexpr std::int64_t kMostBytes = 36 * 1024;
  static std::int64_t sum_bytes(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 8 : 4; }
  bool fits(std::int64_t scalar) const {
    return tile_h * tile_w * (32 * lane_channels + 1) * sum_bytes(scalar) <= kMostBytes;
  }
  // So must the weights of averages, of which each patch has a warp, or as many as the others. Several channels of a
  // lane all exist.
  bool fits_averages(std::int64_t scalar, std::int64_t channels) const {
    const std::int64_t warps = block_size / 32;
    const std::int64_t patches = tile_h * tile_w / (roi_align::kPatchH * roi_align::kPatchW);
    const std::int64_t weights = (roi_align::kHeldBins + 1) * (tile_h + tile_w) + 8;
    return fits(scalar) && warps % patches == 0 &&
           (lane_channels == 1 || 32 * lane_channels <= channels) &&
           warps * weights * sum_bytes(scalar) <= kMostBytes;
  }
};

inline const std::vector<Parameter> kTileTunables = {
    ints("tile_h", {4, 8, 16}), ints("tile_w", {8, 16, 32}), ints("lane_channels", {1, 2, 4}),
    ints("block_size", {128, 256, 512})};

// Of averages, the first defaults of their kernels.
constexpr TileTunables kManyChannels = {8, 8, 4, 256}, kSomeChannels = {8, 8, 2, 256},
                       kFewChannels = {8, 8, 1, 256}, kShared = {4, 8, 4, 256};
// `blocks`: of kManyChannels. Small maps have too few tiles to keep the GPU busy: fewer channels a block. Where each
// multiprocessor has few, the launch waits for the tile of most regions: two warps share a patch.
inline std::uint32_t choose_average_tile(const Device& device, std::int64_t scalar,
                                         std::int64_t channels, std::int64_t blocks) {
  if (channels < 64) return 2;
  const bool many = channels >= 128 && scalar != TORCHKILN_DOUBLE;
  if (!many || blocks < 4 * device.multiprocessors) return 1;
  return blocks < 24 * device.multiprocessors ? 3 : 0;
}

inline std::int64_t index_type(const Tensor& maps, const Tensor& bins) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  return std::max(maps.numel(), bins.numel()) <= kMost ? TORCHKILN_I32 : TORCHKILN_I64;
}

// Places for the taps of an axis of `size` pixels: those that it can touch, or two for each sample if these are fewer and
// their number (0 for none) is known.
inline std::int64_t tap_capacity(std::int64_t size, std::int64_t pooled, std::int64_t samples) {
  const std::int64_t touched = size + 3 * pooled;
  return samples > 0 ? std::min<std::int64_t>(touched, 2 * samples * pooled) : touched;
}

// Allocates a table and points args to it; args.row_capacity and args.column_capacity are set.
template <class Args>
TapTable<Args> allocate_table(const Tensor& like, Args& args) {
  const roi_align::Regions& r = args.regions;
  constexpr std::int64_t kTapBytes = 16;
  TapTable<Args> table{
      .memory = Tensor(),
      .tap_bytes = r.k * (args.row_capacity + args.column_capacity) * kTapBytes,
      .range_bytes = r.k * (r.pooled_h + r.pooled_w) * static_cast<std::int64_t>(sizeof(Range)),
      .span_bytes = r.k * static_cast<std::int64_t>(sizeof(roi_align::Span))};
  table.memory =
      empty(like, ScalarType::Byte, {table.tap_bytes + table.range_bytes + table.span_bytes});
  auto* memory = mutable_data<std::uint8_t>(table.memory);
  args.taps = memory;
  args.ranges = reinterpret_cast<Range*>(memory + table.tap_bytes);
  args.spans = memory + table.tap_bytes + table.range_bytes;
  return table;
}

}  // namespace torchkiln::bindings
