// Overlaps of rotated rectangles and quadrilaterals against clipping in float64: another algorithm, another precision.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <utility>
#include <vector>

#include "geometry/quad.h"
#include "geometry/rotated.h"

namespace torchkiln {
namespace {

struct Point {
  double x, y;
};
using Polygon = std::vector<Point>;
using Row = std::array<float, 5>;       // x, y, w, h, angle
using Vertices = std::array<float, 8>;  // x1, y1, ..., x4, y4

double turn(Point a, Point b, Point c) {
  return (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x);
}

double signed_area(const Polygon& p) {
  double twice = 0;
  for (std::size_t i = 2; i < p.size(); ++i) twice += turn(p[0], p[i - 1], p[i]);
  return twice / 2;
}

Polygon counter_clockwise(Polygon p) {
  if (signed_area(p) < 0) std::ranges::reverse(p);
  return p;
}

// What is left of the line through a and b, by Sutherland and Hodgman.
Polygon left_of(const Polygon& p, Point a, Point b) {
  Polygon kept;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const Point from = p[i], to = p[(i + 1) % p.size()];
    const double first = turn(a, b, from), last = turn(a, b, to);
    if (first >= 0) kept.push_back(from);
    if ((first >= 0) == (last >= 0)) continue;
    const double t = first / (first - last);
    kept.push_back({from.x + t * (to.x - from.x), from.y + t * (to.y - from.y)});
  }
  return kept;
}

double clipped_area(const Polygon& a, const Polygon& b) {
  Polygon common = counter_clockwise(a);
  const Polygon window = counter_clockwise(b);
  for (std::size_t i = 0; i < window.size(); ++i)
    common = left_of(common, window[i], window[(i + 1) % window.size()]);
  return signed_area(common);
}

Polygon polygon(const Row& r) {
  const double c = std::cos(double{r[4]}), s = std::sin(double{r[4]});
  const double w = double{r[2]} / 2, h = double{r[3]} / 2;
  Polygon p;
  for (const auto [u, v] : {Point{w, h}, Point{-w, h}, Point{-w, -h}, Point{w, -h}})
    p.push_back({r[0] + u * c - v * s, r[1] + u * s + v * c});
  return p;
}

Polygon polygon(const Vertices& v) {
  return {{v[0], v[1]}, {v[2], v[3]}, {v[4], v[5]}, {v[6], v[7]}};
}

Rotated<float> shape(const Row& r) { return rotated(r[0], r[1], r[2], r[3], r[4]); }
Quad<float> shape(const Vertices& v) { return quad(v.data()); }

// The error of the intersection over union, and that of the intersection over the smaller area.
struct Errors {
  double iou = 0, share = 0;
};

template <class Rows>
void add(Errors& worst, const Rows& a, const Rows& b) {
  const Polygon p = polygon(a), q = polygon(b);
  const double exact = clipped_area(p, q);
  const double area_p = std::abs(signed_area(p)), area_q = std::abs(signed_area(q));
  const double error = std::abs(double{shared_area(shape(a), shape(b))} - exact);
  worst.iou = std::max(worst.iou, error / (area_p + area_q - exact));
  worst.share = std::max(worst.share, error / std::min(area_p, area_q));
}

// The greatest distance between two convex shapes across a line along a side; negative where they meet.
double gap(const Polygon& a, const Polygon& b) {
  double widest = -std::numeric_limits<double>::infinity();
  for (const auto& [of, other] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
    for (std::size_t i = 0; i < of->size(); ++i) {
      const Point from = (*of)[i], to = (*of)[(i + 1) % of->size()];
      double nearest = std::numeric_limits<double>::infinity();
      for (const Point& point : *other) nearest = std::min(nearest, -turn(from, to, point));
      widest = std::max(widest, nearest / std::hypot(to.x - from.x, to.y - from.y));
    }
  }
  return widest;
}

// How many of the pairs that are at least 1e-5 apart share anything.
template <class Rows>
int sharing(const std::vector<std::pair<Rows, Rows>>& pairs, int& apart) {
  int wrong = 0;
  for (const auto& [a, b] : pairs) {
    if (gap(counter_clockwise(polygon(a)), counter_clockwise(polygon(b))) < 1e-5) continue;
    ++apart;
    wrong += shared_area(shape(a), shape(b)) != 0 || shared_area(shape(b), shape(a)) != 0 ? 1 : 0;
  }
  return wrong;
}

class SharedAreaTest : public testing::Test {
 protected:
  float uniform(double low, double high) {
    return static_cast<float>(std::uniform_real_distribution<double>(low, high)(random_));
  }
  // As many small sides as large ones, octave by octave.
  float side(double low, double high) { return std::exp(uniform(std::log(low), std::log(high))); }
  Row box(double low, double high) {
    return {uniform(0, 10), uniform(0, 10), side(low, high), side(low, high), uniform(-9, 9)};
  }
  // Convex: on an ellipse of axes 1 and `flat`.
  Vertices quadrilateral(double flat) {
    std::array<float, 4> at{};
    for (std::size_t i = 0; i < 4; ++i)
      at[i] = (static_cast<float>(i) + uniform(0.05, 0.95)) * 1.57f;
    const float x = uniform(0, 6), y = uniform(0, 6), size = uniform(1, 5), angle = uniform(0, 3);
    Vertices v{};
    for (std::size_t i = 0; i < 4; ++i) {
      const float u = size * std::cos(at[i]);
      const float w = size * static_cast<float>(flat) * std::sin(at[i]);
      v[2 * i] = x + u * std::cos(angle) - w * std::sin(angle);
      v[2 * i + 1] = y + u * std::sin(angle) + w * std::cos(angle);
    }
    return v;
  }

