// silu, x * sigmoid(x), and its slope.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/numbers.h"

namespace torchkiln {

template <class T>
TORCHKILN_HD T silu_of(T x) {
  return x * sigmoid_of(x);
}
template <class T>
TORCHKILN_HD T silu_slope(T x) {
  const T s = sigmoid_of(x);
  return s * (T(1) + x * (T(1) - s));
}

// A tensor of one of two dtypes: weights may stay in float32 beside inputs of a half type.
template <class Scalar>
TORCHKILN_HD Acc<Scalar> load_either(const void* values, bool is_float, i64 at) {
  if (is_float) return Acc<Scalar>(static_cast<const float*>(values)[at]);
  return load(static_cast<const Scalar*>(values)[at]);
}
// Such an element as it lies in memory: other loads may be under way with it, and nothing waits before its value is used.
template <class Scalar>
struct Either {
  static constexpr bool kIsHalf = sizeof(Scalar) == 2;  // float32 stands beside no other
  float wide = 0;
  Scalar own{};

  TORCHKILN_HD void read(const void* values, bool is_float, i64 at) {
    if (kIsHalf && is_float) {
      wide = static_cast<const float*>(values)[at];
    } else {
      own = static_cast<const Scalar*>(values)[at];
    }
  }
  TORCHKILN_HD Acc<Scalar> value(bool is_float) const {
    return kIsHalf && is_float ? Acc<Scalar>(wide) : load(own);
  }
};
template <class Scalar>
TORCHKILN_HD void store_either(void* values, bool is_float, i64 at, Acc<Scalar> value) {
  if (is_float) {
    static_cast<float*>(values)[at] = static_cast<float>(value);
  } else {
    store(static_cast<Scalar*>(values)[at], value);
  }
}

}  // namespace torchkiln
