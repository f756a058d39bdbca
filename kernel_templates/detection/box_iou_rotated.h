// Arguments and element maths of the overlaps of rotated rectangles, quadrilaterals and upright boxes in space, shared by
// CPU and GPU. A form says what a row means, a mode what of a pair is wanted.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"
#include "detection/box_iou.h"
#include "geometry/peer_overlap.h"
#include "geometry/prism.h"
#include "geometry/quad.h"
#include "geometry/rotated.h"

namespace torchkiln::box_iou_rotated {

enum Form {
  kRectangle = 0,  // x, y, w, h, angle
  kQuad = 1,       // x1, y1, ..., x4, y4
  kCorners = 2,    // x1, y1, x2, y2 before it is turned around its centre, angle
  kGround = 3,     // x, y, z, dx, dy, dz, angle: what it covers on the ground
  kPrism = 4,      // the same row: the box itself
  // By mmcv's rules (geometry/peer_overlap.h), for its drop-in:
  kPeerQuad = 5,
  kPeerGround = 6,
  kPeerPrism = 7,
};
enum Mode { kIou = 0, kIof = 1, kArea = 2 };

constexpr i64 columns_of(int form) {
  if (form == kQuad || form == kPeerQuad) return 8;
  return form == kRectangle || form == kCorners ? 5 : 7;
}

struct Args {
  const void* boxes1;  // (n, columns)
  const void* boxes2;  // (m, columns)
  void* out;           // (n, m); row by row: (n,)
  i64 n, m;
  i64 turn;  // 1: angles turn x towards y; -1: the other way
};

// A row with everything that its pairs need.
template <int kForm, class Scalar>
TORCHKILN_HD auto load_shape(const Scalar* boxes, i64 index, i64 turn) {
  using T = Acc<Scalar>;
  const Scalar* row = boxes + columns_of(kForm) * index;
  if constexpr (kForm == kQuad || kForm == kPeerQuad) {
    const T at[8] = {load(row[0]), load(row[1]), load(row[2]), load(row[3]),
                     load(row[4]), load(row[5]), load(row[6]), load(row[7])};
    if constexpr (kForm == kPeerQuad) {
      return PeerQuad<T>{quad(at)};
    } else {
      return quad(at);
    }
  } else if constexpr (kForm == kCorners) {
    const T x = load(row[0]), y = load(row[1]), w = load(row[2]) - x, h = load(row[3]) - y;
    return rotated(x + w / T(2), y + h / T(2), w, h, T(turn) * load(row[4]));
  } else if constexpr (kForm == kGround) {
    return prism(row, T(turn)).base;
  } else if constexpr (kForm == kPrism) {
    return prism(row, T(turn));
  } else if constexpr (kForm == kPeerGround) {
    return peer_rotated(prism(row, T(turn)).base);
  } else if constexpr (kForm == kPeerPrism) {
    PeerPrism<T> box{prism(row, T(turn))};
    box.base = peer_rotated(box.base);
    return box;
  } else {
    return rotated(load(row[0]), load(row[1]), load(row[2]), load(row[3]), T(turn) * load(row[4]));
  }
}

template <int kForm, class Scalar>
using ShapeOf = decltype(load_shape<kForm>(static_cast<const Scalar*>(nullptr), 0, 1));

// What a pair gives that shares `common`; 0 where the denominator is 0, NaN where a number is not finite, of an empty box
// too.
template <int kMode, class Shape, class T>
TORCHKILN_HD T value_of(const Shape& a, const Shape& b, T common) {
  if constexpr (kMode == kArea) return common;
  if constexpr (kMode == kIof) return is_nan(common) ? common : box_iou::ratio(common, size_of(a));
  return box_iou::ratio(common, box_iou::union_of(size_of(a), size_of(b), common));
}

// mmcv's denominator is at least a cubic centimetre.
template <int kMode, class T>
TORCHKILN_HD T value_of(const PeerPrism<T>& a, const PeerPrism<T>& b, T common) {
  return fast_quotient(common, nan_max(size_of(a) + size_of(b) - common, T(1e-6)));
}

}  // namespace torchkiln::box_iou_rotated
