// Axis-aligned boxes: area, intersection, enclosing box. A box with x2 < x1 or y2 < y1 is empty: its area is 0.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln {

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

template <class Scalar>
TORCHKILN_HD Box<Acc<Scalar>> load_box(const Scalar* boxes, i64 index) {
  const Scalar* row = boxes + 4 * index;
  return {load(row[0]), load(row[1]), load(row[2]), load(row[3])};
}

template <class Scalar>
TORCHKILN_HD void store_box(Scalar* boxes, i64 index, const Box<Acc<Scalar>>& box) {
  Scalar* row = boxes + 4 * index;
  store(row[0], box.x1);
  store(row[1], box.y1);
  store(row[2], box.x2);
  store(row[3], box.y2);
}

// The greater and the lesser one; a NaN in either operand is the result.
template <class T>
TORCHKILN_HD T nan_max(T a, T b) {
  return a > b || is_nan(a) ? a : b;
}
template <class T>
TORCHKILN_HD T nan_min(T a, T b) {
  return a < b || is_nan(a) ? a : b;
}
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800  // one instruction there
template <>
TORCHKILN_HD float nan_max(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
template <>
TORCHKILN_HD float nan_min(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#endif

// max(x, 0) that keeps NaN: a box with a NaN coordinate must not look like an empty one.
template <class T>
TORCHKILN_HD T positive_part(T x) {
  return nan_max(x, T(0));
}

template <class T>
TORCHKILN_HD T area(const Box<T>& box) {
  return positive_part(box.x2 - box.x1) * positive_part(box.y2 - box.y1);
}

template <class T>
struct Sides {
  T w, h;
};

// Of what two boxes have in common.
template <class T>
TORCHKILN_HD Sides<T> common_sides(const Box<T>& a, const Box<T>& b) {
  return {positive_part(nan_min(a.x2, b.x2) - nan_max(a.x1, b.x1)),
          positive_part(nan_min(a.y2, b.y2) - nan_max(a.y1, b.y1))};
}

template <class T>
TORCHKILN_HD T intersection(const Box<T>& a, const Box<T>& b) {
  const Sides<T> common = common_sides(a, b);
  return common.w * common.h;
}

}  // namespace torchkiln
