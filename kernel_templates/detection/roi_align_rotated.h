// Samples of rotated regions: rows (image, centre x, centre y, width, height, angle), counter-clockwise in radians.
// Source: Ma et al., Arbitrary-Oriented Scene Text Detection via Rotation Proposals, 2018, section III-D.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/sampled_roi.h"

namespace torchkiln::roi_align_rotated {

using sampled_roi::Args;

struct Pooled : sampled_roi::Operator {
  template <class T>
  TORCHKILN_HD static sampled_roi::Patch<T> patch(const Args& args, i64 group, i64 bin) {
    return patch_of(args, sampled_roi::numbers<T, 6>(args.boxes, args.box_type, group * 6), bin);
  }

  template <class T>
  TORCHKILN_HD static sampled_roi::Patch<T> patch_of(const Args& args,
                                                     const sampled_roi::Numbers<T, 6>& box,
                                                     i64 bin) {
    const T scale = T(args.spatial_scale), offset = args.aligned ? T(0.5) : T(0);
    const sampled_roi::Coordinate<T> center_x = sampled_roi::coordinate(box.at[1], scale, offset);
    const sampled_roi::Coordinate<T> center_y = sampled_roi::coordinate(box.at[2], scale, offset);
    T width = rounded_product(box.at[3], scale), height = rounded_product(box.at[4], scale);
    if (!args.aligned) {
      width = width < T(1) ? T(1) : width;
      height = height < T(1) ? T(1) : height;
    }
    const T angle = args.clockwise ? -box.at[5] : box.at[5];
    const T bin_h = count_quotient(height, T(args.pooled_h));
    const T bin_w = count_quotient(width, T(args.pooled_w));
    sampled_roi::Patch<T> p = {};
    p.image = sampled_roi::image_named(args, box.at[0]);
    p.rows = sampled_roi::sample_count(args, bin_h);
    p.columns = sampled_roi::sample_count(args, bin_w);
    const T step_h = count_quotient(bin_h, T(max_of(p.rows, 1)));
    const T step_w = count_quotient(bin_w, T(max_of(p.columns, 1)));
    T sine, cosine;
    sin_cos_of(angle, sine, cosine);
    const i64 row_bin = u32(bin) / u32(args.pooled_w);
    // The first sample, from the centre.
    const T column = T(bin - row_bin * args.pooled_w);
    const T down = rounded_product(T(row_bin), bin_h) - height / T(2) + step_h / T(2);
    const T across = rounded_product(column, bin_w) - width / T(2) + step_w / T(2);
    p.origin_y = center_y.origin;
    p.origin_x = center_x.origin;
    p.y = rounded_product(down, cosine) - rounded_product(across, sine) + center_y.rest;
    p.x = rounded_product(down, sine) + rounded_product(across, cosine) + center_x.rest;
    p.row_y = step_h * cosine;
    p.row_x = step_h * sine;
    p.column_y = -step_w * sine;
    p.column_x = step_w * cosine;
    return sampled_roi::average(p, sampled_roi::is_finite(p.y + p.x + width + height + angle));
  }
};

}  // namespace torchkiln::roi_align_rotated
