// Arguments and element maths of points_in_polygons, shared by CPU and GPU: crossings of a ray towards greater x.
// Source: Shimrat, "Algorithm 112: Position of point relative to polygon", 1962.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/rotated.h"

namespace torchkiln::points_in_polygons {

constexpr int kCorners = 4;

struct Args {
  const void* points;    // (n, 2) x, y
  const void* polygons;  // (m, 8)
  void* out;             // (n, m): bool, or float with mmcv's rule
  i64 n, m;
};

template <class T>
struct Polygon {
  T x[kCorners], y[kCorners];
};

template <class T>
struct Point {
  T x, y;
};

// What is not finite is NaN in y, and is then neither above nor below anything.
template <class Scalar>
TORCHKILN_HD Point<Acc<Scalar>> load_point(const Scalar* points, i64 row) {
  const Acc<Scalar> x = load(points[2 * row]), y = load(points[2 * row + 1]);
  return {x, y + not_finite(x)};
}
template <class Scalar>
TORCHKILN_HD Polygon<Acc<Scalar>> load_polygon(const Scalar* polygons, i64 row) {
  Polygon<Acc<Scalar>> polygon;
  Acc<Scalar> bad = 0;
  for (int i = 0; i < kCorners; ++i) {
    polygon.x[i] = load(polygons[2 * kCorners * row + 2 * i]);
    polygon.y[i] = load(polygons[2 * kCorners * row + 2 * i + 1]);
    bad += not_finite(polygon.x[i]) + not_finite(polygon.y[i]);
  }
  for (int i = 0; i < kCorners; ++i) polygon.y[i] += bad;
  return polygon;
}

// Does the ray cross the side from a to b, which are seen from its start? A side ends below the corner that is its upper
// one, and both polygons of a side compute the same two products.
template <class T>
TORCHKILN_HD bool crosses(T ax, T ay, T bx, T by) {
  const T one = ax * by, other = ay * bx;
  return (ay >= T(0)) != (by >= T(0)) && (ay >= T(0) ? one > other : one < other);
}

template <class T>
TORCHKILN_HD bool contains(const Polygon<T>& polygon, const Point<T>& point) {
  bool inside = false;
  T ax = point.x - polygon.x[kCorners - 1], ay = point.y - polygon.y[kCorners - 1];
  for (int i = 0; i < kCorners; ++i) {
    const T bx = point.x - polygon.x[i], by = point.y - polygon.y[i];
    inside ^= crosses(ax, ay, bx, by);
    ax = bx;
    ay = by;
  }
  return inside;
}

// mmcv's rule: a point on the outline is where the sides before that one put it.
template <class T>
TORCHKILN_HD bool contains_as_mmcv(const Polygon<T>& polygon, const Point<T>& point) {
  bool inside = false, decided = false;
  T tx = polygon.x[kCorners - 1], ty = polygon.y[kCorners - 1];
  for (int i = 0; i < kCorners; ++i) {
    const T sx = polygon.x[i], sy = polygon.y[i];
    const bool beside = point.y < min_of(sy, ty) || point.y > max_of(sy, ty);
    const bool corner = (sx == point.x && sy == point.y) || (tx == point.x && ty == point.y);
    decided = decided || (!beside && corner);
    if (!decided && !beside && (sy < point.y) != (ty < point.y)) {
      const T x = sx + (point.y - sy) * (tx - sx) / (ty - sy);
      decided = x == point.x;
      inside ^= x > point.x;
    }
    tx = sx;
    ty = sy;
  }
  return inside;
}

}  // namespace torchkiln::points_in_polygons