  static constexpr int kPairs = 20000;
  std::mt19937 random_{7};
};

TEST_F(SharedAreaTest, RectanglesOfEveryShape) {
  Errors usual, extreme;
  for (int i = 0; i < kPairs; ++i) {
    add(usual, box(1, 8), box(1, 8));
    add(extreme, box(1e-3, 1e3), box(1e-3, 1e3));
  }
  EXPECT_LT(usual.iou, 1e-6);
  EXPECT_LT(usual.share, 2e-6);
  EXPECT_LT(extreme.iou, 4e-6);
}

TEST_F(SharedAreaTest, RectanglesFarFromTheOrigin) {
  Errors worst;
  for (int i = 0; i < kPairs; ++i) {
    Row a = box(1, 8), b = box(1, 8);
    for (Row* row : {&a, &b}) {
      (*row)[0] += 1e5f;
      (*row)[1] -= 5e4f;
    }
    add(worst, a, b);
  }
  EXPECT_LT(worst.share, 2e-6);
}

TEST_F(SharedAreaTest, EqualAndNearlyEqualRectangles) {
  Errors equal, turned, near;
  for (int i = 0; i < kPairs; ++i) {
    const Row a = box(0.1, 100);
    add(equal, a, a);
    const auto quarter = static_cast<float>(i % 8 * std::numbers::pi / 2);
    const bool upright = i % 2 == 0;
    add(turned, a, {a[0], a[1], a[upright ? 2 : 3], a[upright ? 3 : 2], a[4] + quarter});
    Row b = a;
    for (float& number : b) number *= 1 + uniform(-1e-6, 1e-6);
    add(near, a, b);
  }
  EXPECT_LT(equal.iou, 1e-6);
  EXPECT_LT(turned.iou, 2e-5);  // angles of up to 20 have a step of 2e-6
  EXPECT_LT(near.iou, 2e-5);
}

TEST_F(SharedAreaTest, RectanglesOnAGridTouchAndCoincide) {
  Errors worst;
  for (int i = 0; i < kPairs; ++i) {
    const auto on_grid = [&] {
      const auto whole = [&](double low, double high) { return std::round(uniform(low, high)); };
      return Row{whole(0, 6), whole(0, 6), 2 * whole(1, 3), 2 * whole(1, 3), 0};
    };
    add(worst, on_grid(), on_grid());
  }
  EXPECT_EQ(worst.iou, 0);
}

TEST_F(SharedAreaTest, ContainedRectanglesShareAllTheyHave) {
  const auto large = rotated(3.f, 4.f, 5e4f, 3e4f, 0.3f);
  float worst = 0;
  for (int i = 0; i < kPairs; ++i) {
    const auto small = shape(box(0.01, 8));
    worst = std::max(worst, 1 - shared_area(large, small) / small.area);
    worst = std::max(worst, 1 - shared_area(small, large) / small.area);
  }
  EXPECT_LT(worst, 4e-5);  // of sides 800 : 1
}

TEST_F(SharedAreaTest, ShapesThatDoNotMeetShareNothing) {
  std::vector<std::pair<Row, Row>> rectangles;
  std::vector<std::pair<Vertices, Vertices>> quadrilaterals;
  for (int i = 0; i < 10 * kPairs; ++i) {
    rectangles.emplace_back(box(1, 8), box(1, 8));
    quadrilaterals.emplace_back(quadrilateral(0.3), quadrilateral(0.3));
  }
  int apart = 0;
  EXPECT_EQ(sharing(rectangles, apart), 0);
  EXPECT_EQ(sharing(quadrilaterals, apart), 0);
  EXPECT_GT(apart, 10 * kPairs);
}

TEST_F(SharedAreaTest, RectanglesSideBySideShareNothing) {
  for (int i = 0; i < kPairs; ++i) {
    const Row a = box(1, 8);
    const double c = std::cos(double{a[4]}), s = std::sin(double{a[4]});
    const bool along = i % 2 == 0;  // the side w, or the side h
    const double step = a[along ? 2 : 3];
    const Row b = {static_cast<float>(a[0] + step * (along ? c : -s)),
                   static_cast<float>(a[1] + step * (along ? s : c)), a[2], a[3], a[4]};
    EXPECT_EQ(shared_area(shape(a), shape(b)), 0);
  }
}

TEST_F(SharedAreaTest, EmptyRectanglesShareNothing) {
  for (int i = 0; i < 100; ++i) {
    const auto solid = shape(box(1, 8));
    for (const float side : {0.f, -0.f, -3.f}) {
      EXPECT_EQ(shared_area(rotated(solid.x, solid.y, side, 2.f, 1.f), solid), 0);
      EXPECT_EQ(shared_area(solid, rotated(solid.x, solid.y, 2.f, side, 1.f)), 0);
    }
  }
}

TEST_F(SharedAreaTest, WhatIsNotFiniteGivesNan) {
  const Row good = {1, 2, 3, 4, 0.5f};
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (std::size_t i = 0; i < 5; ++i) {
      Row row = good;
      row[i] = bad;
      EXPECT_TRUE(is_nan(shared_area(shape(row), shape(good)))) << i;
      EXPECT_TRUE(is_nan(shared_area(shape(good), shape(row)))) << i;
    }
    for (std::size_t i = 0; i < 8; ++i) {
      const Vertices square = {0, 0, 1, 0, 1, 1, 0, 1};
      Vertices row = square;
      row[i] = bad;
      EXPECT_TRUE(is_nan(shared_area(shape(row), shape(square)))) << i;
      EXPECT_TRUE(is_nan(shared_area(shape(square), shape(row)))) << i;
    }
  }
}

