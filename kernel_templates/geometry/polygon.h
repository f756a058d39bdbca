// Convex hulls of a few points, and what they share with quadrilaterals: the area, by integrals along edges as in
// geometry/quad.h, and its derivative.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/quad.h"

namespace torchkiln {

// The corners of the smallest convex polygon around kPoints points: counter-clockwise where y points up, from the
// lowest one on (of those, from the leftmost), none between its neighbours. One point or two are a polygon, too.
template <class T, int kPoints>
struct Hull {
  int count;
  T x[kPoints], y[kPoints];
  int source[kPoints];  // the first point that stands there
  T area;               // NaN where a point is not finite
};

// Twice the area of a triangle: of the ways from a vertex to the others, a and b, and the one from a's end to b's, c.
// Positive where b lies to the left of a. The shorter of a and b and c are what rounding harms least: points that lie
// near each other keep their sense however far away the third one is.
template <class T>
TORCHKILN_HD T turn_of(T ax, T ay, T bx, T by, T cx, T cy) {
  return dot(ax, ay, ax, ay) < dot(bx, by, bx, by) ? cross(ax, ay, cx, cy) : cross(bx, by, cx, cy);
}

// Of the first n points, by gift wrapping (Jarvis 1973): from each corner to the point that has all others on its left.
template <class T, int kPoints>
TORCHKILN_HD_CALLED void find_hull(const T* px, const T* py, int n, Hull<T, kPoints>& hull) {
  T first_x = px[0], first_y = py[0], bad = T(0);
  int at = 0;
  TORCHKILN_ROLLED
  for (int k = 0; k < n; ++k) {
    bad += not_finite(px[k]) + not_finite(py[k]);
    if (py[k] < first_y || (py[k] == first_y && px[k] < first_x)) {
      first_x = px[k];
      first_y = py[k];
      at = k;
    }
  }
  T x = first_x, y = first_y, twice = T(0);
  int count = 0;
  bool is_open = true, is_falling = false;
  while (is_open && count < n) {
    hull.x[count] = x;
    hull.y[count] = y;
    hull.source[count] = at;
    ++count;
    T dx = T(0), dy = T(0), next_x = x, next_y = y;
    TORCHKILN_ROLLED
    for (int k = 0; k < n; ++k) {
      const T ex = px[k] - x, ey = py[k] - y;
      const T turn = turn_of(dx, dy, ex, ey, px[k] - next_x, py[k] - next_y);
      if (turn < T(0) || (turn == T(0) && dot(ex, ey, ex, ey) > dot(dx, dy, dx, dy))) {
        dx = ex;
        dy = ey;
        next_x = px[k];
        next_y = py[k];
        at = k;
      }
    }
    // From the lowest corner the way rises, then falls. It has stepped over that corner, which rounding can make it do
    // among points that lie far nearer to each other than to the others, when it rises again.
    const bool falls = dy < T(0) || (dy == T(0) && dx < T(0));
    if (is_falling && !falls) break;
    is_falling = falls;
    twice += turn_of(x - first_x, y - first_y, next_x - first_x, next_y - first_y, dx, dy);
    x = next_x;
    y = next_y;
    is_open = x != first_x || y != first_y;
  }
  hull.count = count;
  hull.area = abs_of(twice) / T(2) + bad;
}

// A quadrilateral by its vertices, in either sense.
template <class T>
struct Outline {
  T x[4], y[4];
  T twice;  // twice the area, negative where it turns clockwise, NaN where a vertex is not finite
};

template <class T, class Scalar>
TORCHKILN_HD Outline<T> load_outline(const Scalar* at) {
  Outline<T> q;
  T bad = T(0);
  for (int i = 0; i < 4; ++i) {
    q.x[i] = T(load(at[2 * i]));
    q.y[i] = T(load(at[2 * i + 1]));
    bad += not_finite(q.x[i]) + not_finite(q.y[i]);
  }
  q.twice = cross(q.x[2] - q.x[0], q.y[2] - q.y[0], q.x[3] - q.x[1], q.y[3] - q.y[1]) + bad;
  return q;
}

// The triangle of the vertices 0, i and i + 1 of a quadrilateral, and the map that makes it the triangle of (0, 0),
// (1, 0) and (0, 1).
template <class T>
struct Triangle {
  T x, y, ax, ay, bx, by;  // vertex 0, and the ways from there to the others
  T twice, inverse;

