// Forward kernels that keep bands of maps in shared memory (`staged` of roi_align.cuh): how maps are cut, and the memory
// of their tables.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>

#include "bindings/support/bands.h"
#include "bindings/support/cuda.h"
#include "detection/roi_align.h"

namespace torchkiln::bindings {

// Cuts maps, of which a block keeps `maps` at a time; count is 0 where `staged` cannot serve.
inline Bands cut_regions(const Device& device, const roi_align::Regions& r, std::int64_t element,
                         std::int64_t maps) {
  const bool few_samples = r.sampling_ratio >= 1 && r.sampling_ratio <= roi_align::kQuadSamples;
  if (!few_samples || std::max(r.h, r.w) > roi_align::kMostQuadPixels ||
      r.k * std::max(r.pooled_h, r.n) > std::numeric_limits<std::int32_t>::max()) {
    return {};
  }
  const std::int64_t row_bytes = r.w * element * maps;
  // Half of a multiprocessor's memory, so that one block loads while another computes; all of it where a half would
  // hold too few rows.
  const std::int64_t half = 112 * 1024;
  return cut_into_bands(
      device, {.maps = r.n * r.c / maps,
               .height = r.h,
               .row_bytes = row_bytes,
               // Samples of a bin lie half of its height apart; most bins are lower than 0.6 times
               // those of a region as high as the map.
               .reach = 2 + r.h * 3 / (10 * r.pooled_h),
               .budget = half / row_bytes < 64 && half / row_bytes < r.h ? 2 * half : half,
               .most_rows = r.h});
}

struct StagedMemory {
  Tensor memory;
  roi_align::StagedTable table;
  std::int64_t weight_bytes, pixel_bytes, entry_bytes, part_bytes;

  // Of a table at this offset in Args.
  std::array<Buffer, 4> buffers(std::size_t table_at, torchkiln_access access) const {
    using roi_align::StagedTable;
    constexpr std::size_t list_at = offsetof(StagedTable, list);
    return {buffer(table_at + offsetof(StagedTable, weights), access, weight_bytes),
            buffer(table_at + offsetof(StagedTable, pixels), access, pixel_bytes),
            buffer(table_at + list_at + offsetof(BandList, entries), access, entry_bytes),
            buffer(table_at + list_at + offsetof(BandList, parts), access, part_bytes)};
  }
};

// For the maps of `images` images, on the device and for the dtype of `like`.
inline StagedMemory allocate_staged(const Tensor& like, const roi_align::Regions& r,
                                    std::int64_t images, const Bands& bands) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  const std::int64_t axis_bins = r.k * (r.pooled_h + r.pooled_w);
  StagedMemory m{.memory = Tensor(),
                 .table = {},
                 .weight_bytes = axis_bins * static_cast<std::int64_t>(
                                                 wide ? sizeof(roi_align::QuadWeights<double>)
                                                      : sizeof(roi_align::QuadWeights<float>)),
                 .pixel_bytes = axis_bins * std::int64_t{sizeof(roi_align::QuadPixels)},
                 .entry_bytes = r.k * r.pooled_h * std::int64_t{sizeof(BandEntry)},
                 .part_bytes = images * bands.count * std::int64_t{sizeof(Range)}};
  m.memory = empty(like, ScalarType::Byte,
                   {m.weight_bytes + m.pixel_bytes + m.entry_bytes + m.part_bytes});
  auto* const weights = mutable_data<std::uint8_t>(m.memory);
  auto* const pixels = weights + m.weight_bytes;
  auto* const entries = pixels + m.pixel_bytes;
  m.table.weights = weights;
  m.table.pixels = reinterpret_cast<roi_align::QuadPixels*>(pixels);
  m.table.list.bands = bands;
  m.table.list.entries = reinterpret_cast<BandEntry*>(entries);
  m.table.list.parts = reinterpret_cast<Range*>(entries + m.entry_bytes);
  return m;
}

}  // namespace torchkiln::bindings
