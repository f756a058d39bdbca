// Arguments and element maths of the differentiable overlap of rotated rectangles and of upright boxes in space, shared
// by CPU and GPU. The gradient is a boundary's: a side that moves outwards adds area along the part of it that lies in the
// other shape.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "detection/box_iou.h"
#include "geometry/prism.h"
#include "geometry/rotated.h"
#include "geometry/rotated_gradient.h"

namespace torchkiln::diff_iou_rotated {

struct Args {
  const void* boxes1;  // (n, 5) x, y, w, h, angle; in space (n, 7) x, y, z, w, h, l, angle
  const void* boxes2;
  void* out;  // (n,)
  i64 n;
};

struct BackwardArgs {
  const void* grad_output;  // element i at i * stride
  const void* boxes1;
  const void* boxes2;
  void* grad_boxes1;
  void* grad_boxes2;
  i64 n;
  i64 stride;
};

// A rectangle is a box in space of height 1.
template <bool kSpace, class Scalar>
TORCHKILN_HD Prism<Acc<Scalar>> load_prism(const Scalar* boxes, i64 index) {
  using T = Acc<Scalar>;
  if constexpr (kSpace) return prism(boxes + 7 * index, T(1));
  const Scalar* row = boxes + 5 * index;
  return {rotated(load(row[0]), load(row[1]), load(row[2]), load(row[3]), load(row[4])), T(0),
          T(0.5)};
}

template <bool kSpace, class Scalar>
TORCHKILN_HD void forward_row(const Args& args, i64 i) {
  const auto a = load_prism<kSpace>(static_cast<const Scalar*>(args.boxes1), i);
  const auto b = load_prism<kSpace>(static_cast<const Scalar*>(args.boxes2), i);
  const auto common = shared_area(a, b);
  store(static_cast<Scalar*>(args.out)[i],
        box_iou::ratio(common, size_of(a) + size_of(b) - common));
}

// The gradient of one box of a pair, from that of the shared volume and of the box's own.
template <bool kSpace, class Scalar>
TORCHKILN_HD void store_gradient(Scalar* grad, const Scalar* row, const Prism<Acc<Scalar>>& a,
                                 const Prism<Acc<Scalar>>& b, Acc<Scalar> area,
                                 Acc<Scalar> of_common, Acc<Scalar> of_size) {
  using T = Acc<Scalar>;
  constexpr int kWidth = kSpace ? 3 : 2;
  const T common_height = shared_height(a, b), height = T(2) * a.half_height;
  RotatedGradient<T> g = shared_area_gradient(a.base, b.base);
  const T scale = of_common * common_height, size = T(2) * of_size * height;
  // A negative side has no gradient: the box stays empty.
  const T w = load(row[kWidth]) < T(0) ? T(0) : T(1),
          h = load(row[kWidth + 1]) < T(0) ? T(0) : T(1);
  store(grad[0], scale * g.x);
  store(grad[1], scale * g.y);
  store(grad[kWidth], w * (scale * g.w + size * a.base.half_h));
  store(grad[kWidth + 1], h * (scale * g.h + size * a.base.half_w));
  store(grad[kSpace ? 6 : 4], scale * g.angle);
  if constexpr (kSpace) {
    const T top = upper_share(a, b), bottom = lower_share(a, b);
    const T vertical = common_height > T(0) ? of_common * area : T(0);
    const T l = load(row[5]) < T(0) ? T(0) : T(1);
    store(grad[2], vertical * (top - bottom));
    store(grad[5], l * (vertical * (top + bottom) / T(2) + of_size * a.base.area));
  }
}

template <bool kSpace, class Scalar>
TORCHKILN_HD void backward_row(const BackwardArgs& args, i64 i) {
  using T = Acc<Scalar>;
  constexpr int kColumns = kSpace ? 7 : 5;
  const Scalar* boxes1 = static_cast<const Scalar*>(args.boxes1);
  const Scalar* boxes2 = static_cast<const Scalar*>(args.boxes2);
  Prism<T> a = load_prism<kSpace>(boxes1, i), b = load_prism<kSpace>(boxes2, i);
  const T area = shared_area(a.base, b.base), common = area * shared_height(a, b);
  const T united = size_of(a) + size_of(b) - common;
  const T gradient = load(static_cast<const Scalar*>(args.grad_output)[i * args.stride]);
  // Of I / (A + B - I). Without a union there is none; NaN goes on to all numbers.
  const T inverse = united == T(0) ? T(0) : close_quotient(T(1), united), iou = common * inverse;
  const T of_size = -gradient * iou * inverse, of_common = gradient * inverse - of_size;
  Scalar* grad = static_cast<Scalar*>(args.grad_boxes1) + kColumns * i;
  const Scalar* row = boxes1 + kColumns * i;
  TORCHKILN_ROLLED
  for (int side = 0; side < 2; ++side) {
    store_gradient<kSpace>(grad, row, a, b, area, of_common, of_size);
    const Prism<T> other = a;
    a = b;
    b = other;
    grad = static_cast<Scalar*>(args.grad_boxes2) + kColumns * i;
    row = boxes2 + kColumns * i;
  }
}

}  // namespace torchkiln::diff_iou_rotated