TEST_F(SharedAreaTest, Quadrilaterals) {
  Errors usual, flat, equal;
  for (int i = 0; i < kPairs; ++i) {
    const Vertices a = quadrilateral(1), b = quadrilateral(1);
    add(usual, a, b);
    add(flat, quadrilateral(0.03), quadrilateral(0.03));
    add(equal, a, a);
  }
  EXPECT_LT(usual.iou, 4e-6);
  EXPECT_LT(flat.iou, 4e-5);
  EXPECT_LT(equal.iou, 4e-6);
}

TEST_F(SharedAreaTest, QuadrilateralsInEitherSenseFromAnyVertex) {
  for (int i = 0; i < 1000; ++i) {
    const Vertices a = quadrilateral(1), b = quadrilateral(1);
    const float expected = shared_area(shape(a), shape(b));
    const Vertices other = {a[4], a[5], a[2], a[3], a[0], a[1], a[6], a[7]};
    EXPECT_NEAR(shared_area(shape(other), shape(b)), expected, 1e-4f);
    EXPECT_NEAR(shared_area(shape(b), shape(other)), expected, 1e-4f);
  }
}

TEST_F(SharedAreaTest, RectanglesAreQuadrilaterals) {
  for (int i = 0; i < 1000; ++i) {
    Vertices corners[2];
    Rotated<float> boxes[2];
    for (int side = 0; side < 2; ++side) {
      boxes[side] = shape(box(1, 8));
      for (int k = 0; k < 4; ++k)
        corner(boxes[side], k, corners[side][2 * k], corners[side][2 * k + 1]);
    }
    EXPECT_NEAR(shared_area(shape(corners[0]), shape(corners[1])), shared_area(boxes[0], boxes[1]),
                1e-4f);
  }
}

TEST_F(SharedAreaTest, AConcaveQuadrilateral) {
  const Vertices dart = {0, 0, 4, 0, 1, 1, 0, 4};  // concave at (1, 1), of area 4
  const Vertices square = {1, 1, 3, 1, 3, 3, 1, 3}, all = {-1, -1, 9, -1, 9, 9, -1, 9};
  EXPECT_FLOAT_EQ(shape(dart).area, 4);
  EXPECT_NEAR(shared_area(shape(dart), shape(square)), 0, 1e-6);
  EXPECT_NEAR(shared_area(shape(square), shape(dart)), 0, 1e-6);
  EXPECT_NEAR(shared_area(shape(dart), shape(all)), 4, 1e-5);
  EXPECT_NEAR(shared_area(shape(all), shape(dart)), 4, 1e-5);
  const Vertices unit = {0, 0, 1, 0, 1, 1, 0, 1};
  EXPECT_NEAR(shared_area(shape(dart), shape(unit)), 1, 1e-6);
}

}  // namespace
}  // namespace torchkiln
