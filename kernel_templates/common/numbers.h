// Complex numbers, the same functions for real ones so that one template serves both, and elementary functions whose
// loops become vectors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

// Before a short loop of a function that loops over vectors call: only what is unrolled becomes part of them.
#if defined(__CUDACC_RTC__)
#define TORCHKILN_UNROLLED _Pragma("unroll")
#elif defined(__clang__)
#define TORCHKILN_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define TORCHKILN_UNROLLED _Pragma("GCC unroll 32")
#endif

namespace torchkiln {

template <class T>
struct Complex {
  T re, im;
};

template <class V>
struct RealOf {
  using Type = V;
};
template <class T>
struct RealOf<Complex<T>> {
  using Type = T;
};
template <class V>
using Real = typename RealOf<V>::Type;

template <class V>
constexpr bool is_complex_type = sizeof(V) != sizeof(Real<V>);

template <class T>
TORCHKILN_HD Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
TORCHKILN_HD Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
TORCHKILN_HD Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
TORCHKILN_HD Complex<T> operator*(T a, Complex<T> b) {
  return {a * b.re, a * b.im};
}

template <class V, class T>
TORCHKILN_HD V number(T re) {
  if constexpr (is_complex_type<V>) {
    return {Real<V>(re), Real<V>(0)};
  } else {
    return V(re);
  }
}

TORCHKILN_HD float conjugate(float x) { return x; }
TORCHKILN_HD double conjugate(double x) { return x; }
template <class T>
TORCHKILN_HD Complex<T> conjugate(Complex<T> x) {
  return {x.re, -x.im};
}

TORCHKILN_HD float real_part(float x) { return x; }
TORCHKILN_HD double real_part(double x) { return x; }
template <class T>
TORCHKILN_HD T real_part(Complex<T> x) {
  return x.re;
}

// The real part of a * conj(b).
TORCHKILN_HD float inner(float a, float b) { return a * b; }
TORCHKILN_HD double inner(double a, double b) { return a * b; }
template <class T>
TORCHKILN_HD T inner(Complex<T> a, Complex<T> b) {
  return a.re * b.re + a.im * b.im;
}

template <class V>
TORCHKILN_HD V select(bool condition, V a, V b) {
  if constexpr (is_complex_type<V>) {
    return {condition ? a.re : b.re, condition ? a.im : b.im};
  } else {
    return condition ? a : b;
  }
}

// 1 / x, within two units in the last place for float.
TORCHKILN_HD float reciprocal_of(float x) { return fast_quotient(1.0f, x); }
TORCHKILN_HD double reciprocal_of(double x) { return 1.0 / x; }
template <class T>
TORCHKILN_HD Complex<T> reciprocal_of(Complex<T> x) {
  const T scale = reciprocal_of(x.re * x.re + x.im * x.im);
  return {scale * x.re, -scale * x.im};
}

// By quick_reciprocal of `common/types.h`.
template <class T>
TORCHKILN_HD Complex<T> quick_reciprocal(Complex<T> x) {
  const T scale = quick_reciprocal(x.re * x.re + x.im * x.im);
  return {scale * x.re, -scale * x.im};
}

// 2^x without a call, so that loops over it become vectors: relative error 1.2e-7. From 2^-126.5 down it is 0,
// above 2^127.5 infinite.
TORCHKILN_HD float quick_exp2(float x) {
#if defined(__CUDACC_RTC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  // 2^n * 2^f with n, and the bias of an exponent, read from the low bits of a float that is too big for a fraction. The
  // bits of 2^128 are infinity, those of 2^-127 are 0. A minimum of integers is one instruction in every vector, that of
  // floats is not where NaN counts.
  constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23
  constexpr i32 kInfinite = 0x4b4000ff;           // the bits of kShift + 128
  x = x < -127.0f ? -127.0f : x;
  const i32 shifted = min_of(static_cast<i32>(float_bits(x + kShift)), kInfinite);
  const float f = x - (bits_float(static_cast<u32>(shifted)) - kShift);
  float p = 1.5353362e-4f;
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  return p * bits_float(static_cast<u32>(shifted) << 23);
#endif
}

// exp(x) by it: relative error 2e-7 + 1e-7 |x|.
constexpr float kLog2E = 1.4426950408889634f;
TORCHKILN_HD float quick_exp(float x) { return quick_exp2(x * kLog2E); }
TORCHKILN_HD double quick_exp(double x) { return exp_of(x); }
template <class T>
TORCHKILN_HD Complex<T> quick_exp(Complex<T> x) {
  T sine, cosine;
  sin_cos_of(x.im, sine, cosine);
  return quick_exp(x.re) * Complex<T>{cosine, sine};
}

// exp(x * rate), where many x share a rate: the factor of the base is multiplied into that.
template <class T, class V>
TORCHKILN_HD V quick_exp_of_product(T x, V rate) {
  return quick_exp(x * rate);
}
TORCHKILN_HD float quick_exp_of_product(float x, float rate) {
  return quick_exp2(x * (rate * kLog2E));
}

// log(1 + e) for e in [0, 1]: relative error 3e-8.
TORCHKILN_HD float quick_log1p(float e) {
  float p = 5.2326941e-3f;
  p = p * e - 2.9505237e-2f;
  p = p * e + 7.8225955e-2f;
  p = p * e - 1.3663246e-1f;
  p = p * e + 1.9106007e-1f;
  p = p * e - 2.4842982e-1f;
  p = p * e + 3.3319098e-1f;
  p = p * e - 4.9999493e-1f;
  p = p * e + 9.9999994e-1f;
  return p * e;
}
TORCHKILN_HD double quick_log1p(double e) {
#if defined(__CUDACC_RTC__)
  return ::log1p(e);
#else
  return __builtin_log1p(e);
#endif
}

template <class T>
TORCHKILN_HD T softplus_of(T x) {
  return (x < T(0) ? T(0) : x) + quick_log1p(quick_exp(x < T(0) ? x : -x));
}
template <class T>
TORCHKILN_HD T sigmoid_of(T x) {
  const T e = quick_exp(x < T(0) ? x : -x), large = reciprocal_of(T(1) + e);
  return x < T(0) ? e * large : large;
}
#if defined(__CUDACC_RTC__)
// The reciprocal of infinity is 0 there, as small results are.
TORCHKILN_HD float sigmoid_of(float x) { return quick_reciprocal(1.0f + quick_exp(-x)); }
#endif

}  // namespace torchkiln
