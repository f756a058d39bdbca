// sigmoid_focal_loss on the GPU: one pass over the logits. One thread takes kItems vectors of kVector neighbouring
// logits at a time, a grid apart, so loads and stores are coalesced and 16 bytes wide. Summing launches leave one
// partial sum per block, which `finish` adds in a fixed order: no atomics, and the same bits every time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "detection/sigmoid_focal_loss.h"

namespace torchkiln::sigmoid_focal_loss {

// A vector's row, and its place in the row. It moves by whole grids: two additions instead of a division.
template <class Index>
struct Position {
  Index row, column;
  __device__ __forceinline__ void advance(const Position& step, Index columns) {
    row += step.row;
    column += step.column;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
};

// Loss and gradient of kVector neighbouring elements.
template <class Scalar, class Index, bool kLabels, int kGamma, int kVector>
__device__ __forceinline__ void vector_terms(const Args& args, const Pack<Scalar, kVector>& x,
                                             Index offset, const Position<Index>& position,
                                             Terms<Acc<Scalar>>* out) {
  using T = Acc<Scalar>;
  const T positive = T(args.positive), negative = T(args.negative), gamma = T(args.gamma);
  if constexpr (kLabels) {
    const i64 label = static_cast<const i64*>(args.targets)[position.row];
    const i64 hit = label - i64(position.column) * kVector;
    T weight = T(1);
    if (args.weight != nullptr && label >= 0 && label < args.columns) {
      weight = load(static_cast<const Scalar*>(args.weight)[label]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool is_positive = hit == i;
      const T sign = is_positive ? T(-1) : T(1);
      const T factor = weight * (is_positive ? positive : negative);
      const Terms<T> terms = negative_terms<kGamma>(sign * load(x.at[i]), gamma);
      out[i] = {factor * terms.loss, factor * sign * terms.gradient};
    }
  } else {
    const auto t = load_pack<kVector>(static_cast<const Scalar*>(args.targets) + offset);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      out[i] = soft_terms<kGamma>(T(load(x.at[i])), T(load(t.at[i])), positive, negative, gamma);
    }
  }
}

// Writes what kOutput asks for and returns the sum of the losses.
template <class Scalar, class Index, int kOutput, int kVector>
__device__ __forceinline__ Acc<Scalar> emit(const Args& args, Index offset,
                                            const Terms<Acc<Scalar>>* terms) {
  using T = Acc<Scalar>;
  T sum = T(0), grad[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    sum += terms[i].loss;
    grad[i] = terms[i].gradient;
  }
  if constexpr (kOutput == kGradient) {
    const Scalar* grad_output = static_cast<const Scalar*>(args.grad_output);
    if (args.grad_output_is_one) {
      const T factor = load(grad_output[0]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) grad[i] *= factor;
    } else {
      const auto factors = load_pack<kVector>(grad_output + offset);
#pragma unroll
      for (int i = 0; i < kVector; ++i) grad[i] *= load(factors.at[i]);
    }
  }
  Pack<Scalar, kVector> result;
  if constexpr (kOutput == kElements) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(result.at[i], terms[i].loss);
    store_pack(static_cast<Scalar*>(args.loss) + offset, result);
  } else if (kOutput == kGradient || args.gradient != nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(result.at[i], grad[i]);
    store_pack(static_cast<Scalar*>(args.gradient) + offset, result);
  }
  return sum;
}

// The factors of the two classes carry the scale, so that it costs nothing per element.
__device__ __forceinline__ Args scaled(Args args) {
  args.positive *= args.scale;
  args.negative *= args.scale;
  return args;
}

// Walks this thread's vectors; returns the sum of their losses.
template <class Scalar, class Index, bool kLabels, int kGamma, int kOutput, int kVector,
          int kBlockSize, int kItems>
__device__ __forceinline__ Acc<Scalar> walk(const Args& args) {
  using T = Acc<Scalar>;
  const Scalar* inputs = static_cast<const Scalar*>(args.inputs);
  const Index columns = Index(args.columns / kVector);
  const Index count = Index(args.rows) * columns;
  const Index stride = Index(gridDim.x) * kBlockSize;
  Index index = Index(blockIdx.x) * kBlockSize + Index(threadIdx.x);
  Position<Index> position = {0, 0}, step = {0, 0};
  if (kLabels) {
    const auto place_of = [&](Index item) -> Position<Index> {
      const Index row = divided(item, columns);
      return {row, item - row * columns};
    };
    position = place_of(index);
    step = place_of(stride);
  }
  T sum = T(0);
#pragma unroll 1
  while (index < count) {
    Pack<Scalar, kVector> x[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k == 0 || index < count - k * stride) {
        x[k] = load_pack<kVector>(inputs + (index + k * stride) * kVector);
      }
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k > 0 && index >= count) break;
      Terms<T> terms[kVector];
      vector_terms<Scalar, Index, kLabels, kGamma>(args, x[k], index * kVector, position, terms);
      sum += emit<Scalar, Index, kOutput, kVector>(args, index * kVector, terms);
      index += stride;
      if (kLabels) position.advance(step, columns);
    }
  }
  return sum;
}

