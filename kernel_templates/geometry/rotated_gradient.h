// How the area that two rotated rectangles share changes with one of them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/prism.h"
#include "geometry/rotated.h"

namespace torchkiln {

template <class T>
struct RotatedGradient {
  T x, y, w, h, angle;
};

// The part of an edge that lies in a window around the origin: its length, and its length times the place of its middle.
template <class T>
struct EdgePart {
  T length, moment;
};

// Limits the part [begin, end] of an edge at position + t * direction to |.| <= half; returns the part's weight. A side on
// the window's side is half in it: of two equal boxes each has half of every side.
template <class T>
TORCHKILN_HD T limit_to(T position, T direction, T half, T& begin, T& end) {
  constexpr T kTie = sizeof(T) == 8 ? T(1e-14) : T(1e-6);
  if (abs_of(direction) > kTie) {
    const T inverse = fast_quotient(T(1), direction);
    const T s = (-half - position) * inverse, t = (half - position) * inverse;
    begin = max_of(begin, min_of(s, t));
    end = min_of(end, max_of(s, t));
    return T(1);
  }
  const T beyond = abs_of(position) - half;
  if (abs_of(beyond) <= kTie * half) return T(0.5);
  return beyond < T(0) ? T(1) : T(0);
}

template <class T>
TORCHKILN_HD EdgePart<T> part_inside(T x, T y, T ux, T uy, T half, const Rotated<T>& window) {
  T begin = -half, end = half;
  const T weight =
      limit_to(x, ux, window.half_w, begin, end) * limit_to(y, uy, window.half_h, begin, end);
  const T length = end > begin ? weight * (end - begin) : T(0);
  return {length, length * (begin + end) / T(2)};
}

// The gradient of shared_area(a, b) with respect to a.
template <class T>
TORCHKILN_HD RotatedGradient<T> shared_area_gradient(const Rotated<T>& a, const Rotated<T>& b) {
  T value;
  if (apart(a, b, value)) return {value, value, value, value, value};
  const Relative<T> r = relative(a, b);
  const T ux = a.half_w * r.cos, uy = a.half_w * r.sin;
  const T vx = -a.half_h * r.sin, vy = a.half_h * r.cos;
  const EdgePart<T> right = part_inside(r.x + ux, r.y + uy, -r.sin, r.cos, a.half_h, b);
  const EdgePart<T> left = part_inside(r.x - ux, r.y - uy, -r.sin, r.cos, a.half_h, b);
  const EdgePart<T> top = part_inside(r.x + vx, r.y + vy, r.cos, r.sin, a.half_w, b);
  const EdgePart<T> bottom = part_inside(r.x - vx, r.y - vy, r.cos, r.sin, a.half_w, b);
  const T along = right.length - left.length, across = top.length - bottom.length;
  return {a.cos * along - a.sin * across, a.sin * along + a.cos * across,
          (right.length + left.length) / T(2), (top.length + bottom.length) / T(2),
          (left.moment - right.moment) + (top.moment - bottom.moment)};
}

// How far the top and the bottom of what two boxes share are a's; equal ones are half of each.
template <class T>
TORCHKILN_HD T upper_share(const Prism<T>& a, const Prism<T>& b) {
  const T top = (a.z - b.z) + a.half_height;
  return top < b.half_height ? T(1) : (top == b.half_height ? T(0.5) : T(0));
}
template <class T>
TORCHKILN_HD T lower_share(const Prism<T>& a, const Prism<T>& b) {
  const T bottom = (a.z - b.z) - a.half_height;
  return bottom > -b.half_height ? T(1) : (bottom == -b.half_height ? T(0.5) : T(0));
}

}  // namespace torchkiln
