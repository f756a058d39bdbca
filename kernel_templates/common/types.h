// Basic types and maths for code that g++, clang++ and NVRTC all compile without any system header. Half types are
// storage only: load them into their accumulator type, compute, and store.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#if defined(__CUDACC_RTC__)
#define TORCHKILN_HD __device__ __forceinline__
// For rare or long code that is called in several places: compiled once instead of once per call.
#define TORCHKILN_HD_CALLED __device__ __noinline__
// Before a loop whose body is long: compiled once instead of once per turn.
#define TORCHKILN_ROLLED _Pragma("unroll 1")
#else
#define TORCHKILN_ROLLED
#define TORCHKILN_HD inline
#define TORCHKILN_HD_CALLED inline
#endif

namespace torchkiln {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

struct half {
  u16 bits;
};
struct bfloat16 {
  u16 bits;
};

// The type that sums and geometry are computed in.
template <class Scalar>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class Scalar>
using Acc = typename AccumulatorOf<Scalar>::Type;

TORCHKILN_HD u32 float_bits(float x) {
#if defined(__CUDACC_RTC__)
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(u32, x);
#endif
}

TORCHKILN_HD float bits_float(u32 bits) {
#if defined(__CUDACC_RTC__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

TORCHKILN_HD u64 double_bits(double x) {
#if defined(__CUDACC_RTC__)
  return u64(__double_as_longlong(x));
#else
  return __builtin_bit_cast(u64, x);
#endif
}

TORCHKILN_HD double bits_double(u64 bits) {
#if defined(__CUDACC_RTC__)
  return __longlong_as_double(i64(bits));
#else
  return __builtin_bit_cast(double, bits);
#endif
}

TORCHKILN_HD float to_float(half x) {
#if defined(__CUDACC_RTC__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  // Scaling by 2^112 moves the half exponent into the float range and makes subnormals exact without a branch.
  const u32 sign = u32(x.bits & 0x8000u) << 16;
  const u32 magnitude = u32(x.bits & 0x7fffu) << 13;
  const float scaled = bits_float(magnitude) * 0x1p112f;
  const u32 special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u | magnitude : float_bits(scaled);
  return bits_float(sign | special);
#endif
}

TORCHKILN_HD half to_half(float x) {
  half result;
#if defined(__CUDACC_RTC__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
  const u32 bits = float_bits(x);
  const u32 sign = (bits >> 16) & 0x8000u;
  const u32 magnitude = bits & 0x7fffffffu;
  u32 rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    rounded = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float unit round to nearest even at the right bit.
    rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  result.bits = u16(sign | rounded);
#endif
  return result;
}

TORCHKILN_HD float to_float(bfloat16 x) { return bits_float(u32(x.bits) << 16); }

// To the nearest, ties to even.
TORCHKILN_HD bfloat16 to_bfloat16(float x) {
  bfloat16 result;
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
  const u32 bits = float_bits(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result.bits = u16(is_nan ? 0x7fc0u : rounded);
#endif
  return result;
}

TORCHKILN_HD float load(float x) { return x; }
TORCHKILN_HD double load(double x) { return x; }
TORCHKILN_HD float load(half x) { return to_float(x); }
TORCHKILN_HD float load(bfloat16 x) { return to_float(x); }

TORCHKILN_HD void store(float& to, float x) { to = x; }
TORCHKILN_HD void store(double& to, double x) { to = x; }
TORCHKILN_HD void store(half& to, float x) { to = to_half(x); }
TORCHKILN_HD void store(bfloat16& to, float x) { to = to_bfloat16(x); }

// NaN in either operand gives b, so an accumulator that starts finite must stand on the right.
template <class T>
TORCHKILN_HD T max_of(T a, T b) {
  return a > b ? a : b;
}
template <class T>
TORCHKILN_HD T min_of(T a, T b) {
  return a < b ? a : b;
}
// A product that is rounded before anything is added to it. The GPU compiler fuses plain ones, so what decides (inside or
// outside, which cell, how many samples, on which side) is made of these: the same bits on CPU and GPU.
TORCHKILN_HD float rounded_product(float a, float b) {
#if defined(__CUDACC_RTC__) || defined(TORCHKILN_EMULATED_GPU)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
TORCHKILN_HD double rounded_product(double a, double b) {
#if defined(__CUDACC_RTC__) || defined(TORCHKILN_EMULATED_GPU)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

#if defined(__CUDACC_RTC__)
#define TORCHKILN_MATH(name) ::name
#else
#define TORCHKILN_MATH(name) __builtin_##name
#endif

// a * b + c, rounded once.
TORCHKILN_HD float fused(float a, float b, float c) { return TORCHKILN_MATH(fmaf)(a, b, c); }
TORCHKILN_HD double fused(double a, double b, double c) { return TORCHKILN_MATH(fma)(a, b, c); }

TORCHKILN_HD bool is_nan(float x) { return !(x == x); }
TORCHKILN_HD bool is_nan(double x) { return !(x == x); }

// a * b - c * d to about one unit in the last place, however much of it cancels: what the second product loses by rounding
// is given back. Exactly 0 for equal products.
template <class T>
TORCHKILN_HD T difference_of_products(T a, T b, T c, T d) {
  const T second = rounded_product(c, d);
  return fused(a, b, -second) - fused(c, d, -second);
}
#if !defined(__CUDACC_RTC__) && !defined(TORCHKILN_EMULATED_GPU)
// Of a processor that may have no such instruction; float64 has digits to spare.
template <>
inline float difference_of_products(float a, float b, float c, float d) {
  return static_cast<float>(double(a) * double(b) - double(c) * double(d));
}
template <>
inline double difference_of_products(double a, double b, double c, double d) {
  return a * b - c * d;
}
#endif

// n / d for n up to 1025 * d and d up to 1024, out of 1 / d: a division costs twenty instructions. With the half, the
// quotient keeps 0.5 / 1024 away from every integer, four times what rounding can move it.
TORCHKILN_HD i32 quotient(i32 n, float inverse) {
  return i32((static_cast<float>(n) + 0.5f) * inverse);
}

// 1 / x to six digits; on the GPU infinite or 0 where that has no normal exponent.
TORCHKILN_HD double rough_reciprocal(double x) {
#if defined(__CUDACC_RTC__)
  double inverse;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(inverse) : "d"(x));
  return inverse;
#else
  return 1 / x;
#endif
}

// n / d for n from 0 to 2^50 and d from 1: the machine divides no integers, and those of 64 bits in a hundred instructions.
TORCHKILN_HD i32 divided(i32 n, i32 d) { return i32(u32(n) / u32(d)); }
TORCHKILN_HD i64 divided(i64 n, i64 d) {
#if defined(__CUDACC_RTC__)
  const double divisor = double(d);
  double inverse = rough_reciprocal(divisor);
#pragma unroll
  for (int step = 0; step < 2; ++step) {  // from 20 digits to all
    inverse = __fma_rn(__fma_rn(-divisor, inverse, 1.0), inverse, inverse);
  }
  const i64 quotient = i64(double(n) * inverse), rest = n - quotient * d;
  return quotient + (rest < 0 ? -1 : rest < d ? 0 : 1);
#else
  return n / d;
#endif
}

// a / b within two units in the last place, over the full range: the exact division takes a call when a is 0.
TORCHKILN_HD float fast_quotient(float a, float b) {
#if defined(__CUDACC_RTC__)
  float result;
  asm("div.full.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a / b;
#endif
}
TORCHKILN_HD double fast_quotient(double a, double b) { return a / b; }

// 1 / x within two units in the last place where that is no smaller than the least normal number, and x is none of those
// below that.
TORCHKILN_HD float quick_reciprocal(float x) {
#if defined(__CUDACC_RTC__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1 / x;
#endif
}
TORCHKILN_HD double quick_reciprocal(double x) { return 1 / x; }

// a / b within half a unit and a little, over the full range: one step of Newton's method. Half of what the exact division
// costs, and no call.
TORCHKILN_HD float close_quotient(float a, float b) {
#if defined(__CUDACC_RTC__)
  const float inverse = quick_reciprocal(b), quotient = fast_quotient(a, b);
  const float result = __fmaf_rn(__fmaf_rn(-quotient, b, a), inverse, quotient);
  // What is infinite or not a number has no rounding that a step could mend.
  return result - result == 0.0f ? result : quotient;
#else
  return a / b;
#endif
}
TORCHKILN_HD double close_quotient(double a, double b) { return a / b; }

// a / count of a finite number, by the same step but without what takes care of a range that is large or small: half a
// dozen instructions, and the bits of the exact division up to a count of 2^18 where the quotient is a normal number.
// Exact because such a quotient stays further away from the middle between two floats than the step from either.
TORCHKILN_HD float count_quotient(float a, float count) {
#if defined(__CUDACC_RTC__)
  const float inverse = quick_reciprocal(count), quotient = a * inverse;
  return __fmaf_rn(__fmaf_rn(-quotient, count, a), inverse, quotient);
#else
  return a / count;
#endif
}
TORCHKILN_HD double count_quotient(double a, double count) { return a / count; }

TORCHKILN_HD float floor_of(float x) { return TORCHKILN_MATH(floorf)(x); }
TORCHKILN_HD double floor_of(double x) { return TORCHKILN_MATH(floor)(x); }
TORCHKILN_HD float ceil_of(float x) { return TORCHKILN_MATH(ceilf)(x); }
TORCHKILN_HD double ceil_of(double x) { return TORCHKILN_MATH(ceil)(x); }
TORCHKILN_HD float exp_of(float x) { return TORCHKILN_MATH(expf)(x); }
TORCHKILN_HD double exp_of(double x) { return TORCHKILN_MATH(exp)(x); }
TORCHKILN_HD float atan2_of(float y, float x) { return TORCHKILN_MATH(atan2f)(y, x); }
TORCHKILN_HD double atan2_of(double y, double x) { return TORCHKILN_MATH(atan2)(y, x); }
TORCHKILN_HD float sqrt_of(float x) { return TORCHKILN_MATH(sqrtf)(x); }
TORCHKILN_HD double sqrt_of(double x) { return TORCHKILN_MATH(sqrt)(x); }
TORCHKILN_HD float abs_of(float x) { return TORCHKILN_MATH(fabsf)(x); }
TORCHKILN_HD double abs_of(double x) { return TORCHKILN_MATH(fabs)(x); }
TORCHKILN_HD void sin_cos_of(float x, float& sine, float& cosine) {
#if defined(__CUDACC_RTC__)
  // Quarter turns are taken off in two steps, the first of them exact up to millions of turns; so it needs no tables, and
  // is half as long to compile as the library's.
  const float quarters = ::rintf(x * 0.636619772f);
  const i32 quarter = static_cast<i32>(quarters);
  float r = __fmaf_rn(quarters, 4.37113883e-8f, __fmaf_rn(quarters, -1.57079637f, x));
  // An angle without a digit behind the point is any angle, but its sine is hardly larger than others. Where the number of
  // quarters is rounded to the next one, what is left is more than an eighth of a turn, and right.
  r = r > 1.6f ? 1.6f : r;
  r = r < -1.6f ? -1.6f : r;
  const float squared = r * r;
  const float s = __fmaf_rn(
      __fmaf_rn(__fmaf_rn(squared, -1.95152959e-4f, 8.33216087e-3f), squared, -1.66666546e-1f),
      squared * r, r);
  const float tail =
      __fmaf_rn(__fmaf_rn(squared, 2.44331571e-5f, -1.38873162e-3f), squared, 4.16666457e-2f);
  const float c = __fmaf_rn(__fmaf_rn(tail, squared, -0.5f), squared, 1.0f);
  const bool odd = (quarter & 1) != 0;
  const float first = odd ? c : s, second = odd ? s : c;
  sine = quarter & 2 ? -first : first;
  cosine = (quarter + 1) & 2 ? -second : second;
#else
  sine = TORCHKILN_MATH(sinf)(x);
  cosine = TORCHKILN_MATH(cosf)(x);
#endif
}
TORCHKILN_HD void sin_cos_of(double x, double& sine, double& cosine) {
#if defined(__CUDACC_RTC__)
  ::sincos(x, &sine, &cosine);
#else
  sine = TORCHKILN_MATH(sin)(x);
  cosine = TORCHKILN_MATH(cos)(x);
#endif
}
#undef TORCHKILN_MATH

}  // namespace torchkiln