template <class Scalar, class Index, bool kLabels, int kGamma, int kOutput, int kVector,
          int kBlockSize, int kItems>
__global__ void __launch_bounds__(kBlockSize) forward(const Args args) {
  using T = Acc<Scalar>;
  __shared__ T shared[kBlockSize / kWarpSize];
  T sum = walk<Scalar, Index, kLabels, kGamma, kOutput, kVector, kBlockSize, kItems>(scaled(args));
  if constexpr (kOutput == kElements) return;
  sum = block_sum<kBlockSize>(sum, shared);
  if (threadIdx.x != 0) return;
  T* partials = static_cast<T*>(args.partials);
  partials[blockIdx.x] = sum;
  for (int i = blockIdx.x + gridDim.x; i < kMaxBlocks; i += gridDim.x) partials[i] = T(0);
}

template <class Scalar, class Index, bool kLabels, int kGamma, int kVector, int kBlockSize,
          int kItems>
__global__ void __launch_bounds__(kBlockSize) backward(const Args args) {
  walk<Scalar, Index, kLabels, kGamma, kGradient, kVector, kBlockSize, kItems>(scaled(args));
}

// One block. In float64: a thousand partial sums must not lose what the threads kept.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) finish(const FinishArgs args) {
  using T = Acc<Scalar>;
  __shared__ double shared[kBlockSize / kWarpSize];
  const T* partials = static_cast<const T*>(args.partials);
  double sum = 0.0;
#pragma unroll 4
  for (int i = threadIdx.x; i < kMaxBlocks; i += kBlockSize) sum += partials[i];
  sum = block_sum<kBlockSize>(sum, shared);
  if (threadIdx.x == 0) store(*static_cast<Scalar*>(args.loss), T(sum));
}

// Nothing to do for the usual factor, 1: only the device knows it, and asking would stop the host.
template <class Scalar, int kVector, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) scale(const ScaleArgs args) {
  using T = Acc<Scalar>;
  const T factor = load(*static_cast<const Scalar*>(args.grad_output));
  if (factor == T(1)) return;
  Scalar* gradient = static_cast<Scalar*>(args.gradient);
  const i64 stride = i64(gridDim.x) * kBlockSize * kVector;
#pragma unroll 1
  for (i64 i = (i64(blockIdx.x) * kBlockSize + threadIdx.x) * kVector; i < args.numel;
       i += stride) {
    Pack<Scalar, kVector> values;
#pragma unroll
    for (int k = 0; k < kVector; ++k) store(values.at[k], T(load(gradient[i + k]) * factor));
    store_pack(gradient + i, values);
  }
}

}  // namespace torchkiln::sigmoid_focal_loss
