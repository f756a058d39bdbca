// box_iou on the GPU. Forward: one thread keeps kVector neighbouring boxes of the second set and walks over rows; what
// it writes is one vector, and the row's box comes from one broadcast load. Backward: one block owns one box and sums
// over the other set in a fixed order: no atomics, and the same bits every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "detection/box_iou.h"

namespace torchkiln::box_iou {

// A box, as one or two loads where kAligned says that rows begin at 16 bytes, or at their own size.
template <bool kAligned, class Scalar>
__device__ __forceinline__ Box<Acc<Scalar>> fetch_box(const Scalar* boxes, i64 index,
                                                      double offset) {
  if constexpr (!kAligned) return load_box(boxes, index, offset);
  constexpr int kWidth = sizeof(Scalar) == 8 ? 2 : 4;
  Scalar row[4];
#pragma unroll
  for (int i = 0; i < 4; i += kWidth) {
    const Pack<Scalar, kWidth> part = load_pack<kWidth>(boxes + 4 * index + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) row[i + j] = part.at[j];
  }
  return load_box(row, 0, offset);
}

// Grid: one-dimensional; thread i takes vector i % (m / kVector) of the columns, and every row_step-th row, which is how
// many the grid covers at once. kVector > 1: all pointers are aligned to 16 bytes.
template <class Scalar, int kMode, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  constexpr bool kAligned = kVector > 1;
  const Scalar* boxes1 = static_cast<const Scalar*>(args.boxes1);
  const i64 vectors = args.m / kVector;
  const i64 item = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i64 row_step = i64(gridDim.x) * kBlockSize / vectors;
  if (item >= row_step * vectors) return;
  const i64 first_row = item / vectors, column = (item - first_row * vectors) * kVector;
  Box<T> others[kVector];
  T areas[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    others[i] =
        fetch_box<kAligned>(static_cast<const Scalar*>(args.boxes2), column + i, args.offset);
    areas[i] = area(others[i]);
  }
  Scalar* out = static_cast<Scalar*>(args.out) + first_row * args.m + column;
  Box<T> next = fetch_box<kAligned>(boxes1, min_of(first_row, args.n - 1), args.offset);
#pragma unroll 1
  for (i64 row = first_row; row < args.n; row += row_step, out += row_step * args.m) {
    const Box<T> box = next;
    // Its latency is the longest here.
    next = fetch_box<kAligned>(boxes1, min_of(row + row_step, args.n - 1), args.offset);
    const T own_area = area(box);
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      store(result.at[i],
            element<kMode>(box, own_area, others[i], areas[i], T(args.eps), T(args.offset)));
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
  const Box<T> box = load_box(static_cast<const Scalar*>(args.boxes), row, args.offset);
  Box<T> grad = {T(0), T(0), T(0), T(0)};
#pragma unroll 1  // unrolled four times it takes twice as long to compile and runs no faster
  for (i64 column = threadIdx.x; column < args.m; column += kBlockSize) {
    const T gradient = load(grad_output[row * args.row_stride + column * args.column_stride]);
    const Box<T> other = load_box(others, column, args.offset);
    add_gradient<kMode>(box, other, T(args.eps), gradient, grad);
  }
  const Box<T> sums = {
      block_sum<kBlockSize>(grad.x1, partial), block_sum<kBlockSize>(grad.y1, partial),
      block_sum<kBlockSize>(grad.x2, partial), block_sum<kBlockSize>(grad.y2, partial)};
  if (threadIdx.x == 0) store_box(static_cast<Scalar*>(args.grad_boxes), row, sums);
}

// Row against row: one thread, one pair.
template <class Scalar, int kMode, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) aligned(const Args args) {
  using T = Acc<Scalar>;
  const i64 row = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (row >= args.n) return;
  const Box<T> box1 = load_box(static_cast<const Scalar*>(args.boxes1), row, args.offset);
  const Box<T> box2 = load_box(static_cast<const Scalar*>(args.boxes2), row, args.offset);
  store(static_cast<Scalar*>(args.out)[row],
        element<kMode>(box1, box2, T(args.eps), T(args.offset)));
}

template <class Scalar, int kMode, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) aligned_backward(const AlignedBackwardArgs args) {
  using T = Acc<Scalar>;
  const i64 row = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (row >= args.n) return;
  const Box<T> box1 = load_box(static_cast<const Scalar*>(args.boxes1), row, args.offset);
  const Box<T> box2 = load_box(static_cast<const Scalar*>(args.boxes2), row, args.offset);
  const T gradient = load(static_cast<const Scalar*>(args.grad_output)[row * args.stride]);
  Box<T> grad1 = {T(0), T(0), T(0), T(0)}, grad2 = grad1;
  add_gradient<kMode>(box1, box2, T(args.eps), gradient, grad1);
  add_gradient<exchanged(kMode)>(box2, box1, T(args.eps), gradient, grad2);
  store_box(static_cast<Scalar*>(args.grad_boxes1), row, grad1);
  store_box(static_cast<Scalar*>(args.grad_boxes2), row, grad2);
}

}  // namespace torchkiln::box_iou
