// Arguments and element maths of min_area_polygons, shared by CPU and GPU, in float64.
// Source: Freeman and Shapira, "Determining the minimum-area encasing rectangle for an arbitrary closed curve", 1975: one
// of its sides lies on a side of the convex hull.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/polygon.h"

namespace torchkiln::min_area_polygons {

constexpr int kPoints = 9, kRow = 2 * kPoints, kCorners = 8;
// Areas this near to each other are equal: all three sides of an acute triangle give the same one.
constexpr double kTie = 1e-12;

struct Args {
  const void* pointsets;  // (n, 18) x and y of nine points
  void* polygons;         // (n, 8) x and y of four corners
  i64 n;
};

// A rectangle with its first side along (ux, uy), which need not have length 1, by the products of its points with that
// direction and with (-uy, ux).
struct Frame {
  double ux, uy;
  double low, high, bottom, top;
};

// (dx, dy) turned by right angles until it points to the right, and not down.
TORCHKILN_HD void turn_right(double dx, double dy, double& ux, double& uy) {
  const bool is_flat = (dx > 0 && dy >= 0) || (dx < 0 && dy <= 0);
  ux = abs_of(is_flat ? dx : dy);
  uy = abs_of(is_flat ? dy : dx);
}

template <class HullType>
TORCHKILN_HD Frame frame_of(const HullType& hull, double ux, double uy) {
  Frame f = {ux, uy, 0, 0, 0, 0};
  TORCHKILN_ROLLED
  for (int i = 0; i < hull.count; ++i) {
    const double x = hull.x[i] - hull.x[0], y = hull.y[i] - hull.y[0];
    const double along = x * ux + y * uy, across = y * ux - x * uy;
    f.low = min_of(along, f.low);
    f.high = max_of(along, f.high);
    f.bottom = min_of(across, f.bottom);
    f.top = max_of(across, f.top);
  }
  return f;
}

// The corners (high, bottom), (low, bottom), (low, top), (high, top) in the frame. Of equal areas the first one along
// the hull. Points that are not finite give NaN.
template <class Scalar>
TORCHKILN_HD void polygon(const Scalar* row, double* corners) {
  double x[kPoints], y[kPoints];
  for (int k = 0; k < kPoints; ++k) {
    x[k] = double(load(row[2 * k]));
    y[k] = double(load(row[2 * k + 1]));
  }
  Hull<double, kPoints> hull;
  find_hull(x, y, kPoints, hull);
  Frame best = {1, 0, 0, 0, 0, 0};  // of a single point
  double least = -1;
  TORCHKILN_ROLLED
  for (int i = 0; i < hull.count && hull.count > 1; ++i) {
    const int j = i + 1 < hull.count ? i + 1 : 0;
    double ux, uy;
    turn_right(hull.x[j] - hull.x[i], hull.y[j] - hull.y[i], ux, uy);
    const Frame f = frame_of(hull, ux, uy);
    const double area = (f.high - f.low) * (f.top - f.bottom) / (ux * ux + uy * uy);
    if (least < 0 || area < least * (1 - kTie)) {
      least = area;
      best = f;
    }
  }
  const double inverse = 1 / (best.ux * best.ux + best.uy * best.uy);
  const double bad = not_finite(hull.area);
  for (int i = 0; i < 4; ++i) {
    const double along = (i == 0 || i == 3 ? best.high : best.low) * inverse;
    const double across = (i < 2 ? best.bottom : best.top) * inverse;
    corners[2 * i] = hull.x[0] + (along * best.ux - across * best.uy) + bad;
    corners[2 * i + 1] = hull.y[0] + (along * best.uy + across * best.ux) + bad;
  }
}

}  // namespace torchkiln::min_area_polygons
