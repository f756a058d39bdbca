// The suppression test of non-maximum suppression: do two boxes overlap by more than a threshold? One definition whose
// every rounding is fixed, so that CPU and GPU keep the same boxes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "geometry/box.h"

namespace torchkiln {

// The area of a box; NaN when a coordinate is NaN, which keeps the box out of every suppression: exceeds() is false.
template <class T>
TORCHKILN_HD T guarded_area(const Box<T>& box) {
  return rounded_product(positive_part(box.x2 - box.x1), positive_part(box.y2 - box.y1));
}

// The intersection of two boxes, 0 for many kinds of NaN: their areas tell.
template <class T>
TORCHKILN_HD T guarded_intersection(const Box<T>& a, const Box<T>& b) {
  const T width = max_of(min_of(a.x2, b.x2) - max_of(a.x1, b.x1), T(0));
  const T height = max_of(min_of(a.y2, b.y2) - max_of(a.y1, b.y1), T(0));
  return rounded_product(width, height);
}

// Half a step from a positive threshold to the next number. Below 0 the threshold itself, with which reaches_past() is
// true for every union above 0.
TORCHKILN_HD float half_step(float threshold) {
  const float next = bits_float(float_bits(threshold) + 1);
  return threshold > 0 ? (next - threshold) * 0.5f : min_of(threshold, 0.0f);
}
TORCHKILN_HD double half_step(double threshold) {
  const double next = bits_double(double_bits(threshold) + 1);
  return threshold > 0 ? (next - threshold) * 0.5 : min_of(threshold, 0.0);
}

// inter / united > threshold, the quotient rounded; false for NaN and an empty union. The GPU has no cheap division: the
// quotient rounds to more than the threshold where it is more than half a step above it (it never is just half a step
// above: that would take one digit more than `inter` has), and near there the difference is exact. Areas under 1e-30 in
// float32 leave half a step no digits: there equality may go either way.
template <class T>
TORCHKILN_HD bool reaches_past(T inter, T united, T threshold) {
#if defined(__CUDACC_RTC__) || defined(TORCHKILN_EMULATED_GPU)
  return fused(-threshold, united, inter) > half_step(threshold) * united;
#else
  return inter / united > threshold;
#endif
}

// Is IoU(a, b) > threshold? min and max may drop a NaN coordinate here, because then the area is NaN and with it the
// union.
template <class T>
TORCHKILN_HD bool exceeds(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T threshold) {
  const T inter = guarded_intersection(a, b);
  return reaches_past(inter, (area_a + area_b) - inter, threshold);
}

// The greatest number below a threshold above 0, so that "at least" is "more than" it; else one below every IoU.
TORCHKILN_HD float just_below(float threshold) {
  return threshold > 0 ? bits_float(float_bits(threshold) - 1) : min_of(threshold, -1.0f);
}
TORCHKILN_HD double just_below(double threshold) {
  return threshold > 0 ? bits_double(double_bits(threshold) - 1) : min_of(threshold, -1.0);
}

}  // namespace torchkiln
