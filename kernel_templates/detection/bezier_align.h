// Samples of regions between two cubic Bezier curves: rows (image, 4 points of the upper curve from the left, 4 of the
// lower one from the right), x before y. A bin is a box of the region's size over the number of bins, around its place
// between the curves. Source: Liu et al., ABCNet: Real-time Scene Text Spotting with Adaptive Bezier-Curve Network,
// 2020, section 2.2.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/sampled_roi.h"

namespace torchkiln::bezier_align {

using sampled_roi::Args;

// One coordinate of a curve at u.
template <class T>
TORCHKILN_HD T curve(T p0, T p1, T p2, T p3, T u) {
  const T v = T(1) - u;
  return rounded_product(v * v * v, p0) + rounded_product(T(3) * u * v * v, p1) +
         rounded_product(T(3) * u * u * v, p2) + rounded_product(u * u * u, p3);
}

// The centre is counted from the pixel `origin`.
template <class T>
struct Axis {
  i32 origin;
  T center, bin;
};

// at: the first point's coordinate; the other coordinates lie between. By value, as load_as_called(). The curves are
// counted from the first point's pixel.
template <class T>
TORCHKILN_HD_CALLED Axis<T> axis_of(const void* boxes, i64 type, i64 at, T scale, bool aligned, T u,
                                    T v, T pooled) {
  const auto points = sampled_roi::numbers<T, 8>(boxes, type, at, 2);
  const i32 origin = origin_of(rounded_product(points.at[0], scale));
  T p[8];
  for (int i = 0; i < 8; ++i) p[i] = fused(points.at[i], scale, T(-origin));
  const T upper = curve(p[0], p[1], p[2], p[3], u);
  const T lower = curve(p[7], p[6], p[5], p[4], u);
  T size = max_of(abs_of(p[0] - p[3]), abs_of(p[7] - p[4]));
  if (!aligned) size = size < T(1) ? T(1) : size;
  const T center = rounded_product(lower, v) + rounded_product(upper, T(1) - v);
  return {origin, center - (aligned ? T(0.5) : T(0)), count_quotient(size, pooled)};
}

struct Pooled : sampled_roi::Operator {
  template <class T>
  TORCHKILN_HD static sampled_roi::Patch<T> patch(const Args& args, i64 group, i64 bin) {
    const i64 row = group * 17, row_bin = u32(bin) / u32(args.pooled_w);
    const T u = count_quotient(T(bin - row_bin * args.pooled_w), T(args.pooled_w));
    const T v = count_quotient(T(row_bin), T(args.pooled_h));
    const auto axis = [&](i64 at, i64 pooled) {
      return axis_of(args.boxes, args.box_type, at, T(args.spatial_scale), args.aligned != 0, u, v,
                     T(pooled));
    };
    const Axis<T> x = axis(row + 1, args.pooled_w), y = axis(row + 2, args.pooled_h);
    sampled_roi::Patch<T> p = {};
    p.image = sampled_roi::image_of<T>(args, row);
    p.rows = sampled_roi::sample_count(args, y.bin);
    p.columns = sampled_roi::sample_count(args, x.bin);
    p.row_y = count_quotient(y.bin, T(max_of(p.rows, 1)));
    p.column_x = count_quotient(x.bin, T(max_of(p.columns, 1)));
    p.origin_y = y.origin;
    p.origin_x = x.origin;
    p.y = y.center - (y.bin - p.row_y) / T(2);
    p.x = x.center - (x.bin - p.column_x) / T(2);
    return sampled_roi::average(p, sampled_roi::is_finite(p.y + p.x + y.bin + x.bin));
  }
};

}  // namespace torchkiln::bezier_align
