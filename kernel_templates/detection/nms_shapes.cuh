// Non-maximum suppression of rotated boxes, quadrilaterals and other kinds; see nms_panels.cuh. And `match`, which finds
// for each box the kept one that it goes with: one warp looks through the kept boxes in order.
// spills: up to 180 bytes for quadrilaterals in float64, by ptxas' own choice: no kernel asks for a number of blocks.
// compile time: above 250 ms; the stages of suppress are one kernel, so that none waits for a launch, beside the shared area
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "detection/nms_panels.cuh"
#include "detection/nms_shapes.h"

namespace torchkiln::nms_shapes {

using namespace torchkiln::nms;

template <class Scalar, int kKind, bool kClasses, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) sort(const Args args) {
  sort_boxes<ShapeKind<Scalar, kKind>, kClasses, kBlockSize>(args);
}

template <class Scalar, int kKind, bool kClasses, int kLanes, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) merge(const Args args) {
  merge_boxes<ShapeKind<Scalar, kKind>, kClasses, kLanes, kBlockSize>(args);
}

template <class Scalar, int kKind, bool kClasses, int kPanel, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) suppress(const Args args) {
  suppress_boxes<ShapeKind<Scalar, kKind>, kClasses, kPanel, kBlockSize>(args);
}

template <class Scalar, int kKind, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) match(const MatchArgs args) {
  using Kind = ShapeKind<Scalar, kKind>;
  const i64 place = (i64(blockIdx.x) * kBlockSize + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (place >= args.n) return;  // the whole warp
  Args inputs = {};
  inputs.boxes = args.boxes;
  inputs.columns = args.columns;
  const auto load_part = [&](i64 row) {
    return participant<Kind>(Kind::load(inputs, row),
                             load(static_cast<const Scalar*>(args.scores)[row]));
  };
  const i64 own_row = args.sorted_rows[place], count = *args.count;
  const auto own = load_part(own_row);
  const auto own_area = Kind::area(own), threshold = typename Kind::T(args.iou_threshold);
  i64 group = 0;
#pragma unroll 1
  for (i64 begin = 0; begin < count; begin += kWarpSize) {
    bool hit = false;
    if (begin + lane < count) {
      const i64 row = args.kept[begin + lane];
      const auto box = load_part(row);
      hit = row == own_row || Kind::exceeds(box, Kind::area(box), own, own_area, threshold);
    }
    const u32 hits = __ballot_sync(kAllLanes, hit);
    if (hits == 0) continue;
    group = begin + __ffs(hits) - 1;
    break;
  }
  if (lane != 0) return;
  args.rows[place] = own_row;
  args.groups[place] = group;
}

}  // namespace torchkiln::nms_shapes
