// Arguments and element maths of sigmoid_focal_loss, shared by CPU and GPU.
// Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5. Every logarithm of a probability is a
// softplus and every complement has its own formula, so nothing saturates: the loss grows linearly in a wrong logit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/numbers.h"

namespace torchkiln::sigmoid_focal_loss {

// What a kernel leaves behind.
enum Output { kElements = 0, kSum = 1, kGradient = 2 };

// Blocks of a summing launch; each writes one partial sum, and zeros the slots that have no block.
constexpr int kMaxBlocks = 4096;

struct Args {
  const void* inputs;  // (rows, columns) logits
  const void*
      targets;  // (rows,) i64 label, negative everywhere if outside [0, columns); or (rows, columns) soft
  const void* weight;       // (columns,) of a row by its label, or null
  const void* grad_output;  // (rows, columns) or one element: kGradient
  void* loss;               // (rows, columns): kElements
  void* gradient;           // (rows, columns): kGradient; kSum too, unless null
  void* partials;           // kMaxBlocks sums in accumulator type: kSum
  i64 rows, columns;
  i64 grad_output_is_one;     // one element for all
  double positive, negative;  // factors of the two classes: alpha, 1 - alpha
  double gamma;
  double scale;  // of the loss and its gradient: 1 / rows for a mean
};

struct FinishArgs {
  const void* partials;
  void* loss;  // one element
};

struct ScaleArgs {
  void* gradient;           // (numel,), multiplied in place
  const void* grad_output;  // one element
  i64 numel;
};

// exp(-a) for a >= 0, NaN for NaN.
TORCHKILN_HD float exp_negative(float a) { return quick_exp2(a * -kLog2E); }
TORCHKILN_HD double exp_negative(double a) {
#if defined(__CUDACC_RTC__)
  return ::exp(-a);
#else
  return __builtin_exp(-a);
#endif
}

// log(1 + e) for e in [0, 1]: a polynomial with a relative error of 3e-8, against the 1e-5 of a fast logarithm.
TORCHKILN_HD float log1p_of(float e) {
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
TORCHKILN_HD double log1p_of(double e) {
#if defined(__CUDACC_RTC__)
  return ::log1p(e);
#else
  return __builtin_log1p(e);
#endif
}

// x^y for x in (0, 1].
TORCHKILN_HD float power_of(float x, float y) {
#if defined(__CUDACC_RTC__)
  float logarithm, result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(logarithm * y));
  return result;
#else
  return __builtin_powf(x, y);
#endif
}
TORCHKILN_HD double power_of(double x, double y) {
#if defined(__CUDACC_RTC__)
  return ::pow(x, y);
#else
  return __builtin_pow(x, y);
#endif
}

// x, or the largest finite number for infinity: infinity times 0 would be NaN.
TORCHKILN_HD float finite(float x) { return x > 3.40282347e38f ? 3.40282347e38f : x; }
TORCHKILN_HD double finite(double x) {
  return x > 1.7976931348623157e308 ? 1.7976931348623157e308 : x;
}

// sigmoid(x), 1 - sigmoid(x), log(1 + exp(-|x|)): each exact to rounding for every x.
template <class T>
struct Sigmoid {
  T p, q, tail;
};
template <class T>
TORCHKILN_HD Sigmoid<T> sigmoid(T x) {
  const T e = exp_negative(x < T(0) ? -x : x);
  const T large = quick_reciprocal(T(1) + e), small = e * large;
  return {x < T(0) ? small : large, x < T(0) ? large : small, log1p_of(e)};
}

template <class T>
struct Terms {
  T loss, gradient;  // gradient with respect to the logit
};

// A negative element, without its factor. A positive one is the negative one of -x with its gradient negated.
// kGamma 2 squares; 0 takes any gamma >= 0, at the price of one more exponential.
template <int kGamma, class T>
TORCHKILN_HD Terms<T> negative_terms(T x, T gamma) {
  const Sigmoid<T> s = sigmoid(x);
  const T softplus = (x < T(0) ? T(0) : x) + s.tail;
  T modulation;
  if constexpr (kGamma == 2) {
    modulation = s.p * s.p;
  } else {
    // p^gamma from -log(p), which is at hand.
    modulation = exp_negative(gamma * finite(s.tail - (x < T(0) ? x : T(0))));
  }
  return {modulation * softplus, modulation * (gamma * s.q * finite(softplus) + s.p)};
}

// An element whose target t lies anywhere in [0, 1], with the factors of the two classes.
template <int kGamma, class T>
TORCHKILN_HD Terms<T> soft_terms(T x, T t, T positive, T negative, T gamma) {
  const Sigmoid<T> s = sigmoid(x);
  const T miss = s.p * (T(1) - t) + s.q * t;   // 1 - p_t
  const T delta = s.p * (T(1) - t) - s.q * t;  // p - t
  const T wrong = x < T(0) ? t : T(1) - t;     // how much of the target the sign of x misses
  const T entropy = (wrong == T(0) ? T(0) : (x < T(0) ? -x : x) * wrong) + s.tail;
  T modulation, slope;  // miss^gamma and its derivative
  if constexpr (kGamma == 2) {
    modulation = miss * miss;
    slope = T(2) * miss;
  } else {
    // A miss of 0 stands beside an entropy of 0: any finite power will do.
    const T base = miss < T(1.17549435e-38f) ? T(1.17549435e-38f) : miss;
    slope = gamma * power_of(base, gamma - T(1));
    modulation = power_of(base, gamma);
  }
  const T factor = positive * t + negative * (T(1) - t);
  return {factor * modulation * entropy,
          factor * (modulation * delta + slope * s.p * s.q * (T(1) - T(2) * t) * finite(entropy))};
}

}  // namespace torchkiln::sigmoid_focal_loss
