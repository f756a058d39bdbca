// box_iou on the GPU. Forward: one thread keeps kVector neighbouring boxes of the second set and walks over rows; what
// it writes is one vector, and the row's box comes from one broadcast load. Backward: one block owns one box and sums
// over the other set in a fixed order: no atomics, and the same bits every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "detection/box_iou.h"

namespace torchkiln::box_iou {

// Grid: one-dimensional; thread i takes vector i % (m / kVector) of the columns, and every gridDim-th row.
template <class Scalar, int kMode, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  const Scalar* boxes1 = static_cast<const Scalar*>(args.boxes1);
  const i64 vectors = args.m / kVector;
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i64 row_step = i64(gridDim.x) * kBlockSize / vectors;
  if (item >= row_step * vectors) return;
  const i64 first_row = item / vectors, column = (item - first_row * vectors) * kVector;
  Box<T> others[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    others[i] = load_box(static_cast<const Scalar*>(args.boxes2), column + i);
  }
  Scalar* out = static_cast<Scalar*>(args.out) + first_row * args.m + column;
  Box<T> next = load_box(boxes1, min_of(first_row, args.n - 1));
#pragma unroll 1
  for (i64 row = first_row; row < args.n; row += row_step, out += row_step * args.m) {
    const Box<T> box = next;
    next = load_box(boxes1, min_of(row + row_step, args.n - 1));  // its latency is the longest here
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      store(result.at[i], element<kMode>(box, others[i], T(args.eps)));
    }
    store_pack<kVector>(out, result);
  }
}

template <class Scalar, int kMode, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) backward(const BackwardArgs args) {
  using T = Acc<Scalar>;
  __shared__ T partial[kBlockSize / kWarpSize];
  const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output);
  const Scalar* others = static_cast<const Scalar*>(args.others);
  const i64 row = blockIdx.x;
  const Box<T> box = load_box(static_cast<const Scalar*>(args.boxes), row);
  Box<T> grad = {T(0), T(0), T(0), T(0)};
#pragma unroll 1  // unrolled four times it takes twice as long to compile and runs no faster
  for (i64 column = threadIdx.x; column < args.m; column += kBlockSize) {
    const T gradient = load(grad_output[row * args.row_stride + column * args.column_stride]);
    add_gradient<kMode>(box, load_box(others, column), T(args.eps), gradient, grad);
  }
  const T sums[4] = {
      block_sum<kBlockSize>(grad.x1, partial), block_sum<kBlockSize>(grad.y1, partial),
      block_sum<kBlockSize>(grad.x2, partial), block_sum<kBlockSize>(grad.y2, partial)};
  if (threadIdx.x != 0) return;
  Scalar* grad_boxes = static_cast<Scalar*>(args.grad_boxes) + 4 * row;
  for (int i = 0; i < 4; ++i) store(grad_boxes[i], sums[i]);
}

}  // namespace torchkiln::box_iou
