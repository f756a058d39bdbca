// Tables of taps for the kernels that pool regions (roi_align.h): their sizes and memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <vector>

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

// The gradient of bins with channels innermost, as the backwards read it.
Tensor by_channel(const CudaPlace& place, const Tensor& bins);

// Of kernels that gather gradients (roi_gather.cuh): 32 channels a lane's place, and warps that share a row of a tile.
struct GatherTunables {
  std::int64_t lane_channels, split;

  static constexpr std::int64_t kSide = 8;
  std::int64_t channels() const { return 32 * lane_channels; }
  std::int64_t block_size() const { return 32 * kSide * split; }
  static std::int64_t tiles(std::int64_t h, std::int64_t w) {
    return ceil_div(h, kSide) * ceil_div(w, kSide);
  }
};
inline const std::vector<std::int64_t> kGatherLaneChannels = {1, 2, 4}, kGatherSplits = {1, 2, 4};
inline const std::vector<GatherTunables> kGatherDefaults = {{4, 1}, {2, 1}, {1, 1}};

// What a thread keeps must fit into its registers, and a tile into 48 KB.
inline bool gather_fits(std::int64_t scalar, const GatherTunables& t) {
  const std::int64_t bytes = scalar == TORCHKILN_DOUBLE ? 8 : 4;
  const std::int64_t pixels = GatherTunables::kSide * GatherTunables::kSide;
  return t.lane_channels * t.split * bytes <= 32 &&
         pixels * (t.channels() + 1) * bytes <= 40 * 1024;
}
// As many channels a block as there are: its list of regions serves them all.
inline std::uint32_t choose_gather(std::int64_t scalar, std::int64_t channels) {
  if (channels <= 32) return 2;
  return channels > 64 && scalar != TORCHKILN_DOUBLE ? 0 : 1;
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
