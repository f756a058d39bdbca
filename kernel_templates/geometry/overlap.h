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

// Is IoU(a, b) > threshold? In product form, so that an empty or NaN union never exceeds. min and max may drop a NaN
// coordinate here, because then the area is NaN and with it the union.
template <class T>
TORCHKILN_HD bool exceeds(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T threshold) {
  const T inter = guarded_intersection(a, b);
  return inter > threshold * ((area_a + area_b) - inter);
}

}  // namespace torchkiln
