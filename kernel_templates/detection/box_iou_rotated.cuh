// Overlaps of rotated shapes on the GPU. Of a model's pairs few touch, and those cost twenty times the others: each warp
// writes the others at once and collects those that touch until it has one for every lane.
// spills: on sm_75 one register under mmcv's rules, whose candidates lie in local memory in any case
// compile time: mmcv's rules sort 24 candidates, and float64 has its sines by tables
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "detection/box_iou_rotated.h"

namespace torchkiln::box_iou_rotated {

// Grid: one-dimensional; a block takes kBlockSize shapes of the second set and kRows of the first one.
template <class Scalar, int kForm, int kMode, int kBlockSize, int kRows>
__global__ void __launch_bounds__(kBlockSize) pairs(const Args args) {
  using T = Acc<Scalar>;
  using Shape = ShapeOf<kForm, Scalar>;
  static_assert(kRows <= kBlockSize && kRows * kBlockSize <= 65536);
  constexpr u32 kAll = 0xffffffffu;
  __shared__ Shape shapes[kRows + kBlockSize];
  // A pair is its row and column in the tile; less than a warp of them is left when the next ones come.
  __shared__ u16 queues[kBlockSize / kWarpSize][2 * kWarpSize];

  const u32 tiles = u32((args.m + kBlockSize - 1) / kBlockSize);
  const u32 tile = blockIdx.x / tiles;
  const i64 first_row = i64(tile) * kRows;
  const i64 first_column = i64(blockIdx.x - tile * tiles) * kBlockSize;
  const int height = int(min_of(args.n - first_row, i64(kRows)));
  const int thread = int(threadIdx.x), lane = thread % kWarpSize;
  const bool inside = first_column + thread < args.m;
  const Shape *rows = shapes, *columns = shapes + kRows;
#pragma unroll 1
  for (int i = thread; i < kRows + kBlockSize; i += kBlockSize) {
    const bool is_row = i < kRows;
    const i64 index = is_row ? first_row + i : first_column + (i - kRows);
    if (index >= (is_row ? args.n : args.m)) continue;
    const void* boxes = is_row ? args.boxes1 : args.boxes2;
    shapes[i] = load_shape<kForm>(static_cast<const Scalar*>(boxes), index, args.turn);
  }
  __syncthreads();

  u16* queue = queues[thread / kWarpSize];
  Scalar* out = static_cast<Scalar*>(args.out) + first_row * args.m + first_column;
  const Shape own = columns[thread];  // all that is used of it are three numbers
  int waiting = 0;
#pragma unroll 1
  for (int row = 0; row <= height; ++row) {
    if (row < height) {
      T value;
      const bool far = inside && apart(rows[row], own, value);
      if (far) store(out[row * args.m + thread], value);
      const u32 touching = __ballot_sync(kAll, inside && !far);
      if (inside && !far) {
        queue[waiting + __popc(touching & ((1u << lane) - 1u))] = u16(row * kBlockSize + thread);
      }
      waiting += __popc(touching);
    }
    __syncwarp();
    if (waiting < kWarpSize && row < height) continue;
    const int taken = min_of(waiting, kWarpSize);
    waiting -= taken;
    if (lane < taken) {
      const int pair = queue[waiting + lane];
      const Shape &a = rows[pair / kBlockSize], &b = columns[pair % kBlockSize];
      store(out[pair / kBlockSize * args.m + pair % kBlockSize],
            value_of<kMode>(a, b, shared_area(a, b)));
    }
    __syncwarp();
  }
}

// One thread for each row of both sets.
template <class Scalar, int kForm, int kMode, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) aligned(const Args args) {
  const i64 i = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (i >= args.n) return;
  const auto a = load_shape<kForm>(static_cast<const Scalar*>(args.boxes1), i, args.turn);
  const auto b = load_shape<kForm>(static_cast<const Scalar*>(args.boxes2), i, args.turn);
  store(static_cast<Scalar*>(args.out)[i], value_of<kMode>(a, b, shared_area(a, b)));
}

}  // namespace torchkiln::box_iou_rotated
