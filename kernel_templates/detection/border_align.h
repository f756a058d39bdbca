// Samples along the four borders of a box (x1, y1, x2, y2, in pixels of the map): top, left, bottom, right, each on its
// own block of channels; bin 4 b + border. The greatest of samples + 1 points counts.
// Source: Qiu et al., BorderDet: Border Feature for Dense Object Detection, 2020, section 3.2.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/sampled_roi.h"

namespace torchkiln::border_align {

using sampled_roi::Args;

struct Pooled : sampled_roi::Operator {
  static constexpr bool kMaximum = true, kBordered = true, kByImage = true;

  template <class T>
  TORCHKILN_HD static sampled_roi::Patch<T> patch(const Args& args, i64 group, i64 bin) {
    const i64 row = group * args.bins + bin / 4 * 4;  // four bins and four columns a box
    const int border = int(bin % 4);
    const auto box = sampled_roi::numbers<T, 4>(args.boxes, args.box_type, row);
    const T x1 = box.at[0], y1 = box.at[1], x2 = box.at[2], y2 = box.at[3];
    const T across = count_quotient(x2 - x1, T(args.samples));
    const T down = count_quotient(y2 - y1, T(args.samples));
    sampled_roi::Patch<T> p = {};
    p.image = i32(group);
    p.rows = 1;
    p.columns = i32(args.samples) + 1;
    p.y = border < 2 ? y1 : y2;
    p.x = border < 2 ? x1 : x2;
    if (border % 2 == 0) {
      p.column_x = border == 0 ? across : -across;
    } else {
      p.column_y = border == 1 ? down : -down;
    }
    p.share = T(1);
    return sampled_roi::settled(p);
  }
};

}  // namespace torchkiln::border_align
