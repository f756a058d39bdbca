// Rotated rectangles and quadrilaterals: areas, and the area that two of them share. By Gauss's theorem that is an
// integral along the boundary of one shape: of the field whose divergence is 1 inside the other one and 0 outside. No
// vertices are found, sorted or counted twice, and the field is bounded, so a rounding moves the area by no more than
// itself times the length of the boundary: identical, touching and degenerate shapes need no rule of their own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/box.h"

namespace torchkiln {

// `bound` where the first operand is NaN, as the instruction has it; shapes with a NaN never come as far.
template <class T>
TORCHKILN_HD T clamped(T x, T low, T high) {
  return min_of(max_of(x, low), high);
}
#if defined(__CUDACC_RTC__)
template <>
TORCHKILN_HD float clamped(float x, float low, float high) {
  return ::fminf(::fmaxf(x, low), high);
}
#endif

// Of a sum that has it, NaN is the result; of finite numbers it is 0.
template <class T>
TORCHKILN_HD T not_finite(T x) {
  return x * T(0);
}

// A root within two units in the last place: of a circle that only tells what is far away. Exact, it is forty instructions.
TORCHKILN_HD float radius_of(float squared) {
#if defined(__CUDACC_RTC__)
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(squared));
  return result;
#else
  return sqrt_of(squared);
#endif
}
TORCHKILN_HD double radius_of(double squared) { return sqrt_of(squared); }

// A rectangle with everything that its pairs need. One with a side of 0 or less is empty; one with a number that is not
// finite has NaN for its centre, and so have all its overlaps. Aligned for vector loads.
template <class T>
struct alignas(16) Rotated {
  T x, y;            // centre
  T half_w, half_h;  // half sides
  T cos, sin;        // direction of the side w; the side h has (-sin, cos)
  T radius;          // of the circle through the corners
  T area;
};

template <class T>
TORCHKILN_HD Rotated<T> rotated(T x, T y, T w, T h, T angle) {
  Rotated<T> box;
  box.x = x + (not_finite(x) + not_finite(y) + not_finite(w) + not_finite(h) + not_finite(angle));
  box.y = y;
  box.half_w = positive_part(w) / T(2);
  box.half_h = positive_part(h) / T(2);
  sin_cos_of(angle, box.sin, box.cos);
  box.radius = radius_of(box.half_w * box.half_w + box.half_h * box.half_h);
  box.area = T(4) * box.half_w * box.half_h;
  return box;
}

// Corner `index` of 0 to 3, counter-clockwise where y points up, from (+w, +h) in the frame of the box.
template <class T>
TORCHKILN_HD void corner(const Rotated<T>& box, int index, T& x, T& y) {
  const T u = index == 0 || index == 3 ? box.half_w : -box.half_w;
  const T v = index < 2 ? box.half_h : -box.half_h;
  x = box.x + (u * box.cos - v * box.sin);
  y = box.y + (u * box.sin + v * box.cos);
}

// The second operand of a pair as the first one sees it: its frame is that of the axes.
template <class T>
struct Relative {
  T x, y;      // centre
  T cos, sin;  // of the angle between the two
};

template <class T>
TORCHKILN_HD Relative<T> relative(const Rotated<T>& box, const Rotated<T>& frame) {
  const T dx = box.x - frame.x, dy = box.y - frame.y;
  return {dx * frame.cos + dy * frame.sin, dy * frame.cos - dx * frame.sin,
          box.cos * frame.cos + box.sin * frame.sin, box.sin * frame.cos - box.cos * frame.sin};
}

// Are the circles around two shapes too far from each other, or is a centre NaN? Then `value` is their overlap.
template <class Shape, class T>
TORCHKILN_HD bool apart(const Shape& a, const Shape& b, T& value) {
  const T dx = a.x - b.x, dy = a.y - b.y, reach = a.radius + b.radius;
  const T squared = dx * dx + dy * dy;
  value = is_nan(squared) ? squared : T(0);
  return !(squared <= reach * reach);
}

