// Cuts feature maps for kernels that keep a band of one in shared memory (common/bands.h).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bindings/support/cuda.h"
#include "common/bands.h"

namespace torchkiln::bindings {

struct BandRequest {
  std::int64_t maps, height;  // height in rows
  std::int64_t row_bytes;     // of shared memory
  std::int64_t reach;         // rows that a band should have below its own
  std::int64_t budget;        // bytes that a block may take; the device may have less
  std::int64_t most_rows;
};

// The fewest bands that fit, or more of them while they are fewer than the GPU can hold. count is 0 when a row and what
// it reaches do not fit.
inline Bands cut_into_bands(const Device& device, const BandRequest& r) {
  constexpr std::int64_t kReserved = 2048, kLeastRows = 8;
  const std::int64_t bytes =
      std::min<std::int64_t>(r.budget, device.shared_bytes_per_block - kReserved);
  const std::int64_t most = std::min({bytes / r.row_bytes, r.most_rows, r.height});
  const std::int64_t reach = std::min(r.reach, most / 2);
  const std::int64_t least = std::min<std::int64_t>(r.height, r.reach > 0 ? kLeastRows : 1);
  if (most < least) return {0, 0, 0};
  std::int64_t count = most == r.height ? 1 : ceil_div(r.height - reach, most - reach);
  const std::int64_t wanted = ceil_div(2 * device.multiprocessors, r.maps);
  count = std::max(count, std::min(wanted, r.height / (4 * kLeastRows + reach)));
  const std::int64_t step = ceil_div(std::max<std::int64_t>(r.height - reach, 1), count);
  const std::int64_t height = std::min(step + reach, r.height);
  return {static_cast<i32>(ceil_div(r.height - (height - step), step)), static_cast<i32>(step),
          static_cast<i32>(height)};
}

// The row of `defaults`, which descend, with the largest blocks of which `threads` together fill a multiprocessor; its
// shared memory and the number of blocks say how many it holds at a time.
template <class Tunables>
std::uint32_t choose_block_size(const Device& device, std::int64_t blocks,
                                std::int64_t shared_bytes, std::int64_t threads,
                                const std::vector<Tunables>& defaults) {
  const std::int64_t fitting = device.shared_bytes_per_block / (shared_bytes + 1024);
  const std::int64_t resident =
      std::max<std::int64_t>(1, std::min(fitting, ceil_div(blocks, device.multiprocessors)));
  std::uint32_t row = 0;
  while (row + 1 < defaults.size() && defaults[row].block_size * resident > threads) ++row;
  return row;
}

}  // namespace torchkiln::bindings
