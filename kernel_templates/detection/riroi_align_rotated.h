// roi_align_rotated for channels that are orientations: (c, orientations), which are turned by a region's angle too.
// Source: Han et al., ReDet: A Rotation-equivariant Detector for Aerial Object Detection, 2021, section 3.3.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/roi_align_rotated.h"

namespace torchkiln::riroi_align_rotated {

using sampled_roi::Args;

struct Pooled : roi_align_rotated::Pooled {
  static constexpr bool kOriented = true;

  template <class T>
  TORCHKILN_HD static sampled_roi::Patch<T> patch(const Args& args, i64 group, i64 bin) {
    const auto box = sampled_roi::numbers<T, 6>(args.boxes, args.box_type, group * 6);
    sampled_roi::Patch<T> p = roi_align_rotated::Pooled::patch_of(args, box, bin);
    // Before an angle is taken the other way round.
    const T angle = box.at[5];
    const T per_radian = T(double(args.orientations) * 0.15915494309189535);
    const T steps = rounded_product(angle, per_radian);
    const T whole = floor_of(steps), turns = floor_of(count_quotient(whole, T(args.orientations)));
    if (!sampled_roi::is_finite(steps)) return p;  // without samples
    const i32 orientations = i32(args.orientations);
    i32 turn = i32(whole - turns * T(orientations));
    // By one where the quotient was rounded up; of huge angles by any number.
    turn += turn < 0 ? orientations : 0;
    p.turn = min_of(max_of(turn, 0), orientations - 1);
    p.blend = steps - whole;
    return p;
  }
};

}  // namespace torchkiln::riroi_align_rotated
