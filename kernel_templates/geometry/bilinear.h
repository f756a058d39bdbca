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

// The pixel to count positions around this one from: small numbers have small roundings. 0 for one far from every map.
template <class T>
TORCHKILN_HD i32 origin_of(T position) {
  return abs_of(position) < T(1 << 22) ? i32(floor_of(position)) : 0;
}

// `position` is counted from the pixel `origin`.
template <class T>
TORCHKILN_HD Taps<T> taps_at(T position, i32 origin, i32 size) {
  if (!(position >= T(-1 - origin) && position <= T(size - origin)))
    return {0, 0, T(0), T(0), false};
  const T whole = floor_of(max_of(position, T(-origin)));
  const i32 low = min_of(origin + i32(whole), size - 1);
  // Before the first pixel centre, and behind the last one, the weights are 1 and 0; there both taps are that pixel.
  const T fraction = low == size - 1 ? T(0) : max_of(position - whole, T(0));
  return {low, min_of(low + 1, size - 1), T(1) - fraction, fraction, true};
}

}  // namespace torchkiln
