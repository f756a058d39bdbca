// Whether two results of a launch are the same, within what the order of a sum may change.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace torchkiln::jit {

// Largest absolute value, and how far apart two results are; both finite parts only. `different`: elements of which
// only one is finite, or that are other bytes.
struct Distance {
  double scale = 0;
  double apart = 0;
  std::size_t different = 0;
};
// `type` is a torchkiln_type, or TORCHKILN_BYTES.
Distance compare(std::span<const std::byte> a, std::span<const std::byte> b, int type);

// How far apart results may be, relative to the largest: a few roundings of the type, and what reordering a long sum in
// float32 costs. `declared` replaces it unless 0.
double relative_tolerance(int type, double declared);

}  // namespace torchkiln::jit
