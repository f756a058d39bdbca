// box_iou on the GPU. Forward: one thread computes one pair, neighbouring threads neighbouring columns, so stores are
// coalesced and the row's box comes from one broadcast load. Backward: one block owns one box and sums over the other
// set in a fixed order: no atomics, and the same bits every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/reduce.cuh"
#include "detection/box_iou.h"

namespace torchkiln::box_iou {

template <class Scalar, int kMode, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  const Scalar* boxes1 = static_cast<const Scalar*>(args.boxes1);
  const Scalar* boxes2 = static_cast<const Scalar*>(args.boxes2);
  Scalar* out = static_cast<Scalar*>(args.out);
  const i64 column = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (column >= args.m) return;
  const Box<T> other = load_box(boxes2, column);
  // Rows go over y and then loop: a grid has at most 65535 blocks in y.
  for (i64 row = blockIdx.y; row < args.n; row += gridDim.y) {
    store(out[row * args.m + column], element<kMode>(load_box(boxes1, row), other, T(args.eps)));
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
