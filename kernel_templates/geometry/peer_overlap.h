// Overlaps as mmcv has them where it differs, for its drop-in only: general quadrilaterals whose corners are looked for
// as if the other one were a rectangle, and upright boxes that reach a centimetre further than they should. Both collect
// the places where sides cross and the corners that seem to lie inside, and take the area around them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/prism.h"
#include "geometry/quad.h"
#include "geometry/rotated.h"

namespace torchkiln {

// Sixteen crossings and eight corners, sorted by a key.
template <class T>
struct Candidates {
  T x[24], y[24];
  int count;
};

template <class T>
TORCHKILN_HD void add_candidate(Candidates<T>& to, T x, T y) {
  to.x[to.count] = x;
  to.y[to.count] = y;
  ++to.count;
}

template <class T, class KeyOf>
TORCHKILN_HD void sort_by(Candidates<T>& points, const KeyOf& key_of) {
  T key[24];
  TORCHKILN_ROLLED
  for (int i = 0; i < points.count; ++i) {
    const T x = points.x[i], y = points.y[i], k = key_of(x, y);
    int j = i;
    TORCHKILN_ROLLED
    for (; j > 0 && key[j - 1] > k; --j) {
      key[j] = key[j - 1];
      points.x[j] = points.x[j - 1];
      points.y[j] = points.y[j - 1];
    }
    key[j] = k;
    points.x[j] = x;
    points.y[j] = y;
  }
}

// Twice the area between the x axis and the lower (sense 1) or upper (sense -1) chain of points sorted by x.
template <class T>
TORCHKILN_HD T under_chain(const Candidates<T>& p, T sense) {
  int chain[24], size = 0;
  TORCHKILN_ROLLED
  for (int i = 0; i < p.count; ++i) {
    TORCHKILN_ROLLED
    while (size > 1) {
      const int a = chain[size - 2], b = chain[size - 1];
      if (sense * cross(p.x[b] - p.x[a], p.y[b] - p.y[a], p.x[i] - p.x[a], p.y[i] - p.y[a]) > T(0))
        break;
      --size;
    }
    chain[size++] = i;
  }
  T sum = T(0);
  TORCHKILN_ROLLED
  for (int i = 1; i < size; ++i) {
    const int a = chain[i - 1], b = chain[i];
    sum += (p.x[b] - p.x[a]) * (p.y[a] + p.y[b]);
  }
  return sum;
}

template <class T>
TORCHKILN_HD T hull_area(Candidates<T>& points) {
  sort_by(points, [](T x, T) { return x; });
  T twice = T(0);
  TORCHKILN_ROLLED
  for (int side = 0; side < 2; ++side) twice = under_chain(points, T(2 * side - 1)) - twice;
  return abs_of(twice) / T(2);
}

// --- quadrilaterals -------------------------------------------------------------------------------------------------

template <class T>
struct PeerQuad : Quad<T> {};

// What is misplaced may be far outside, so only NaN is told apart.
template <class T>
TORCHKILN_HD bool apart(const PeerQuad<T>& a, const PeerQuad<T>& b, T& value) {
  value = a.x + b.x + a.y + b.y;
  return is_nan(value);
}

// Corners of `a`, moved by (dx, dy), whose projections on two sides of `b` lie in those sides.
template <class T>
TORCHKILN_HD void add_corners(Candidates<T>& to, const Quad<T>& a, T dx, T dy, const Quad<T>& b,
                              T back_x, T back_y) {
  const T ux = b.px[1] - b.px[0], uy = b.py[1] - b.py[0];
  const T vx = b.px[3] - b.px[0], vy = b.py[3] - b.py[0];
  TORCHKILN_ROLLED
  for (int i = 0; i < 4; ++i) {
    const T x = a.px[i] + dx, y = a.py[i] + dy;
    const T u = dot(x - b.px[0], y - b.py[0], ux, uy), v = dot(x - b.px[0], y - b.py[0], vx, vy);
    if (u >= T(0) && v >= T(0) && u <= dot(ux, uy, ux, uy) && v <= dot(vx, vy, vx, vy))
      add_candidate(to, x + back_x, y + back_y);
  }
}

template <class T>
TORCHKILN_HD_CALLED T shared_area(const PeerQuad<T>& a, const PeerQuad<T>& b) {
  T value;
  if (apart(a, b, value)) return value;
  if (a.area < T(1e-14) || b.area < T(1e-14)) return T(0);
  const T dx = a.x - b.x, dy = a.y - b.y;
  Candidates<T> points;
  points.count = 0;
  TORCHKILN_ROLLED
  for (int i = 0; i < 4; ++i) {
    const T px = a.px[i] + dx, py = a.py[i] + dy;
    const T ux = a.px[(i + 1) % 4] - a.px[i], uy = a.py[(i + 1) % 4] - a.py[i];
    TORCHKILN_ROLLED
    for (int j = 0; j < 4; ++j) {
      const T vx = b.px[(j + 1) % 4] - b.px[j], vy = b.py[(j + 1) % 4] - b.py[j];
      const T determinant = cross(vx, vy, ux, uy);
      if (abs_of(determinant) <= T(1e-14)) continue;
      const T qx = b.px[j] - px, qy = b.py[j] - py;
      const T t = cross(vx, vy, qx, qy) / determinant, s = cross(ux, uy, qx, qy) / determinant;
      if (t >= T(0) && t <= T(1) && s >= T(0) && s <= T(1))
        add_candidate(points, px + t * ux, py + t * uy);
    }
  }
  TORCHKILN_ROLLED
  for (int pass = 0; pass < 2; ++pass) {
    const bool own = pass == 0;
    add_corners<T>(points, own ? a : b, own ? dx : -dx, own ? dy : -dy, own ? b : a,
                   own ? T(0) : dx, own ? T(0) : dy);
  }
  return points.count > 2 ? hull_area(points) : T(0);
}

// --- boxes seen from above ------------------------------------------------------------------------------------------

constexpr double kPeerMargin = 0.01;

// `radius` holds the margin, too.
template <class T>
struct PeerRotated : Rotated<T> {};

template <class T>
TORCHKILN_HD PeerRotated<T> peer_rotated(const Rotated<T>& box) {
  PeerRotated<T> wider{box};
  wider.radius += T(kPeerMargin);
  return wider;
}

template <class T>
TORCHKILN_HD bool in_margin(T x, T y, const Rotated<T>& box) {
  const T dx = x - box.x, dy = y - box.y;
  return abs_of(dot(dx, dy, box.cos, box.sin)) < box.half_w + T(kPeerMargin) &&
         abs_of(cross(box.cos, box.sin, dx, dy)) < box.half_h + T(kPeerMargin);
}

// Where p0 p1 and q0 q1 cross, if they do so inside both.
template <class T>
TORCHKILN_HD void add_crossing(Candidates<T>& to, const T* p0, const T* p1, const T* q0,
                               const T* q1) {
  const T ux = p1[0] - p0[0], uy = p1[1] - p0[1];
  const T first = cross(q0[0] - p0[0], q0[1] - p0[1], ux, uy);
  const T last = cross(q1[0] - p0[0], q1[1] - p0[1], ux, uy);
  const T vx = q1[0] - q0[0], vy = q1[1] - q0[1];
  const T begin = cross(p0[0] - q0[0], p0[1] - q0[1], vx, vy);
  const T end = cross(p1[0] - q0[0], p1[1] - q0[1], vx, vy);
  if (!(first * -last > T(0) && begin * -end > T(0))) return;
  const T t = last / (last - first);
  add_candidate(to, t * q0[0] + (T(1) - t) * q1[0], t * q0[1] + (T(1) - t) * q1[1]);
}

// The area of the polygon of all points in the order of their angles around the mean.
template <class T>
TORCHKILN_HD T star_area(Candidates<T>& p) {
  if (p.count < 3) return T(0);
  T x = T(0), y = T(0), twice = T(0);
  TORCHKILN_ROLLED
  for (int i = 0; i < p.count; ++i) {
    x += p.x[i];
    y += p.y[i];
  }
  x /= T(p.count);
  y /= T(p.count);
  sort_by(p, [x, y](T of_x, T of_y) { return atan2_of(of_y - y, of_x - x); });
  TORCHKILN_ROLLED
  for (int i = 1; i + 1 < p.count; ++i) {
    twice += cross(p.x[i] - p.x[0], p.y[i] - p.y[0], p.x[i + 1] - p.x[0], p.y[i + 1] - p.y[0]);
  }
  return abs_of(twice) / T(2);
}

template <class T>
TORCHKILN_HD_CALLED T shared_area(const PeerRotated<T>& first, const PeerRotated<T>& second) {
  T value;
  if (apart<Rotated<T>>(first, second, value)) return value;
  Rotated<T> box[2] = {first, second};
  box[0].x -= box[1].x;
  box[0].y -= box[1].y;
  box[1].x = T(0);
  box[1].y = T(0);
  T at[2][5][2];
  TORCHKILN_ROLLED
  for (int i = 0; i < 10; ++i)
    corner(box[i / 5], i % 5 % 4, at[i / 5][i % 5][0], at[i / 5][i % 5][1]);
  Candidates<T> points;
  points.count = 0;
  TORCHKILN_ROLLED
  for (int i = 0; i < 4; ++i) {
    TORCHKILN_ROLLED
    for (int j = 0; j < 4; ++j)
      add_crossing(points, at[0][i], at[0][i + 1], at[1][j], at[1][j + 1]);
  }
  TORCHKILN_ROLLED
  for (int i = 0; i < 8; ++i) {  // a corner of the second, then one of the first
    const T* own = at[1 - i % 2][i / 2];
    if (in_margin(own[0], own[1], box[i % 2])) add_candidate(points, own[0], own[1]);
  }
  return star_area(points);
}

template <class T>
struct PeerPrism : Prism<T> {};

template <class T>
TORCHKILN_HD T size_of(const PeerPrism<T>& box) {
  return size_of<T>(static_cast<const Prism<T>&>(box));
}

template <class T>
TORCHKILN_HD bool apart(const PeerPrism<T>& a, const PeerPrism<T>& b, T& value) {
  return apart<T>(static_cast<const Prism<T>&>(a), static_cast<const Prism<T>&>(b), value);
}

// `base.radius` holds the margin, as that of peer_rotated.
template <class T>
TORCHKILN_HD T shared_area(const PeerPrism<T>& a, const PeerPrism<T>& b) {
  return shared_area(PeerRotated<T>{a.base}, PeerRotated<T>{b.base}) * shared_height<T>(a, b);
}

}  // namespace torchkiln