// Shapes that overlap by less than this share of what they cover together, across a line, only touch: rounding decides.
template <class T>
constexpr T kTouching = sizeof(T) == 8 ? T(4e-15) : T(2e-6);

// Does a line along a side of `a` part the two? `r` is a as b sees it. (Of a line along a side of b the integral is 0.)
template <class T>
TORCHKILN_HD bool parted(const Rotated<T>& a, const Rotated<T>& b, const Relative<T>& r) {
  const T c = abs_of(r.cos), s = abs_of(r.sin), share = T(1) - kTouching<T>;
  const T w = a.half_w + (b.half_w * c + b.half_h * s),
          h = a.half_h + (b.half_w * s + b.half_h * c);
  return abs_of(r.x * r.cos + r.y * r.sin) >= w * share ||
         abs_of(r.y * r.cos - r.x * r.sin) >= h * share;
}

template <class T>
struct Window {
  T left, right, bottom, top;
};

// The mean of clamp(x, low, high) on the way from x = a to x = b.
template <class T>
TORCHKILN_HD T mean_clamped(T a, T b, T low, T high) {
  const T near = clamped(a, low, high), far = clamped(b, low, high);
  if (near == far) return near;
  const T inside = (far - near) * (far + near) / T(2);
  return fast_quotient(inside + (far * (b - far) - near * (a - near)), b - a);
}

// The integral of clamp(x, left, right) dy over the part of an edge between bottom and top. The edge runs from its
// middle (x, y) minus (ux, uy) to its middle plus (ux, uy); slope is ux / uy.
template <class T>
TORCHKILN_HD T edge_integral(T x, T y, T ux, T uy, T slope, const Window<T>& window) {
  const T first = y - uy, last = y + uy;
  const T begin = clamped(first, window.bottom, window.top);
  const T end = clamped(last, window.bottom, window.top);
  if (begin == end) return T(0);
  const T x_begin = begin == first ? x - ux : x + (begin - y) * slope;
  const T x_end = end == last ? x + ux : x + (end - y) * slope;
  return (end - begin) * mean_clamped(x_begin, x_end, window.left, window.right);
}

// A slope that is infinite belongs to an edge without height, which adds nothing.
template <class T>
TORCHKILN_HD T finite_slope(T dx, T dy) {
  return abs_of(dy) > T(1e-30) ? fast_quotient(dx, dy) : T(0);
}

// The area that two rotated rectangles share: from 0, which it is where they do not meet, to the lesser of their areas, or
// NaN.
template <class T>
TORCHKILN_HD T shared_area(const Rotated<T>& a, const Rotated<T>& b) {
  T value;
  if (apart(a, b, value)) return value;
  Relative<T> r = relative(a, b);
  if (parted(a, b, r)) return T(0);  // rounding would leave the integral a little
  // The origin is the point of b that is nearest to the centre of a: no number is larger than it must be.
  const T x = clamped(r.x, -b.half_w, b.half_w), y = clamped(r.y, -b.half_h, b.half_h);
  const Window<T> window = {-b.half_w - x, b.half_w - x, -b.half_h - y, b.half_h - y};
  r.x -= x;
  r.y -= y;
  // From the middle of a to that of an edge, and from there to the edge's end; then the next edge, a quarter on.
  T ox = a.half_w * r.cos, oy = a.half_w * r.sin, ux = -a.half_h * r.sin, uy = a.half_h * r.cos;
  T slope = finite_slope(-r.sin, r.cos), next_slope = finite_slope(r.cos, r.sin), sum = T(0);
  TORCHKILN_ROLLED
  for (int edge = 0; edge < 4; ++edge) {
    sum += edge_integral(r.x + ox, r.y + oy, ux, uy, slope, window);
    const T x_turned = -ox, y_turned = -oy, other = slope;
    ox = ux;
    oy = uy;
    ux = x_turned;
    uy = y_turned;
    slope = next_slope;
    next_slope = other;
  }
  return clamped(sum, T(0), min_of(a.area, b.area));
}

}  // namespace torchkiln
