// Boxes in space that stand upright and are turned around the vertical: a rotated rectangle with a height.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/rotated.h"

namespace torchkiln {

template <class T>
struct Prism {
  Rotated<T> base;
  T z, half_height;  // z of the centre
};

// `row` has x, y, z, dx, dy, dz and the angle.
template <class Scalar>
TORCHKILN_HD Prism<Acc<Scalar>> prism(const Scalar* row, Acc<Scalar> turn) {
  using T = Acc<Scalar>;
  const T z = load(row[2]), height = load(row[5]);
  Prism<T> box = {
      rotated(load(row[0]), load(row[1]), load(row[3]), load(row[4]), turn * load(row[6])), z,
      positive_part(height) / T(2)};
  box.base.x += not_finite(z) + not_finite(height);
  return box;
}

// The height that two of them share: from 0 to the lesser of their heights.
template <class T>
TORCHKILN_HD T shared_height(const Prism<T>& a, const Prism<T>& b) {
  const T lesser = T(2) * min_of(a.half_height, b.half_height);
  return clamped(a.half_height + b.half_height - abs_of(a.z - b.z), T(0), lesser);
}

// Area of a shape, volume of a box.
template <class Shape>
TORCHKILN_HD auto size_of(const Shape& shape) {
  return shape.area;
}
template <class T>
TORCHKILN_HD T size_of(const Prism<T>& box) {
  return box.base.area * (T(2) * box.half_height);
}

template <class T>
TORCHKILN_HD bool apart(const Prism<T>& a, const Prism<T>& b, T& value) {
  return apart(a.base, b.base, value) || abs_of(a.z - b.z) > a.half_height + b.half_height;
}

// The volume that two boxes share: from 0 to the lesser of their volumes, or NaN.
template <class T>
TORCHKILN_HD T shared_area(const Prism<T>& a, const Prism<T>& b) {
  return shared_area(a.base, b.base) * shared_height(a, b);
}

}  // namespace torchkiln
