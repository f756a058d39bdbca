// Arguments of the non-maximum suppression kernels and what CPU and GPU share of them: the order of the boxes, and
// which boxes take no part. (The overlap test is in geometry/overlap.h.)
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
  const void* boxes;   // (n, 4) x1, y1, x2, y2
  const void* scores;  // (n,)
  const void* idxs;    // (n,) integers of idx_bytes bytes, or null: all of one class
  void* keys;          // (1 or 2 orders, n) SortKey: by score; with classes also by class and score
  void* sorted_boxes;  // (n,) Box<Acc<Scalar>> in order
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
};

// A box without a part in suppression (its score or a coordinate is NaN) gets a NaN coordinate.
template <class T>
TORCHKILN_HD Box<T> participant(const Box<T>& box, T score) {
  return is_nan(score) ? Box<T>{score, score, score, score} : box;
}

}  // namespace torchkiln::nms
