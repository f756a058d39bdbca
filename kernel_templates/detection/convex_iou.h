// Arguments and element maths of convex_iou and convex_giou, shared by CPU and GPU. Everything is computed in float64:
// the areas of thin hulls are small differences of large numbers.
// Source: Rezatofighi et al., "Generalized Intersection over Union", 2019, for polygons instead of boxes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/polygon.h"

namespace torchkiln::convex_iou {

constexpr int kPoints = 9, kRow = 2 * kPoints, kCorners = 8;

struct Args {
  const void* pointsets;  // (n, 18) x and y of nine points
  const void* polygons;   // (m, 8) x and y of four vertices
  void* out;              // (n, m)
  i64 n, m;
};

struct GiouArgs {
  const void* pointsets;  // (n, 18)
  const void* polygons;   // (n, 8)
  void* giou;             // (n,)
  void* gradient;         // (n, 18) of each giou with respect to its points
  i64 n;
};

using PointHull = Hull<double, kPoints>;

template <class Scalar>
TORCHKILN_HD void load_points(const Scalar* row, double* x, double* y) {
  for (int k = 0; k < kPoints; ++k) {
    x[k] = double(load(row[2 * k]));
    y[k] = double(load(row[2 * k + 1]));
  }
}

template <class Scalar>
TORCHKILN_HD void hull_of(const Scalar* row, PointHull& hull) {
  double x[kPoints], y[kPoints];
  load_points(row, x, y);
  find_hull(x, y, kPoints, hull);
}

// 0 where the denominator is 0.
TORCHKILN_HD_CALLED double ratio(double numerator, double denominator) {
  return denominator == 0 ? 0 : numerator / denominator;
}

// Bounds of a polygon. One whose area is not finite is apart from nothing: its overlaps are computed, and become NaN.
struct Bounds {
  double x1, y1, x2, y2;
};
template <class Shape>
TORCHKILN_HD Bounds bounds_of(const Shape& shape, int count, double area) {
  Bounds b = {shape.x[0], shape.y[0], shape.x[0], shape.y[0]};
  TORCHKILN_ROLLED
  for (int i = 1; i < count; ++i) {
    b.x1 = min_of(shape.x[i], b.x1);
    b.y1 = min_of(shape.y[i], b.y1);
    b.x2 = max_of(shape.x[i], b.x2);
    b.y2 = max_of(shape.y[i], b.y2);
  }
  const double bad = not_finite(area);
  return {b.x1 + bad, b.y1 + bad, b.x2 + bad, b.y2 + bad};
}
TORCHKILN_HD bool apart(const Bounds& a, const Bounds& b) {
  return a.x2 < b.x1 || b.x2 < a.x1 || a.y2 < b.y1 || b.y2 < a.y1;
}

TORCHKILN_HD double iou(const PointHull& hull, const Outline<double>& polygon) {
  const double inter = shared_area(hull, polygon);
  return ratio(inter, hull.area + abs_of(polygon.twice) / 2 - inter);
}

// The value of one row; `gradient` becomes that of its 18 coordinates.
template <class Scalar>
TORCHKILN_HD double giou(const Scalar* pointset, const Scalar* polygon, double* gradient) {
  constexpr int kAll = kPoints + 4;
  double x[kAll], y[kAll];
  load_points(pointset, x, y);
  Hull<double, kAll> hull, around;
  find_hull(x, y, kPoints, hull);
  const Outline<double> q = load_outline<double>(polygon);
  for (int i = 0; i < 4; ++i) {
    x[kPoints + i] = q.x[i];
    y[kPoints + i] = q.y[i];
  }
  find_hull(x, y, kAll, around);

  const double inter = shared_area(hull, q);
  const double united = hull.area + abs_of(q.twice) / 2 - inter, enclosing = around.area;
  // The derivatives with respect to the shared area, to that of the hull, and to that around both.
  const double of_area = ratio(1, enclosing) - ratio(inter, united * united);
  const double of_inter = ratio(1, united) - of_area;
  const double of_enclosing = -ratio(united, enclosing * enclosing);
  for (int i = 0; i < kRow; ++i) gradient[i] = 0;
  const auto add = [&](int source, double nx, double ny, double factor) {
    if (source >= kPoints) return;  // a vertex of the polygon, which gets none
    gradient[2 * source] += factor * nx;
    gradient[2 * source + 1] += factor * ny;
  };
  // An edge that moves outwards sweeps its length; (dy, -dx) is its normal and as long as it.
  TORCHKILN_ROLLED
  for (int i = 0; i < hull.count; ++i) {
    const int j = i + 1 < hull.count ? i + 1 : 0;
    const double nx = hull.y[j] - hull.y[i], ny = hull.x[i] - hull.x[j];
    double of_begin = 0, of_end = 0;
    add_edge_shares(q, hull.x[i], hull.y[i], hull.x[j], hull.y[j], of_begin, of_end);
    add(hull.source[i], nx, ny, of_area / 2 + of_inter * of_begin);
    add(hull.source[j], nx, ny, of_area / 2 + of_inter * of_end);
  }
  TORCHKILN_ROLLED
  for (int i = 0; i < around.count; ++i) {
    const int j = i + 1 < around.count ? i + 1 : 0;
    const double nx = around.y[j] - around.y[i], ny = around.x[i] - around.x[j];
    add(around.source[i], nx, ny, of_enclosing / 2);
    add(around.source[j], nx, ny, of_enclosing / 2);
  }
  return ratio(inter, united) - ratio(enclosing - united, enclosing);
}

}  // namespace torchkiln::convex_iou
