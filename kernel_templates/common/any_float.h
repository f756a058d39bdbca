// Floats whose dtype is known at run time only: for numbers that are few beside what a kernel is specialised for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

enum FloatType { kFloatNumbers = 0, kHalfNumbers = 1, kBfloat16Numbers = 2, kDoubleNumbers = 3 };

template <class T>
TORCHKILN_HD T load_as(const void* from, i64 type, i64 at) {
  switch (type) {
    case kHalfNumbers:
      return T(load(static_cast<const half*>(from)[at]));
    case kBfloat16Numbers:
      return T(load(static_cast<const bfloat16*>(from)[at]));
    case kDoubleNumbers:
      return T(static_cast<const double*>(from)[at]);
    default:
      return T(static_cast<const float*>(from)[at]);
  }
}

template <class T>
TORCHKILN_HD void store_as(void* to, i64 type, i64 at, T value) {
  switch (type) {
    case kHalfNumbers:
      return store(static_cast<half*>(to)[at], float(value));
    case kBfloat16Numbers:
      return store(static_cast<bfloat16*>(to)[at], float(value));
    case kDoubleNumbers:
      return store(static_cast<double*>(to)[at], double(value));
    default:
      return store(static_cast<float*>(to)[at], float(value));
  }
}

// The same, compiled once instead of at each of several places. By value: a reference would put the kernel's arguments
// on the stack.
template <class T>
TORCHKILN_HD_CALLED T load_as_called(const void* from, i64 type, i64 at) {
  return load_as<T>(from, type, at);
}
template <class T>
TORCHKILN_HD_CALLED void store_as_called(void* to, i64 type, i64 at, T value) {
  store_as(to, type, at, value);
}

}  // namespace torchkiln
