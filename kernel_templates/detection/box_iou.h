// Arguments and element maths of box_iou: plain, generalized, distance and complete, and the share of the first box;
// shared by CPU and GPU.
// Sources: GIoU, Rezatofighi et al. 2019, eq. 1 to 3; DIoU and CIoU, Zheng et al. 2020, eq. 7 to 11.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/box.h"

namespace torchkiln::box_iou {

enum Mode {
  kIou = 0,
  kGiou = 1,
  kDiou = 2,
  kCiou = 3,
  kIof = 4,  // intersection over foreground: over the first box's area
  // As mmcv computes them: no area is cut off at 0 and an empty denominator gives NaN. No gradient.
  kMmcvIou = 5,
  kMmcvIof = 6,
  kIofOther = 7,  // kIof of exchanged boxes, for the gradient of the second set
};

struct Args {
  const void* boxes1;  // (n, 4) x1, y1, x2, y2
  const void* boxes2;  // (m, 4)
  void* out;           // (n, m); (n) when row is compared with row
  i64 n, m;
  double eps;     // added to the squared diagonal and to alpha's denominator
  double offset;  // added to x2 and y2
};

// The gradient with respect to one of the two sets; `boxes` is that set, `others` the other one.
struct BackwardArgs {
  const void* grad_output;  // element (i, j) at i * row_stride + j * column_stride, i over `boxes`
  const void* boxes;        // (n, 4)
  const void* others;       // (m, 4)
  void* grad_boxes;         // (n, 4)
  i64 n, m;
  i64 row_stride, column_stride;
  double eps, offset;
};

// Row against row, both gradients at once.
struct AlignedBackwardArgs {
  const void* grad_output;  // element i at i * stride
  const void* boxes1;       // (n, 4)
  const void* boxes2;
  void* grad_boxes1;  // (n, 4)
  void* grad_boxes2;
  i64 n, stride;
  double eps, offset;
};

// A box whose last pixel belongs to it is larger by an offset of 1.
template <class Scalar>
TORCHKILN_HD Box<Acc<Scalar>> load_box(const Scalar* boxes, i64 index, double offset) {
  Box<Acc<Scalar>> box = torchkiln::load_box(boxes, index);
  box.x2 += Acc<Scalar>(offset);
  box.y2 += Acc<Scalar>(offset);
  return box;
}

template <class T>
TORCHKILN_HD T mmcv_element(const Box<T>& a, const Box<T>& b, T offset, bool over_first) {
  const T inter = intersection(a, b);
  T base = (a.x2 - a.x1) * (a.y2 - a.y1);
  if (!over_first) base += (b.x2 - b.x1) * (b.y2 - b.y1) - inter;
  return inter / nan_max(base, offset);
}

// 0 for a pair whose denominator is 0, so that degenerate boxes never give NaN. Divides in any case: a branch costs more.
template <class T>
TORCHKILN_HD T ratio(T numerator, T denominator) {
  const T share = fast_quotient(numerator, denominator);
  return denominator == T(0) ? T(0) : share;
}

// What two shapes cover together: of all orders the one with the least rounding; of a shape and itself exactly its area.
template <class T>
TORCHKILN_HD T union_of(T area_a, T area_b, T inter) {
  return (nan_max(area_a, area_b) - inter) + nan_min(area_a, area_b);
}

// The same of two boxes; never less than the greater area, which it is for a box and itself. The GPU subtracts the product
// before it is rounded, which makes up for what a quick division is off by.
template <class T>
TORCHKILN_HD T union_of(T area_a, T area_b, Sides<T> common) {
  const T greater = nan_max(area_a, area_b);
#if defined(__CUDACC_RTC__)
  const T rest = fused(-common.w, common.h, greater);
#else
  const T rest = greater - common.w * common.h;
#endif
  return nan_max(rest + nan_min(area_a, area_b), greater);
}

template <class T>
struct Parts {
  T inter, united, iou;
  T enclosing_w, enclosing_h;  // sides of the smallest box around both
  T dx, dy;                    // twice the distance of the centres
};

template <class T>
TORCHKILN_HD Parts<T> parts_of(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  Parts<T> p;
  const Sides<T> common = common_sides(a, b);
  p.inter = common.w * common.h;
  p.united = union_of(area_a, area_b, common);
  p.iou = ratio(p.inter, p.united);
  p.enclosing_w = positive_part(nan_max(a.x2, b.x2) - nan_min(a.x1, b.x1));
  p.enclosing_h = positive_part(nan_max(a.y2, b.y2) - nan_min(a.y1, b.y1));
  p.dx = (a.x1 + a.x2) - (b.x1 + b.x2);
  p.dy = (a.y1 + a.y2) - (b.y1 + b.y2);
  return p;
}

template <class T>
TORCHKILN_HD Parts<T> parts_of(const Box<T>& a, const Box<T>& b) {
  return parts_of(a, area(a), b, area(b));
}

// atan2(w, h) and not atan(w / h): a box of size 0 has the angle 0.
template <class T>
TORCHKILN_HD T aspect_angle(const Box<T>& box) {
  return atan2_of(positive_part(box.x2 - box.x1), positive_part(box.y2 - box.y1));
}

template <class T>
constexpr T kAspectScale = T(0.40528473456935108577551785283891);  // 4 / pi^2

// The areas of the boxes are those of area().
template <int kMode, class T>
TORCHKILN_HD T element(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T eps, T offset) {
  if constexpr (kMode == kMmcvIou || kMode == kMmcvIof)
    return mmcv_element(a, b, offset, kMode == kMmcvIof);
  const Parts<T> p = parts_of(a, area_a, b, area_b);
  if constexpr (kMode == kIou) return p.iou;
  if constexpr (kMode == kIof) return ratio(p.inter, area_a);
  if constexpr (kMode == kGiou) {
    const T enclosing = p.enclosing_w * p.enclosing_h;
    return p.iou - ratio(enclosing - p.united, enclosing);
  }
  const T diagonal = p.enclosing_w * p.enclosing_w + p.enclosing_h * p.enclosing_h + eps;
  const T diou = p.iou - ratio((p.dx * p.dx + p.dy * p.dy) / T(4), diagonal);
  if constexpr (kMode != kCiou) return diou;
  const T delta = aspect_angle(a) - aspect_angle(b);
  const T v = kAspectScale<T> * delta * delta;
  return diou - ratio(v, T(1) - p.iou + v + eps) * v;
}

template <int kMode, class T>
TORCHKILN_HD T element(const Box<T>& a, const Box<T>& b, T eps, T offset) {
  return element<kMode>(a, area(a), b, area(b), eps, offset);
}

// Shares of max(a, b) and min(a, b) that belong to a; a tie is split, as torch's maximum does.
template <class T>
TORCHKILN_HD T greater_share(T a, T b) {
  return a > b ? T(1) : (a == b ? T(0.5) : T(0));
}

// Adds `gradient` times the derivative of area(box).
template <class T>
TORCHKILN_HD void add_area_gradient(const Box<T>& box, T gradient, Box<T>& grad) {
  const T w = box.x2 - box.x1, h = box.y2 - box.y1;
  const T dw = w >= T(0) ? gradient * positive_part(h) : T(0);
  const T dh = h >= T(0) ? gradient * positive_part(w) : T(0);
  grad.x1 -= dw;
  grad.x2 += dw;
  grad.y1 -= dh;
  grad.y2 += dh;
}

// Adds to a's gradient what the intersection's (inner) sides give it.
template <class T>
TORCHKILN_HD void add_intersection_gradient(const Box<T>& a, const Box<T>& b, T gradient,
                                            Box<T>& grad) {
  const T w = nan_min(a.x2, b.x2) - nan_max(a.x1, b.x1);
  const T h = nan_min(a.y2, b.y2) - nan_max(a.y1, b.y1);
  const T dw = w >= T(0) ? gradient * positive_part(h) : T(0);
  const T dh = h >= T(0) ? gradient * positive_part(w) : T(0);
  grad.x1 -= dw * greater_share(a.x1, b.x1);
  grad.x2 += dw * greater_share(b.x2, a.x2);
  grad.y1 -= dh * greater_share(a.y1, b.y1);
  grad.y2 += dh * greater_share(b.y2, a.y2);
}

// Adds to a's gradient what the enclosing (outer) sides give it.
template <class T>
TORCHKILN_HD void add_enclosing_gradient(const Box<T>& a, const Box<T>& b, T grad_w, T grad_h,
                                         Box<T>& grad) {
  grad.x1 -= grad_w * greater_share(b.x1, a.x1);
  grad.x2 += grad_w * greater_share(a.x2, b.x2);
  grad.y1 -= grad_h * greater_share(b.y1, a.y1);
  grad.y2 += grad_h * greater_share(a.y2, b.y2);
}

// Adds the gradient of the normalised squared centre distance, weighted by `gradient`.
template <class T>
TORCHKILN_HD void add_distance_gradient(const Box<T>& a, const Box<T>& b, const Parts<T>& p, T eps,
                                        T gradient, Box<T>& grad) {
  const T diagonal = p.enclosing_w * p.enclosing_w + p.enclosing_h * p.enclosing_h + eps;
  if (diagonal == T(0)) return;
  const T distance = (p.dx * p.dx + p.dy * p.dy) / T(4);
  const T centre = close_quotient(gradient, T(2) * diagonal);
  grad.x1 += centre * p.dx;
  grad.x2 += centre * p.dx;
  grad.y1 += centre * p.dy;
  grad.y2 += centre * p.dy;
  const T outer = close_quotient(-gradient * distance, diagonal * diagonal);
  add_enclosing_gradient(a, b, outer * T(2) * p.enclosing_w, outer * T(2) * p.enclosing_h, grad);
}

// Adds the gradient of CIoU's aspect term -alpha * v; alpha is a constant by definition (eq. 11).
template <class T>
TORCHKILN_HD void add_aspect_gradient(const Box<T>& a, const Box<T>& b, const Parts<T>& p, T eps,
                                      T gradient, Box<T>& grad) {
  const T w = positive_part(a.x2 - a.x1), h = positive_part(a.y2 - a.y1);
  const T squared = w * w + h * h;
  if (squared == T(0)) return;
  const T delta = aspect_angle(a) - aspect_angle(b);
  const T v = kAspectScale<T> * delta * delta;
  const T alpha = ratio(v, T(1) - p.iou + v + eps);
  const T angle = -gradient * alpha * T(2) * kAspectScale<T> * delta;
  const T dw = a.x2 >= a.x1 ? close_quotient(angle * h, squared) : T(0);
  const T dh = a.y2 >= a.y1 ? close_quotient(-angle * w, squared) : T(0);
  grad.x1 -= dw;
  grad.x2 += dw;
  grad.y1 -= dh;
  grad.y2 += dh;
}

// The mode with the boxes exchanged: all are symmetric but one.
constexpr int exchanged(int mode) { return mode == kIof ? kIofOther : mode; }

// The share of a, or of b with kIofOther.
template <int kMode, class T>
TORCHKILN_HD void add_iof_gradient(const Box<T>& a, const Box<T>& b, T gradient, Box<T>& grad) {
  const T whole = kMode == kIof ? area(a) : area(b);
  if (whole == T(0)) return;
  if constexpr (kMode == kIof)
    add_area_gradient(a, close_quotient(-gradient * intersection(a, b), whole * whole), grad);
  add_intersection_gradient(a, b, close_quotient(gradient, whole), grad);
}

// Adds `gradient` times d element(a, b) / d a; exchanged(kMode) and exchanged boxes give the other one.
template <int kMode, class T>
TORCHKILN_HD void add_gradient(const Box<T>& a, const Box<T>& b, T eps, T gradient, Box<T>& grad) {
  if constexpr (kMode == kIof || kMode == kIofOther)
    return add_iof_gradient<kMode>(a, b, gradient, grad);
  const Parts<T> p = parts_of(a, b);
  T grad_inter = T(0), grad_union = T(0);
  if (p.united != T(0)) {
    grad_inter = close_quotient(gradient, p.united);
    grad_union = close_quotient(-gradient * p.inter, p.united * p.united);
  }
  if constexpr (kMode == kGiou) {
    const T enclosing = p.enclosing_w * p.enclosing_h;
    if (enclosing != T(0)) {
      grad_union += close_quotient(gradient, enclosing);
      const T outer = close_quotient(-gradient * p.united, enclosing * enclosing);
      add_enclosing_gradient(a, b, outer * p.enclosing_h, outer * p.enclosing_w, grad);
    }
  }
  if constexpr (kMode == kDiou || kMode == kCiou)
    add_distance_gradient(a, b, p, eps, -gradient, grad);
  if constexpr (kMode == kCiou) add_aspect_gradient(a, b, p, eps, gradient, grad);
  add_area_gradient(a, grad_union, grad);
  add_intersection_gradient(a, b, grad_inter - grad_union, grad);
}

}  // namespace torchkiln::box_iou
