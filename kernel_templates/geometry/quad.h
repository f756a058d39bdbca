// Quadrilaterals given by four consecutive vertices in either sense: area, and the area that two of them share. The
// method is that of geometry/rotated.h, with one of them cut into two triangles. Exact for every quadrilateral whose
// sides do not cross, convex or not.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/rotated.h"

namespace torchkiln {

// Counter-clockwise where y points up. One with a vertex that is not finite has NaN for its centre. Aligned for
// vector loads.
template <class T>
struct alignas(16) Quad {
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
// The same where what cancels counts: of slender shapes, and of lines that begin far away.
template <class T>
TORCHKILN_HD T close_cross(T ax, T ay, T bx, T by) {
  return difference_of_products(ax, by, ay, bx);
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
  q.radius = radius_of(squared);
  const T twice =
      close_cross(q.px[2] - q.px[0], q.py[2] - q.py[0], q.px[3] - q.px[1], q.py[3] - q.py[1]);
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

// Where a line meets the height y, which lies between its ends; a slope would carry its rounding over the way from an end
// that is far away. Of a line without height any point will do.
template <class T>
TORCHKILN_HD T crossing(T x0, T y0, T x1, T y1, T y) {
  const T height = y1 - y0;
  if (!(abs_of(height) > T(1e-30))) return x0;
  return fast_quotient(close_cross(x0, y0 - y, x1, y1 - y), height);
}

// The integral of clamp(x, 0, side - y) dy over the part of an edge in the strip 0 <= y <= side.
template <class T>
TORCHKILN_HD T edge_integral(T x0, T y0, T x1, T y1, T side) {
  T begin = clamped(y0, T(0), side), end = clamped(y1, T(0), side);
  if (begin == end) return T(0);
  const T a = begin == y0 ? x0 : crossing(x0, y0, x1, y1, begin);
  const T b = end == y1 ? x1 : crossing(x0, y0, x1, y1, end);
  const T near = clamped(a, T(0), side), far = clamped(b, T(0), side);
  T beyond = T(0);  // of the parts with x > side, where the field is side - y
  if (near != far) {
    const T rise = fast_quotient(end - begin, b - a);
    const T low = begin + (near - a) * rise, high = end + (far - b) * rise;
    if (a > side) beyond += (low - begin) * (side - (low + begin) / T(2));
    if (b > side) beyond += (end - high) * (side - (end + high) / T(2));
    begin = low;
    end = high;
  }
  // clamp(x, 0, side - y) is x less what it has beyond side - y, for x from 0 to side.
  const T above = mean_positive(near + (begin - side), far + (end - side));
  return beyond + (end - begin) * ((near + far) / T(2) - above);
}

// Twice an area up to here is none: its reciprocal would pass the range when it meets a vertex that is far away.
template <class T>
constexpr T kNoArea = T(1e-30);
template <>
inline constexpr double kNoArea<double> = 1e-240;

// The power of two, of x's sign, that takes x to [1, 2), or the greatest ones to [2, 4): to multiply by it is exact.
TORCHKILN_HD float scale_to_one(float x) {
  const u32 bits = float_bits(x), exponent = min_of(bits & 0x7f800000u, 0x7e800000u);
  return bits_float((bits & 0x80000000u) | (0x7f000000u - exponent));
}
TORCHKILN_HD double scale_to_one(double x) {
  const u64 bits = double_bits(x), most = 0x7fd0000000000000u;
  const u64 exponent = min_of(bits & 0x7ff0000000000000u, most);
  return bits_double((bits & 0x8000000000000000u) | (0x7fe0000000000000u - exponent));
}

// The area that `q`, moved by (dx, dy), shares with the triangle of the origin, a and b; negative where that triangle
// turns clockwise, which one of a concave quadrilateral does.
template <class T>
TORCHKILN_HD T shared_with_triangle(const Quad<T>& q, T dx, T dy, T ax, T ay, T bx, T by) {
  const T twice = close_cross(ax, ay, bx, by);
  if (!(abs_of(twice) > kNoArea<T>)) return T(0);
  // In the frame of a and b, where the triangle's sides are `side`, between 1 and 2.
  const T scale = scale_to_one(twice), side = twice * scale;
  T x[5], y[5], sum = T(0);
  for (int i = 0; i < 4; ++i) {
    const T px = q.px[i] + dx, py = q.py[i] + dy;
    x[i] = close_cross(px, py, bx, by) * scale;
    y[i] = close_cross(ax, ay, px, py) * scale;
  }
  TORCHKILN_ROLLED
  for (int edge = 0; edge < 4; ++edge) {
    x[4] = x[0];
    y[4] = y[0];
    sum += edge_integral(x[0], y[0], x[1], y[1], side);
    for (int i = 0; i < 4; ++i) {  // on to the next edge; registers have no index
      x[i] = x[i + 1];
      y[i] = y[i + 1];
    }
  }
  return close_quotient(min_of(abs_of(sum), side * side / T(2)), side * scale);
}

// Begins with the vertex that is nearest to a point.
template <class T>
TORCHKILN_HD void begin_nearest(Quad<T>& q, T x, T y) {
  int first = 0;
  T least = T(0);
  for (int i = 0; i < 4; ++i) {
    const T dx = q.px[i] - x, dy = q.py[i] - y, squared = dx * dx + dy * dy;
    if (i > 0 && !(squared < least)) continue;
    least = squared;
    first = i;
  }
  for (int by = 1; by <= 2; ++by) {  // registers have no index
    if ((first & by) == 0) continue;
    for (int turn = 0; turn < by; ++turn) {
      const T px = q.px[0], py = q.py[0];
      for (int i = 0; i < 3; ++i) {
        q.px[i] = q.px[i + 1];
        q.py[i] = q.py[i + 1];
      }
      q.px[3] = px;
      q.py[3] = py;
    }
  }
}

// Does a line along a side of `a`, or of `b` which lies (dx, dy) from it, part the two?
template <class T>
TORCHKILN_HD bool parted(Quad<T> a, Quad<T> b, T dx, T dy) {
  TORCHKILN_ROLLED
  for (int side = 0; side < 8; ++side) {
    const T nx = a.py[0] - a.py[1], ny = a.px[1] - a.px[0];  // inwards
    T a_low = T(0), a_high = T(0), b_low = T(0), b_high = T(0);
    for (int i = 0; i < 4; ++i) {
      const T at = nx * (a.px[i] - a.px[0]) + ny * (a.py[i] - a.py[0]);
      const T b_at = nx * (b.px[i] + (dx - a.px[0])) + ny * (b.py[i] + (dy - a.py[0]));
      a_low = min_of(at, a_low);
      a_high = max_of(at, a_high);
      b_low = i == 0 ? b_at : min_of(b_at, b_low);
      b_high = i == 0 ? b_at : max_of(b_at, b_high);
    }
    if (b_high - a_low < kTouching<T> * ((a_high - a_low) + (b_high - b_low))) return true;
    const T x = a.px[0], y = a.py[0];
    for (int i = 0; i < 3; ++i) {  // on to the next side; registers have no index
      a.px[i] = a.px[i + 1];
      a.py[i] = a.py[i + 1];
    }
    a.px[3] = x;
    a.py[3] = y;
    if (side != 3) continue;
    const Quad<T> first = a;
    a = b;
    b = first;
    dx = -dx;
    dy = -dy;
  }
  return false;
}

// The area that two quadrilaterals share: from 0, which it is where a side parts them, to the lesser of their areas, or NaN.
template <class T>
TORCHKILN_HD T shared_area(const Quad<T>& a, const Quad<T>& b) {
  T value;
  if (apart(a, b, value)) return value;
  const bool exchange = a.area < b.area;  // the triangles are the smaller one's
  const Quad<T> large = exchange ? b : a;
  Quad<T> small = exchange ? a : b;
  const T dx = large.x - small.x, dy = large.y - small.y;
  // Both triangles have their origin where the two are likely to touch: no number is larger than it must be.
  begin_nearest(small, dx, dy);
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
  // Rounding leaves this much at the most to shapes that do not meet.
  const T reach = a.radius + b.radius, little = T(16) * kTouching<T> * reach * reach;
  if (sum > T(0) && sum < little && parted(a, b, b.x - a.x, b.y - a.y)) return T(0);
  return clamped(sum, T(0), small.area);
}

}  // namespace torchkiln
