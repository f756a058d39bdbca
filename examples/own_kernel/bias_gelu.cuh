// y = gelu(x + bias) * mask * scale, and its gradients, in one pass each. x is (rows, columns), row by row, and bias has
// one value for each column. A thread owns kVector neighbouring columns, of which it keeps the bias in registers, and
// walks down some rows; neighbouring threads own neighbouring columns, so that each access is coalesced.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"

namespace bias_gelu {

using namespace torchkiln;

// Cumulative distribution and density of the normal distribution: gelu(v) = v * cdf, and its slope is
// cdf + v * density.
template <class T>
struct Normal {
  T cdf, density;
};

__device__ __forceinline__ Normal<double> normal(double v) {
  return {0.5 * (1 + erf(v * 0.70710678118654752)), 0.39894228040143268 * exp(-0.5 * v * v)};
}
__device__ __forceinline__ Normal<float> normal(float v) {
  return {0.5f * (1 + erff(v * 0.70710678f)), 0.39894228f * expf(-0.5f * v * v)};
}
// For the half types, right to 1e-7 (Abramowitz and Stegun 7.1.26): erff takes longer than their few bytes.
__device__ __forceinline__ Normal<float> quick_normal(float v) {
  const float e = __expf(-0.5f * v * v);
  const float t = __fdividef(1.f, 1.f + 0.23164189f * fabsf(v));
  const float series =
      t *
      (0.12741480f + t * (-0.14224837f + t * (0.71070687f + t * (-0.72657602f + t * 0.53070271f))));
  const float tail = series * e;
  return {v < 0 ? tail : 1 - tail, 0.39894228f * e};
}
template <class Scalar>
__device__ __forceinline__ Normal<Acc<Scalar>> normal_of(Acc<Scalar> v) {
  if constexpr (sizeof(Scalar) == 2) {
    return quick_normal(v);
  } else {
    return normal(v);
  }
}

// The thread's first column and the strip of rows that it walks down. There are fewer than 2^32 threads: a division of
// 64 bits would take as long as the rest.
template <int kVector, int kBlockSize>
struct Place {
  i64 column, strip;
  __device__ __forceinline__ explicit Place(i64 columns) {
    const u32 packs = u32(columns / kVector);
    const u32 thread = blockIdx.x * kBlockSize + threadIdx.x;
    strip = thread / packs;
    column = i64(thread % packs) * kVector;
  }
};

// The bias of the thread's columns, widened once.
template <class Scalar, int kVector>
struct Bias {
  Acc<Scalar> at[kVector];
  __device__ __forceinline__ explicit Bias(const Scalar* from) {
    const auto narrow = load_pack<kVector>(from);
#pragma unroll
    for (int i = 0; i < kVector; ++i) at[i] = load(narrow.at[i]);
  }
};

// kRows packs are loaded before the first one is used. kAligned: each row begins at a multiple of 16 bytes.
template <class Scalar, bool kAligned, int kVector, int kBlockSize, int kRows>
__global__ void __launch_bounds__(kBlockSize)
    forward(const Scalar* __restrict__ x, const Scalar* __restrict__ bias,
            const u8* __restrict__ mask, Scalar* __restrict__ y, i64 rows, i64 columns,
            double scale) {
  static_assert(kAligned || kVector == 1);
  using T = Acc<Scalar>;
  const Place<kVector, kBlockSize> place(columns);
  const i64 first = place.strip * kRows;
  if (first >= rows) return;
  const Bias<Scalar, kVector> b(bias + place.column);
  Pack<Scalar, kVector> values[kRows];
  Pack<u8, kVector> kept[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const i64 at = min_of(first + r, rows - 1) * columns + place.column;
    values[r] = load_pack<kVector>(x + at);
    kept[r] = load_pack<kVector>(mask + at);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const T v = load(values[r].at[i]) + b.at[i];
      const T factor = kept[r].at[i] ? T(scale) : T(0);
      store(values[r].at[i], v * normal_of<Scalar>(v).cdf * factor);
    }
    if (first + r < rows) store_pack(y + (first + r) * columns + place.column, values[r]);
  }
}

// Also writes the sum of grad_x over each strip of rows, (strips, columns). A strip belongs to one thread whatever the
// tunables are, so that the gradient of the bias has the same bits every time.
template <class Scalar, class Sum, bool kAligned, int kVector, int kBlockSize, int kRows>
__global__ void __launch_bounds__(kBlockSize)
    backward(const Scalar* __restrict__ grad_y, const Scalar* __restrict__ x,
             const Scalar* __restrict__ bias, const u8* __restrict__ mask,
             Scalar* __restrict__ grad_x, Sum* __restrict__ sums, i64 rows, i64 columns,
             i64 strip_rows, double scale) {
  static_assert(kAligned || kVector == 1);
  using T = Acc<Scalar>;
  const Place<kVector, kBlockSize> place(columns);
  const i64 first = place.strip * strip_rows;
  if (first >= rows) return;
  const i64 end = min_of(first + strip_rows, rows);
  const Bias<Scalar, kVector> b(bias + place.column);
  Sum sum[kVector] = {};
#pragma unroll 1
  for (i64 row = first; row < end; row += kRows) {
    Pack<Scalar, kVector> values[kRows], grads[kRows];
    Pack<u8, kVector> kept[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const i64 at = min_of(row + r, end - 1) * columns + place.column;
      values[r] = load_pack<kVector>(x + at);
      grads[r] = load_pack<kVector>(grad_y + at);
      kept[r] = load_pack<kVector>(mask + at);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= end) break;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const T v = load(values[r].at[i]) + b.at[i];
        const Normal<T> n = normal_of<Scalar>(v);
        const T factor = kept[r].at[i] ? T(scale) : T(0);
        const T grad = load(grads[r].at[i]) * factor * (n.cdf + v * n.density);
        sum[i] += grad;
        store(grads[r].at[i], grad);
      }
      store_pack(grad_x + (row + r) * columns + place.column, grads[r]);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[place.strip * columns + place.column + i] = sum[i];
}

}  // namespace bias_gelu
