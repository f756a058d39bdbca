// Arguments of the soft suppression kernels, and how a box lowers the score of another; shared by CPU and GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/overlap.h"

namespace torchkiln::soft_nms {

enum Method : i64 { kNaive = 0, kLinear = 1, kGaussian = 2 };

// Keys that one block sorts.
constexpr int kTile = 1024;
// Places of the order that one block searches for the beginnings of classes.
constexpr int kPlaces = 32;

struct Args {
  const void* boxes;       // (n, 4) x1, y1, x2, y2
  const void* scores;      // (n,)
  const u32* sorted_rows;  // (n,) rows by class, or null: all of one class
  const u32* first;        // (n,) place where the class of a box begins among them; classes only
  void* live_boxes;        // (n,) Box<Acc<Scalar>> by place, as they take part
  void*
      live_scores;  // (n,) Acc<Scalar> by place; kept up to date where a class is too large for registers
  u32* live_rows;    // (n,) alike
  void* selected;    // (n,) SortKey by place: first those of a class that are kept; classes only
  void* ranked;      // (n,) SortKey, tiles of them in order; several tiles only
  u32* n_selected;   // (1,) kept boxes of all classes, zero before; classes only
  i64* indices;      // (max_output,) rows of the kept boxes, then -1
  void* out_scores;  // (max_output,) their scores, then 0
  i64* count;        // (1,) min(kept boxes, max_output)
  i64 n, max_output, method;
  double iou_threshold, sigma, min_score;
  double offset;  // added to x2 and y2
};

// A box whose last pixel belongs to it is larger by an offset of 1.
template <class Scalar>
TORCHKILN_HD Box<Acc<Scalar>> load_box(const Args& args, i64 row) {
  Box<Acc<Scalar>> box = torchkiln::load_box(static_cast<const Scalar*>(args.boxes), row);
  box.x2 += Acc<Scalar>(args.offset);
  box.y2 += Acc<Scalar>(args.offset);
  return box;
}

// Whether a box with this intersection with a better one, and this area of both together, loses score. An empty union
// (points, lines) and a NaN coordinate, whose area is NaN, lower nothing. An infinite union leaves an IoU of 0, which
// reaches a threshold of 0.
template <class T>
TORCHKILN_HD bool is_lowered(i64 method, T inter, T total, T threshold) {
  if (!(total > T(0))) return false;
  return method == kGaussian ? inter > T(0) : reaches_past(inter, total, just_below(threshold));
}

// What the score is multiplied by then.
template <class T>
TORCHKILN_HD_CALLED T factor(i64 method, T inter, T total, T sigma) {
  if (method == kNaive) return T(0);
  const T iou = close_quotient(inter, total);
  return method == kLinear ? T(1) - iou : exp_of(close_quotient(-(iou * iou), sigma));
}

}  // namespace torchkiln::soft_nms
