// Quadrilaterals given by four consecutive vertices in either sense: area, and the area that two of them share. The
// method is that of geometry/rotated.h, with one of them cut into two triangles. Exact for every quadrilateral whose
// sides do not cross, convex or not.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/rotated.h"

namespace torchkiln {

// Counter-clockwise where y points up. One with a vertex that is not finite has NaN for its centre.
template <class T>
struct Quad {
  T x, y;          // centre: the mean of the vertices
  T px[4], py[4];  // vertices, from the centre
  T radius;        // of a circle around the centre that holds them
  T area;
};

// Exactly 0 for equal directions, and of opposite sign for exchanged ones.
template <class T>
TORCHKILN_HD T cross(T ax, T ay, T bx, T by) {
  return rounded_product(ax, by) - rounded_product(ay, bx);
}
template <class T>
TORCHKILN_HD T dot(T ax, T ay, T bx, T by) {
  return rounded_product(ax, bx) + rounded_product(ay, by);
}

// `at` has x1, y1, ..., x4, y4.
template <class T>
TORCHKILN_HD Quad<T> quad(const T at[8]) {
  Quad<T> q;
  T bad = T(0), squared = T(0);
  q.x = at[0] + ((at[2] - at[0]) + (at[4] - at[0]) + (at[6] - at[0])) / T(4);
  q.y = at[1] + ((at[3] - at[1]) + (at[5] - at[1]) + (at[7] - at[1])) / T(4);
  for (int i = 0; i < 4; ++i) {
    bad += not_finite(at[2 * i]) + not_finite(at[2 * i + 1]);
    q.px[i] = at[2 * i] - q.x;
    q.py[i] = at[2 * i + 1] - q.y;
    squared = max_of(q.px[i] * q.px[i] + q.py[i] * q.py[i], squared);
  }
  q.x += bad;
  q.radius = sqrt_of(squared);
  const T twice = cross(q.px[2] - q.px[0], q.py[2] - q.py[0], q.px[3] - q.px[1], q.py[3] - q.py[1]);
  q.area = abs_of(twice) / T(2);
  if (twice < T(0)) {
    const T x = q.px[1], y = q.py[1];
    q.px[1] = q.px[3];
    q.py[1] = q.py[3];
    q.px[3] = x;
    q.py[3] = y;
  }
  return q;
}

// The mean of max(f, 0) on the way from f = a to f = b.
template <class T>
TORCHKILN_HD T mean_positive(T a, T b) {
  const T sum = max_of(a, T(0)) + max_of(b, T(0));
  return sum == T(0) ? T(0) : sum * fast_quotient(sum, T(2) * (abs_of(a) + abs_of(b)));
}

// The integral of clamp(x, 0, 1 - y) dy over the part of an edge in the strip 0 <= y <= 1.
template <class T>
TORCHKILN_HD T unit_integral(T x0, T y0, T x1, T y1) {
  T begin = clamped(y0, T(0), T(1)), end = clamped(y1, T(0), T(1));
  if (begin == end) return T(0);
  const T slope = finite_slope(x1 - x0, y1 - y0);
  const T a = begin == y0 ? x0 : x0 + (begin - y0) * slope;
  const T b = end == y1 ? x1 : x1 + (end - y1) * slope;
  const T near = clamped(a, T(0), T(1)), far = clamped(b, T(0), T(1));
  T beyond = T(0);  // of the parts with x > 1, where the field is 1 - y
  if (near != far) {
    const T rise = fast_quotient(end - begin, b - a);
    const T low = begin + (near - a) * rise, high = end + (far - b) * rise;
    if (a > T(1)) beyond += (low - begin) * (T(1) - (low + begin) / T(2));
    if (b > T(1)) beyond += (end - high) * (T(1) - (end + high) / T(2));
    begin = low;
    end = high;
  }
  // clamp(x, 0, 1 - y) is x less what it has beyond 1 - y, for x from 0 to 1.
  const T above = mean_positive(near + (begin - T(1)), far + (end - T(1)));
  return beyond + (end - begin) * ((near + far) / T(2) - above);
}

// Twice an area up to here is none: its reciprocal would pass the range when it meets a vertex that is far away.
template <class T>
constexpr T kNoArea = T(1e-30);
template <>
inline constexpr double kNoArea<double> = 1e-240;

// The area that `q`, moved by (dx, dy), shares with the triangle of the origin, a and b; negative where that triangle
// turns clockwise, which one of a concave quadrilateral does.
template <class T>
TORCHKILN_HD T shared_with_triangle(const Quad<T>& q, T dx, T dy, T ax, T ay, T bx, T by) {
  const T twice = cross(ax, ay, bx, by);
  if (!(abs_of(twice) > kNoArea<T>)) return T(0);
  const T inverse = fast_quotient(T(1), twice);
  T x[5], y[5], sum = T(0);
  for (int i = 0; i < 4; ++i) {
    const T px = q.px[i] + dx, py = q.py[i] + dy;
    x[i] = cross(px, py, bx, by) * inverse;
    y[i] = cross(ax, ay, px, py) * inverse;
  }
  TORCHKILN_ROLLED
  for (int edge = 0; edge < 4; ++edge) {
    x[4] = x[0];
    y[4] = y[0];
    sum += unit_integral(x[0], y[0], x[1], y[1]);
    for (int i = 0; i < 4; ++i) {  // on to the next edge; registers have no index
      x[i] = x[i + 1];
      y[i] = y[i + 1];
    }
  }
  return twice * min_of(abs_of(sum), T(0.5));
}

// The area that two quadrilaterals share: from 0 to the lesser of their areas, or NaN.
template <class T>
TORCHKILN_HD T shared_area(const Quad<T>& a, const Quad<T>& b) {
  T value;
  if (apart(a, b, value)) return value;
  const bool exchange = a.area < b.area;  // the triangles are the smaller one's
  const Quad<T> large = exchange ? b : a, small = exchange ? a : b;
  const T dx = large.x - small.x, dy = large.y - small.y;
  T ax = small.px[1] - small.px[0], ay = small.py[1] - small.py[0], sum = T(0);
  T bx = small.px[2] - small.px[0], by = small.py[2] - small.py[0];
  TORCHKILN_ROLLED
  for (int triangle = 0; triangle < 2; ++triangle) {
    sum += shared_with_triangle(large, dx - small.px[0], dy - small.py[0], ax, ay, bx, by);
    ax = bx;
    ay = by;
    bx = small.px[3] - small.px[0];
    by = small.py[3] - small.py[0];
  }
  return clamped(sum, T(0), small.area);
}

}  // namespace torchkiln
