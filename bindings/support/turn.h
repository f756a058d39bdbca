// Turns tiles of numbers: what lies along rows comes to lie across them. CPU loops go through neighbouring lines side by
// side in vectors that way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace torchkiln::bindings {

// Four neighbours of each of four rows, which are `stride` apart, become four rows, which are `to_stride` apart.
inline void turn_four(const float* from, std::ptrdiff_t stride, float* to,
                      std::ptrdiff_t to_stride) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  const auto row = [&](int i) { return *reinterpret_cast<const Four*>(from + i * stride); };
  const Four a = __builtin_shufflevector(row(0), row(1), 0, 4, 1, 5);
  const Four b = __builtin_shufflevector(row(2), row(3), 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(row(0), row(1), 2, 6, 3, 7);
  const Four d = __builtin_shufflevector(row(2), row(3), 2, 6, 3, 7);
  const auto put = [&](int i, Four value) { *reinterpret_cast<Four*>(to + i * to_stride) = value; };
  put(0, __builtin_shufflevector(a, b, 0, 1, 4, 5));
  put(1, __builtin_shufflevector(a, b, 2, 3, 6, 7));
  put(2, __builtin_shufflevector(c, d, 0, 1, 4, 5));
  put(3, __builtin_shufflevector(c, d, 2, 3, 6, 7));
}

// The same of doubles, which four vectors of two hold.
inline void turn_four(const double* from, std::ptrdiff_t stride, double* to,
                      std::ptrdiff_t to_stride) {
  typedef double Two __attribute__((vector_size(16), aligned(8), may_alias));
  for (int i = 0; i < 4; i += 2) {
    for (int j = 0; j < 4; j += 2) {
      const Two a = *reinterpret_cast<const Two*>(from + i * stride + j);
      const Two b = *reinterpret_cast<const Two*>(from + (i + 1) * stride + j);
      *reinterpret_cast<Two*>(to + j * to_stride + i) = __builtin_shufflevector(a, b, 0, 2);
      *reinterpret_cast<Two*>(to + (j + 1) * to_stride + i) = __builtin_shufflevector(a, b, 1, 3);
    }
  }
}

}  // namespace torchkiln::bindings
