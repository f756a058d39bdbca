// Sampler A, one axis at a time: a bilinear sample of a map is the product of a row factor and a column factor, also at
// the border (positions within a pixel outside are clamped to it) and beyond (no sample). Positions in pixels.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

// What a position takes from the pixels `low` and `high` of its axis. Outside, or NaN: weights 0 and pixel 0.
template <class T>
struct Taps {
  i32 low, high;
  T weight_low, weight_high;
  bool inside;
};

template <class T>
TORCHKILN_HD Taps<T> taps_at(T position, i32 size) {
  if (!(position >= T(-1) && position <= T(size))) return {0, 0, T(0), T(0), false};
  position = max_of(position, T(0));
  const i32 low = min_of(i32(position), size - 1);
  // Behind the last pixel centre both taps are that pixel, and the weights 1 and 0.
  const T fraction = low == size - 1 ? T(0) : position - T(low);
  return {low, min_of(low + 1, size - 1), T(1) - fraction, fraction, true};
}

}  // namespace torchkiln