  TORCHKILN_HD T u(T px, T py) const { return cross(px - x, py - y, bx, by) * inverse; }
  TORCHKILN_HD T v(T px, T py) const { return cross(ax, ay, px - x, py - y) * inverse; }
  // 1 - u - v, and exactly 0 on the third side.
  TORCHKILN_HD T w(T px, T py) const {
    return cross(bx - ax, by - ay, px - x - ax, py - y - ay) * inverse;
  }
};

template <class T>
TORCHKILN_HD Triangle<T> triangle(const Outline<T>& q, int i) {
  Triangle<T> t;
  t.x = q.x[0];
  t.y = q.y[0];
  t.ax = q.x[i] - t.x;
  t.ay = q.y[i] - t.y;
  t.bx = q.x[i + 1] - t.x;
  t.by = q.y[i + 1] - t.y;
  t.twice = cross(t.ax, t.ay, t.bx, t.by);
  t.inverse = t.twice == T(0) ? T(0) : T(1) / t.twice;
  return t;
}

// The area that a hull and a quadrilateral share: from 0 to that of the hull.
template <class T, int kPoints>
TORCHKILN_HD T shared_area(const Hull<T, kPoints>& hull, const Outline<T>& q) {
  T total = T(0);
  TORCHKILN_ROLLED
  for (int i = 1; i < 3; ++i) {
    const Triangle<T> t = triangle(q, i);
    if (t.twice == T(0)) continue;
    T sum = T(0), u = t.u(hull.x[hull.count - 1], hull.y[hull.count - 1]);
    T v = t.v(hull.x[hull.count - 1], hull.y[hull.count - 1]);
    TORCHKILN_ROLLED
    for (int k = 0; k < hull.count; ++k) {
      const T next_u = t.u(hull.x[k], hull.y[k]), next_v = t.v(hull.x[k], hull.y[k]);
      sum += edge_integral(u, v, next_u, next_v, T(1));
      u = next_u;
      v = next_v;
    }
    total += t.twice * min_of(abs_of(sum), T(0.5));
  }
  return clamped(q.twice < T(0) ? -total : total, T(0), hull.area);
}

// Keeps the part of [begin, end] where a number that goes from `first` to `last` is not negative; the weight of what
// lies on the border all along is halved.
template <class T>
TORCHKILN_HD void clip(T first, T last, T& begin, T& end, T& weight) {
  if (first == T(0) && last == T(0)) weight /= T(2);
  if (first >= T(0) && last >= T(0)) return;
  if (first <= T(0) && last <= T(0)) {
    weight = T(0);
    return;
  }
  const T zero = first / (first - last);
  if (first < T(0)) {
    begin = max_of(zero, begin);
  } else {
    end = min_of(zero, end);
  }
}

// How the shared area grows where the edge from (x0, y0) to (x1, y1) moves outwards: shares of its begin and its end,
// as parts of its length. An edge on the border, which is a kink, counts half.
template <class T>
TORCHKILN_HD void add_edge_shares(const Outline<T>& q, T x0, T y0, T x1, T y1, T& of_begin,
                                  T& of_end) {
  TORCHKILN_ROLLED
  for (int i = 1; i < 3; ++i) {
    const Triangle<T> t = triangle(q, i);
    if (t.twice == T(0)) continue;
    T begin = T(0), end = T(1), weight = (t.twice < T(0)) == (q.twice < T(0)) ? T(1) : T(-1);
    const T first[3] = {t.u(x0, y0), t.v(x0, y0), t.w(x0, y0)};
    const T last[3] = {t.u(x1, y1), t.v(x1, y1), t.w(x1, y1)};
    TORCHKILN_ROLLED
    for (int side = 0; side < 3; ++side) clip(first[side], last[side], begin, end, weight);
    if (!(begin < end)) continue;
    const T up = (end * end - begin * begin) / T(2);
    of_end += weight * up;
    of_begin += weight * (end - begin - up);
  }
}

}  // namespace torchkiln
