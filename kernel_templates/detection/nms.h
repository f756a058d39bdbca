// Arguments of the non-maximum suppression kernels and what CPU and GPU share of them: the kinds of boxes, and which
// boxes take no part. (More kinds are in nms_shapes.h.)
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "geometry/overlap.h"

namespace torchkiln::nms {

// Keys that one block sorts. All launches of a call must agree on it, so it is no tunable.
constexpr int kTile = 1024;

// All kernels of a call share these. "Order" is the order in which boxes are suppressed: by descending score, or by
// class and then by descending score.
struct Args {
  const void* boxes;   // (n, columns) as the kind has them
  const void* scores;  // (n,)
  const void* idxs;    // (n,) integers of idx_bytes bytes, or null: all of one class
  void* keys;          // (1 or 2 orders, n) SortKey: by score; with classes also by class and score
  void* sorted_boxes;  // (n,) Shape in order
  u32* sorted_rows;    // (n,) row of the input at each place of the order
  u32* first;          // (n,) place where the class of a box begins in the order; classes only
  u32* score_rows;     // (n,) row of the input by descending score; classes only
  u32* score_ranks;    // (n,) its inverse
  u8* kept;            // (n, rounded up to 16) flags by descending score; classes only
  u64* words;          // 32 boxes each, in order: 1 << 32 | keep bits once they are known, else 0
  u32* counters;       // panels started, panels finished
  i64* indices;        // (max_output,) rows of the kept boxes by descending score, then -1
  i64* count;          // (1,) min(kept boxes, max_output)
  i64 n, n_words, max_output;
  i64 idx_bytes;
  double iou_threshold;
  double angle_sign;       // rotated boxes: 1 where a positive angle turns x towards y, else -1
  i64 columns;             // of boxes
  double offset;           // boxes given by corners: added to x2 and y2
  double score_threshold;  // boxes without a greater score are left out; NaN: none is
};

// Is the box of a row left out for its score?
template <class Scalar>
TORCHKILN_HD bool left_out(const Args& args, i64 row) {
  using T = Acc<Scalar>;
  if (is_nan(args.score_threshold)) return false;
  return !(load(static_cast<const Scalar*>(args.scores)[row]) > T(args.score_threshold));
}

// A kind of boxes says how the algorithm meets them:
//   Scalar, T      the type of the input, and of computation
//   Shape          what the tests need of a box, made once
//   load           the shape of a row of the input
//   absent         a shape that suppresses and is suppressed never
//   area, exceeds  do two shapes overlap by more than the threshold? kCalled: what is long is called
//   kIsCheap       whether a test is so short that code of several may stand beside each other

template <class Type>
TORCHKILN_HD Type nan_of() {
  return Type(0) * Type(bits_float(0x7f800000u));
}

// Rows of x1, y1, x2, y2.
template <class Type>
struct Boxes {
  using Scalar = Type;
  using T = Acc<Scalar>;
  using Shape = Box<T>;
  static constexpr bool kIsCheap = true;

  static TORCHKILN_HD Shape load(const Args& args, i64 row) {
    Shape box = load_box(static_cast<const Scalar*>(args.boxes), row);
    box.x2 += T(args.offset);
    box.y2 += T(args.offset);
    return box;
  }
  static TORCHKILN_HD Shape absent() {
    const T nan = nan_of<T>();
    return {nan, nan, nan, nan};
  }
  static TORCHKILN_HD T area(const Shape& box) { return guarded_area(box); }
  template <bool kCalled = false>
  static TORCHKILN_HD bool exceeds(const Shape& a, T area_a, const Shape& b, T area_b,
                                   T threshold) {
    return torchkiln::exceeds(a, area_a, b, area_b, threshold);
  }
};

// A box whose score is NaN takes no part.
template <class Kind>
TORCHKILN_HD typename Kind::Shape participant(const typename Kind::Shape& shape,
                                              typename Kind::T score) {
  return is_nan(score) ? Kind::absent() : shape;
}

}  // namespace torchkiln::nms
