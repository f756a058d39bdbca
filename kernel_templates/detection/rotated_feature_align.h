// Samples at the centre of the rotated box of each pixel, and with five samples at its corners: (centre y, centre x,
// width, height, angle). The order of the centre is the peer's. Samples are added to the input.
// Source: Yang et al., R3Det: Refined Single-Stage Detector with Feature Refinement for Rotating Object, 2021, section 3.3.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/sampled_roi.h"

namespace torchkiln::rotated_feature_align {

using sampled_roi::Args;

struct Pooled : sampled_roi::Operator {
  static constexpr bool kIdentity = true, kByImage = true;

  // (y, x) is the centre; row and column are half of the height and of the width.
  template <class T>
  TORCHKILN_HD static sampled_roi::Patch<T> patch(const Args& args, i64 group, i64 bin) {
    const i64 row = (group * args.bins + bin) * 5;
    const auto box = sampled_roi::numbers<T, 5>(args.boxes, args.box_type, row);
    const T scale = T(args.spatial_scale);
    sampled_roi::Patch<T> p = {};
    p.image = i32(group);
    p.rows = 1;
    p.columns = i32(args.samples);
    const auto y = sampled_roi::coordinate(box.at[0], scale, T(0));
    const auto x = sampled_roi::coordinate(box.at[1], scale, T(0));
    p.origin_y = y.origin;
    p.origin_x = x.origin;
    p.y = y.rest;
    p.x = x.rest;
    p.share = T(1);
    if (args.samples == 1) return p;
    const T half_w = box.at[2] * scale / T(2), half_h = box.at[3] * scale / T(2);
    T sine, cosine;
    sin_cos_of(box.at[4], sine, cosine);
    p.column_x = rounded_product(half_w, cosine);
    p.column_y = rounded_product(half_w, sine);
    p.row_x = rounded_product(-half_h, sine);
    p.row_y = rounded_product(half_h, cosine);
    return p;
  }

  template <class T>
  TORCHKILN_HD static sampled_roi::Point<T> point(const sampled_roi::Patch<T>& p, i32 sample) {
    if (sample == 0) return {p.y, p.x, p.origin_y, p.origin_x};
    const T i = sample <= 2 ? T(1) : T(-1), j = sample == 1 || sample == 4 ? T(1) : T(-1);
    return {p.y + i * p.row_y + j * p.column_y, p.x + i * p.row_x + j * p.column_x, p.origin_y,
            p.origin_x};
  }
};

}  // namespace torchkiln::rotated_feature_align
