// Kinds of boxes beside those given by two corners, for CPU and GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/nms.h"
#include "geometry/peer_overlap.h"
#include "geometry/quad.h"
#include "geometry/rotated.h"

namespace torchkiln::nms {

enum KindNumber : int {
  kRotated = 0,
  kQuads = 1,
  kNormal = 2,
  kInclusive = 3,
  kPeerRotated = 4,  // by the rules of geometry/peer_overlap.h
  kPeerQuads = 5,
  kLanes = 6
};

// Of shapes that lie near each other, compiled once. By value: a reference would put what is in registers on the stack.
template <class Shape>
TORCHKILN_HD_CALLED auto near_area(Shape a, Shape b) {
  return shared_area(a, b);
}

// A test of shapes whose shared area is found by geometry/: false for NaN. kCalled: for a kernel that has it at several
// places, most of whose shapes are apart.
template <bool kCalled, class Shape, class T>
TORCHKILN_HD bool shape_exceeds(const Shape& a, T area_a, const Shape& b, T area_b, T threshold) {
  T inter;
  if constexpr (kCalled) {
    if (!apart(a, b, inter)) inter = near_area(a, b);
  } else {
    inter = shared_area(a, b);
  }
  return inter > threshold * ((area_a + area_b) - inter);
}

// Rows of x, y, w, h, angle; or with 7 columns, of x, y, z, dx, dy, dz, heading, seen from above.
template <class Type>
struct RotatedBoxes {
  using Scalar = Type;
  using T = Acc<Scalar>;
  using Shape = Rotated<T>;
  static constexpr bool kIsCheap = false;

  static TORCHKILN_HD Shape load(const Args& args, i64 row) {
    using torchkiln::load;
    const Scalar* at = static_cast<const Scalar*>(args.boxes) + args.columns * row;
    const Scalar* size = at + (args.columns == 7 ? 3 : 2);
    const T angle = load(at[args.columns - 1]) * T(args.angle_sign);
    return rotated(load(at[0]), load(at[1]), load(size[0]), load(size[1]), angle);
  }
  static TORCHKILN_HD Shape absent() {
    Shape shape{};
    shape.x = nan_of<T>();
    return shape;
  }
  static TORCHKILN_HD T area(const Shape& shape) { return shape.area; }
  template <bool kCalled = false>
  static TORCHKILN_HD bool exceeds(const Shape& a, T area_a, const Shape& b, T area_b,
                                   T threshold) {
    return shape_exceeds<kCalled>(a, area_a, b, area_b, threshold);
  }
};

// Rows of four vertices.
template <class Type>
struct Quads {
  using Scalar = Type;
  using T = Acc<Scalar>;
  using Shape = Quad<T>;
  static constexpr bool kIsCheap = false;

  static TORCHKILN_HD Shape load(const Args& args, i64 row) {
    const Scalar* at = static_cast<const Scalar*>(args.boxes) + 8 * row;
    T numbers[8];
    for (int i = 0; i < 8; ++i) numbers[i] = torchkiln::load(at[i]);
    return quad(numbers);
  }
  static TORCHKILN_HD Shape absent() {
    Shape shape{};
    shape.x = nan_of<T>();
    return shape;
  }
  static TORCHKILN_HD T area(const Shape& shape) { return shape.area; }
  template <bool kCalled = false>
  static TORCHKILN_HD bool exceeds(const Shape& a, T area_a, const Shape& b, T area_b,
                                   T threshold) {
    return shape_exceeds<kCalled>(a, area_a, b, area_b, threshold);
  }
};

// Rows of x, y, z, dx, dy, dz, heading, seen from above and taken as if they were not turned.
template <class Type>
struct NormalBoxes : Boxes<Type> {
  using typename Boxes<Type>::Scalar;
  using typename Boxes<Type>::Shape;

  static TORCHKILN_HD Shape load(const Args& args, i64 row) {
    using torchkiln::load;
    const Scalar* at = static_cast<const Scalar*>(args.boxes) + args.columns * row;
    const auto x = load(at[0]), y = load(at[1]);
    const auto half_x = load(at[3]) / 2, half_y = load(at[4]) / 2;
    return {x - half_x, y - half_y, x + half_x, y + half_y};
  }
};

// Rows of x1, y1, x2, y2; an overlap equal to the threshold suppresses, too. Not where the union is empty.
template <class Type>
struct InclusiveBoxes : Boxes<Type> {
  using typename Boxes<Type>::T;
  using typename Boxes<Type>::Shape;

  template <bool kCalled = false>
  static TORCHKILN_HD bool exceeds(const Shape& a, T area_a, const Shape& b, T area_b,
                                   T threshold) {
    const T inter = guarded_intersection(a, b), total = (area_a + area_b) - inter;
    return total > T(0) && reaches_past(inter, total, just_below(threshold));
  }
};

template <class T>
TORCHKILN_HD PeerRotated<T> as_peer(const Rotated<T>& box) {
  return peer_rotated(box);
}
template <class T>
TORCHKILN_HD PeerQuad<T> as_peer(const Quad<T>& quad) {
  return PeerQuad<T>{quad};
}

// A shape by another rule: `Plain` with shapes that are made into `Peer<T>`.
template <class Plain, template <class> class Peer>
struct PeerShapes : Plain {
  using typename Plain::T;
  using Shape = Peer<T>;

  static TORCHKILN_HD Shape load(const Args& args, i64 row) {
    return as_peer(Plain::load(args, row));
  }
  static TORCHKILN_HD Shape absent() { return as_peer(Plain::absent()); }
  template <bool kCalled = false>
  static TORCHKILN_HD bool exceeds(const Shape& a, T area_a, const Shape& b, T area_b,
                                   T threshold) {
    return shape_exceeds<false>(a, area_a, b, area_b, threshold);
  }
};
// Lanes: rows of two numbers, start, one more, length, and x at every height of an image from one end to the other.
// `start` is a share of the heights, `length` a number of them. Lanes that are near each other suppress.
template <class Type>
struct Lanes {
  using Scalar = Type;
  using T = Acc<Scalar>;
  struct Shape {
    const Scalar* x;
    i32 begin, end;  // heights that it has, `begin` may be below 0; none where end < begin
  };
  static constexpr bool kIsCheap = false;
  static constexpr i32 kStart = 2, kLength = 4, kHead = 5;  // columns
  static constexpr i32 kFar = 1 << 24;                      // no lane starts so far outside

  static TORCHKILN_HD Shape load(const Args& args, i64 row) {
    using torchkiln::load;
    const Scalar* at = static_cast<const Scalar*>(args.boxes) + args.columns * row;
    const i32 heights = i32(args.columns) - kHead;
    const T first = rounded_product(load(at[kStart]), T(heights - 1)) + T(0.5);
    const T length = load(at[kLength]);
    if (!(abs_of(first) < T(kFar) && length >= T(1))) return absent();
    // Cut off, not rounded down: from -1.5 heights on a lane starts at 0.
    const i32 begin = i32(first), runs = i32(min_of(length, T(2 * kFar)));
    return {at + kHead, begin, min_of(begin + runs, heights) - 1};
  }
  static TORCHKILN_HD Shape absent() { return {nullptr, 1, 0}; }
  static TORCHKILN_HD T area(const Shape&) { return T(0); }
  // Is the mean distance at common heights below the threshold? Never where both start outside.
  template <bool kCalled = false>
  static TORCHKILN_HD bool exceeds(const Shape& a, T, const Shape& b, T, T threshold) {
    const i32 begin = max_of(a.begin, b.begin), end = min_of(a.end, b.end);
    if (end < begin || begin < 0) return false;
    T sum = T(0);
    TORCHKILN_ROLLED
    for (i32 i = begin; i <= end; ++i)
      sum += abs_of(torchkiln::load(a.x[i]) - torchkiln::load(b.x[i]));
    return sum < threshold * T(end - begin + 1);
  }
};

template <class Scalar, int kKind>
struct KindOf;
template <class Scalar>
struct KindOf<Scalar, kRotated> {
  using Type = RotatedBoxes<Scalar>;
};
template <class Scalar>
struct KindOf<Scalar, kQuads> {
  using Type = Quads<Scalar>;
};
template <class Scalar>
struct KindOf<Scalar, kNormal> {
  using Type = NormalBoxes<Scalar>;
};
template <class Scalar>
struct KindOf<Scalar, kInclusive> {
  using Type = InclusiveBoxes<Scalar>;
};
template <class Scalar>
struct KindOf<Scalar, kPeerRotated> {
  using Type = PeerShapes<RotatedBoxes<Scalar>, PeerRotated>;
};
template <class Scalar>
struct KindOf<Scalar, kPeerQuads> {
  using Type = PeerShapes<Quads<Scalar>, PeerQuad>;
};
template <class Scalar>
struct KindOf<Scalar, kLanes> {
  using Type = Lanes<Scalar>;
};
template <class Scalar, int kKind>
using ShapeKind = typename KindOf<Scalar, kKind>::Type;

// Of the kernel that gives every box its group: the first kept box that suppresses it.
struct MatchArgs {
  const void* boxes;       // (n, columns) as the kind has them
  const void* scores;      // (n,)
  const u32* sorted_rows;  // (n,) rows by descending score
  const i64* kept;         // (n,) rows of the kept boxes by descending score
  const i64* count;        // (1,) how many they are
  i64* rows;               // (n,) rows by descending score
  i64* groups;             // (n,) the number of the kept box with which each of them goes
  i64 n, columns;
  double iou_threshold;
};

}  // namespace torchkiln::nms
