// The rules that turn h'(t) = A h + v(t) into h_k = alpha h_{k-1} + d_k sum_j w_j v_{k+j}, and their derivatives.
// z = A d_k; v(t) is interpolated between samples at the ends of steps (docs/selective_scan.md has the derivations).
// Everything is a template over real and complex numbers, shared by CPU and GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/numbers.h"

namespace torchkiln::selective_scan {

enum Method {
  kMamba = 0,
  kZoh = 1,
  kFoh = 2,
  kBilinear = 3,
  kTustin = 4,
  kPoly = 5,
  kHighorder = 6,
  kRk4 = 7,
  kRk4Constant = 8,
  kPolyTrueTime = 9,
  kHighorderTrueTime = 10,
};
constexpr int kMethods = 11;

// Samples before and behind that of its own that a step takes in.
TORCHKILN_HD constexpr int back_of(int method) {
  if (method == kHighorder || method == kHighorderTrueTime) return 2;
  return method == kFoh || method == kTustin || method == kRk4 || method == kPoly ||
                 method == kPolyTrueTime
             ? 1
             : 0;
}
TORCHKILN_HD constexpr int ahead_of(int method) {
  return method == kPoly || method == kPolyTrueTime ? 1 : 0;
}
TORCHKILN_HD constexpr int taps_of(int method) { return back_of(method) + 1 + ahead_of(method); }

// The step whose length shapes the weights beside the own one: 1 is the next, -1 the one before, 0 none.
TORCHKILN_HD constexpr int neighbour_of(int method) {
  return method == kPolyTrueTime ? 1 : (method == kHighorderTrueTime ? -1 : 0);
}

// How long a step's neighbour is: what the bend of a parabola takes of the difference of samples across the step itself, and
// across its neighbour. Out of the ratio of the neighbour to the step these are 2 / (1 + ratio) and that / ratio. Both are 1
// where steps are equal.
template <class T>
struct Uneven {
  T own = T(1), other = T(1);
};
template <class T>
TORCHKILN_HD Uneven<T> uneven_of(T ratio) {
  const T own = T(2) * quick_reciprocal(T(1) + ratio);
  return {own, own * quick_reciprocal(ratio)};
}
// 1 / ratio: own + other is 2 / ratio.
template <class T>
TORCHKILN_HD T inverse_ratio(Uneven<T> uneven) {
  return T(0.5) * (uneven.own + uneven.other);
}
// Both by the ratio.
template <class T>
TORCHKILN_HD Uneven<T> by_ratio_of(Uneven<T> uneven) {
  const T half = T(0.5) * uneven.own * uneven.own;
  return {-half, -inverse_ratio(uneven) * (uneven.other + half)};
}

template <class V>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

// alpha, and w by offset from -back_of to ahead_of.
template <int kMethod, class V>
struct Coefficients {
  V alpha;
  V weight[taps_of(kMethod)];
};

// ---- phi ----

// phi_1 ... phi_top, where phi_0 = e^z and phi_{j+1} = (phi_j - 1/j!) / z: a series near 0, where the closed forms
// cancel, and those elsewhere.
template <int kTop, class V>
struct Phi {
  V at[kTop + 1];
};

// 1 / n! without a loop or a division, which the GPU's compiler would leave for run time.
template <class T>
TORCHKILN_HD constexpr T inverse_factorial(int n) {
  constexpr T kTo[] = {T(1),
                       T(1),
                       T(1) / T(2),
                       T(1) / T(6),
                       T(1) / T(24),
                       T(1) / T(120),
                       T(1) / T(720),
                       T(1) / T(5040),
                       T(1) / T(40320),
                       T(1) / T(362880.0),
                       T(1) / T(3628800.0),
                       T(1) / T(39916800.0),
                       T(1) / T(479001600.0),
                       T(1) / T(6227020800.0),
                       T(1) / T(87178291200.0),
                       T(1) / T(1307674368000.0),
                       T(1) / T(20922789888000.0),
                       T(1) / T(355687428096000.0),
                       T(1) / T(6402373705728000.0)};
  return kTo[n];
}

// Terms of the series, and up to which |z| it is taken: of the closed forms, phi_j is left with the digits of e^z times
// |z|^j. In float that is about six of seven, and as many with so few terms.
template <int kTop, class T>
struct Series {
  static constexpr int kTerms = kTop == 1 ? 5 : (kTop > 3 ? 7 : 6);
  static constexpr T kReach = kTop == 1 ? T(0.125) : (kTop > 3 ? T(1) : T(0.5));
};
template <int kTop>
struct Series<kTop, double> {
  static constexpr int kTerms = 15;
  static constexpr double kReach = 1;
};

template <int kTop, class V>
TORCHKILN_HD Phi<kTop, V> phi_series(V z) {
  using T = Real<V>;
  constexpr int kLast = kTop + Series<kTop, T>::kTerms - 1;
  Phi<kTop, V> phi;
  phi.at[kTop] = number<V>(inverse_factorial<T>(kLast));
  TORCHKILN_UNROLLED
  for (int i = kLast - 1; i >= kTop; --i) {
    phi.at[kTop] = z * phi.at[kTop] + number<V>(inverse_factorial<T>(i));
  }
  TORCHKILN_UNROLLED
  for (int j = kTop - 1; j >= 0; --j) {
    phi.at[j] = z * phi.at[j + 1] + number<V>(inverse_factorial<T>(j));
  }
  return phi;
}

template <int kTop, class V>
TORCHKILN_HD Phi<kTop, V> phi_closed(V z) {
  const V inverse = reciprocal_of(z);
  Phi<kTop, V> phi;
  phi.at[0] = quick_exp(z);
  TORCHKILN_UNROLLED
  for (int j = 0; j < kTop; ++j) {
    phi.at[j + 1] = (phi.at[j] - number<V>(inverse_factorial<Real<V>>(j))) * inverse;
  }
  return phi;
}

template <int kTop, class V>
TORCHKILN_HD bool is_for_series(V z) {
  constexpr Real<V> kReach = Series<kTop, Real<V>>::kReach;
  if constexpr (is_complex_type<V>) {
    return inner(z, z) <= kReach * kReach;
  } else {
    return abs_of(z) <= kReach;
  }
}

template <int kTop, class V>
TORCHKILN_HD Phi<kTop, V> phi_of(V z) {
  using T = Real<V>;
  const bool is_small = is_for_series<kTop>(z);
#if defined(__CUDACC_RTC__)
  return is_small ? phi_series<kTop>(z) : phi_closed<kTop>(z);
#else
  // Both, so that loops become vectors.
  const Phi<kTop, V> small = phi_series<kTop>(select(is_small, z, number<V>(T(0))));
  const Phi<kTop, V> large = phi_closed<kTop>(select(is_small, number<V>(T(1)), z));
  Phi<kTop, V> phi;
  for (int j = 0; j <= kTop; ++j) phi.at[j] = select(is_small, small.at[j], large.at[j]);
  return phi;
#endif
}

// Out of e^z and 1 / z, which may be infinite at 0: without a branch, for lanes of which each has a z of its own.
template <int kTop, class V>
TORCHKILN_HD Phi<kTop, V> phi_given(V z, V inverse, V exponential) {
  using T = Real<V>;
  const bool is_small = is_for_series<kTop>(z);
  const Phi<kTop, V> series = phi_series<kTop>(z);
  Phi<kTop, V> phi;
  V closed = phi.at[0] = exponential;
  TORCHKILN_UNROLLED
  for (int j = 1; j <= kTop; ++j) {
    closed = closed * inverse - inverse_factorial<T>(j - 1) * inverse;
    phi.at[j] = select(is_small, series.at[j], closed);
  }
  return phi;
}

// From here to 0 a polynomial takes the place of both. All z of a trained model lie there, but for few.
constexpr float kNear = -1.75f;

// Minimax polynomials of phi_top; the others follow from it, none with a greater relative error than 1.8e-7, 7.3e-7, 4.2e-6
// and 1.6e-6.
template <int kTop>
TORCHKILN_HD Phi<kTop, float> phi_near(float z) {
  constexpr float kTo[][7] = {
      {0.99999982f, 0.499991658f, 0.166601017f, 0.041466073f, 8.0301393e-3f, 1.14162119e-3f,
       8.89533499e-5f},
      {0.499999634f, 0.166653637f, 0.0415890539f, 8.15875056e-3f, 1.20354989e-3f, 1.00163706e-4f},
      {0.166665968f, 0.041648428f, 8.25453094e-3f, 1.26536084e-3f, 1.14007004e-4f},
      {0.0416666011f, 8.33152492e-3f, 1.38070272e-3f, 1.85066667e-4f, 1.542538e-5f},
  };
  constexpr int kLast = kTop > 2 ? 4 : 7 - kTop;
  Phi<kTop, float> phi;
  phi.at[kTop] = kTo[kTop - 1][kLast];
  TORCHKILN_UNROLLED
  for (int i = kLast - 1; i >= 0; --i) phi.at[kTop] = z * phi.at[kTop] + kTo[kTop - 1][i];
  TORCHKILN_UNROLLED
  for (int j = kTop - 1; j >= 0; --j) {
    phi.at[j] = z * phi.at[j + 1] + inverse_factorial<float>(j);
  }
  return phi;
}

// Which phi the weights of an exponential rule need; 0 where alpha is no exponential, or there are no weights.
TORCHKILN_HD constexpr int top_of(int method) {
  if (method == kZoh) return 1;
  if (method == kFoh) return 2;
  return method == kPoly || method == kHighorder || neighbour_of(method) != 0 ? 3 : 0;
}

// Whether the product of a row's alphas is taken from one long step: they are exponentials, of real numbers. An imaginary part
// could be thousands of radians, of which float32 keeps three digits.
TORCHKILN_HD constexpr bool keeps_step(int method, bool is_complex) {
  return !is_complex && (method == kMamba || top_of(method) > 0);
}

// ---- weights ----

// factor * x + y. The GPU's compiler makes x + x of 2 x before it sees that it could be one instruction.
template <class T, class V>
TORCHKILN_HD V add_times(V y, T factor, V x) {
#if defined(__CUDACC_RTC__)
  if constexpr (is_float<V>) return fused(factor, x, y);
#endif
  return factor * x + y;
}

// Of a parabola through three samples: the one at the start of a step, what they rise by across it, and the second
// derivative, in units of the step; or weights of these.
template <class V>
struct Parabola {
  V start, rise, bend;
};
// What a step holds of each, linear in phi_1 ... phi_3.
template <class V>
TORCHKILN_HD Parabola<V> held_of_phi(const V* phi) {
  return {phi[1], phi[2], phi[3] - Real<V>(0.5) * phi[2]};
}

// The bend, out of the differences of samples across the step and across its neighbour.
template <int kMethod, class V>
TORCHKILN_HD V bend_of(V own, V other, Uneven<Real<V>> uneven) {
  if constexpr (neighbour_of(kMethod) > 0) return uneven.other * other - uneven.own * own;
  if constexpr (neighbour_of(kMethod) < 0) return uneven.own * own - uneven.other * other;
  return ahead_of(kMethod) > 0 ? other - own : own - other;
}

// Weights of `curve` bends.
template <int kMethod, class V>
TORCHKILN_HD void weights_of_bend(V curve, Uneven<Real<V>> uneven, V* weight) {
  constexpr int kOther = ahead_of(kMethod) > 0 ? 2 : 0;
  weight[2 - kOther] = uneven.own * curve;
  weight[kOther] = uneven.other * curve;
  weight[1] = -(uneven.own + uneven.other) * curve;
}

// Those of the exponential rules, linear in phi_1 ... phi_3: given their derivatives it gives its own.
template <int kMethod, class V>
TORCHKILN_HD void weights_of_phi(const V* phi, Uneven<Real<V>> uneven, V* weight) {
  using T = Real<V>;
  if constexpr (kMethod == kZoh) {
    weight[0] = phi[1];
  } else if constexpr (kMethod == kFoh) {
    weight[0] = phi[1] - phi[2];
    weight[1] = phi[2];
  } else if constexpr (kMethod == kPoly) {
    weight[2] = phi[3] - T(0.5) * phi[2];
    weight[1] = add_times(phi[2], T(-2), weight[2]);
    weight[0] = (phi[1] - phi[2]) + weight[2];
  } else if constexpr (kMethod == kHighorder) {
    weight[0] = phi[3] - T(0.5) * phi[2];
    weight[1] = add_times(phi[1], T(-2), phi[3]);
    weight[2] = phi[3] + T(0.5) * phi[2];
  } else if constexpr (neighbour_of(kMethod) != 0) {
    constexpr int kBegin = back_of(kMethod) - 1;
    weights_of_bend<kMethod>(held_of_phi(phi).bend, uneven, weight);
    weight[kBegin] = weight[kBegin] + (phi[1] - phi[2]);
    weight[kBegin + 1] = weight[kBegin + 1] + phi[2];
  }
}

template <int kMethod, int kTop, class V>
TORCHKILN_HD Coefficients<kMethod, V> coefficients_of_phi(const Phi<kTop, V>& phi,
                                                          Uneven<Real<V>> uneven) {
  Coefficients<kMethod, V> c;
  c.alpha = phi.at[0];
  weights_of_phi<kMethod>(phi.at, uneven, c.weight);
  return c;
}

template <int kMethod, class V>
TORCHKILN_HD Coefficients<kMethod, V> coefficients(V z, Uneven<Real<V>> uneven) {
  using T = Real<V>;
  Coefficients<kMethod, V> c;
  const V one = number<V>(T(1));
  if constexpr (kMethod == kMamba) {
    c.alpha = quick_exp(z);
    c.weight[0] = one;
  } else if constexpr (top_of(kMethod) > 0) {
    return coefficients_of_phi<kMethod>(phi_of<top_of(kMethod)>(z), uneven);
  } else if constexpr (kMethod == kBilinear || kMethod == kTustin) {
    const V inverse = quick_reciprocal(one - T(0.5) * z);
    c.alpha = (one + T(0.5) * z) * inverse;
    for (V& weight : c.weight) weight = kMethod == kTustin ? T(0.5) * inverse : inverse;
  } else {
    const V constant =
        one + z * (number<V>(T(0.5)) + z * (number<V>(T(1) / T(6)) + T(1) / T(24) * z));
    c.alpha = one + z * constant;
    if constexpr (kMethod == kRk4Constant) {
      c.weight[0] = constant;
    } else {
      c.weight[1] = number<V>(T(0.5)) + z * (number<V>(T(1) / T(6)) + T(1) / T(24) * z);
      c.weight[0] = constant - c.weight[1];
    }
  }
  return c;
}

// The same for z = d * a.
template <int kMethod, class V>
TORCHKILN_HD Coefficients<kMethod, V> coefficients(Real<V> d, V a, Uneven<Real<V>> uneven) {
  if constexpr (kMethod == kMamba) {
    return {quick_exp_of_product(d, a), {number<V>(Real<V>(1))}};
  } else {
    return coefficients<kMethod>(d * a, uneven);
  }
}

// A rate and its reciprocal, for many steps of the exponential rules.
template <int kMethod, class V>
struct Rate {
  V a, inverse;
};
template <int kMethod, class V>
TORCHKILN_HD Rate<kMethod, V> rate_of(V a) {
  return {a, top_of(kMethod) > 0 ? reciprocal_of(a) : a};
}

template <int kMethod, class V>
TORCHKILN_HD Coefficients<kMethod, V> coefficients(Real<V> d, Rate<kMethod, V> rate,
                                                   Uneven<Real<V>> uneven) {
  if constexpr (top_of(kMethod) > 0 && sizeof(Real<V>) == 4) {
    const V alpha = quick_exp_of_product(d, rate.a), inverse = quick_reciprocal(d) * rate.inverse;
    const auto phi = phi_given<top_of(kMethod)>(d * rate.a, inverse, alpha);
    return coefficients_of_phi<kMethod>(phi, uneven);
  } else {
    return coefficients<kMethod>(d, rate.a, uneven);
  }
}

// Whether a rule has cheaper coefficients where z is near 0.
template <int kMethod, class V>
constexpr bool has_near = is_float<V> && top_of(kMethod) > 0;

// kIsNear: d * a is in [kNear, 0].
template <bool kIsNear, int kMethod, class V>
TORCHKILN_HD Coefficients<kMethod, V> coefficients_at(Real<V> d, Rate<kMethod, V> rate,
                                                      Uneven<Real<V>> uneven) {
  if constexpr (kIsNear) {
    return coefficients_of_phi<kMethod>(phi_near<top_of(kMethod)>(d * rate.a), uneven);
  } else {
    return coefficients(d, rate, uneven);
  }
}

// sum_j w_j v_{k+j}; `v` begins with the sample furthest back.
template <int kMethod, class V>
TORCHKILN_HD V held_of(const V* weight, const V* v) {
  if constexpr (kMethod == kMamba) return v[0];
  V sum = weight[0] * v[0];
  TORCHKILN_UNROLLED
  for (int j = 1; j < taps_of(kMethod); ++j) sum = sum + weight[j] * v[j];
  return sum;
}

// The state behind a step by its increment, without alpha or weights: the terms of Taylor's series that precede the last phi,
// and what remains.
template <int kMethod>
TORCHKILN_HD float stepped_near(float state, float d, float a, Uneven<float> uneven,
                                const float* v) {
  const float z = d * a;
  const float phi = phi_near<top_of(kMethod)>(z).at[top_of(kMethod)];
  if constexpr (kMethod == kZoh) {
    return state + phi * (z * state + v[0]);
  } else {
    constexpr int kBegin = back_of(kMethod) - 1;
    const float slope = a * state + v[kBegin], rise = v[kBegin + 1] - v[kBegin];
    if constexpr (taps_of(kMethod) == 2) return state + d * (slope + phi * (z * slope + rise));
    constexpr int kOther = ahead_of(kMethod) > 0 ? 1 : 0;
    const float bend = bend_of<kMethod>(rise, v[kOther + 1] - v[kOther], uneven);
    const float change = z * slope + (rise - 0.5f * bend);
    return state + d * ((slope + 0.5f * change) + phi * (z * change + bend));
  }
}

// The state behind a step. The one sample of rules with one is multiplied by d. kIsNear: d * a is in [kNear, 0].
template <bool kIsNear, int kMethod, class V>
TORCHKILN_HD V stepped(V state, Real<V> d, Rate<kMethod, V> rate, Uneven<Real<V>> uneven,
                       const V* v) {
  if constexpr (kIsNear) {
    return stepped_near<kMethod>(state, d, rate.a, uneven, v);
  } else {
    const auto c = coefficients(d, rate, uneven);
    const V held = held_of<kMethod>(c.weight, v);
    return c.alpha * state + (taps_of(kMethod) == 1 ? held : d * held);
  }
}

// ---- derivatives ----

// alpha and the weights once more, their derivatives by z, and those of the weights by the ratio.
template <int kMethod, class V>
struct Slopes {
  Coefficients<kMethod, V> value, by_z;
  V by_ratio[taps_of(kMethod)];
};

// phi_j' = phi_j - j phi_{j+1}.
template <int kMethod, class V>
TORCHKILN_HD Slopes<kMethod, V> slopes_of_phi(const Phi<top_of(kMethod) + 1, V>& phi,
                                              Uneven<Real<V>> uneven) {
  using T = Real<V>;
  constexpr int kTop = top_of(kMethod);
  Slopes<kMethod, V> s;
  V by_z[kTop + 1];
  TORCHKILN_UNROLLED
  for (int j = 0; j <= kTop; ++j) by_z[j] = phi.at[j] - T(j) * phi.at[j + 1];
  s.value = coefficients_of_phi<kMethod>(phi, uneven);
  s.by_z.alpha = phi.at[0];
  weights_of_phi<kMethod>(by_z, uneven, s.by_z.weight);
  if constexpr (neighbour_of(kMethod) != 0) {
    weights_of_bend<kMethod>(held_of_phi(phi.at).bend, by_ratio_of(uneven), s.by_ratio);
  }
  return s;
}

template <int kMethod, class V>
TORCHKILN_HD Slopes<kMethod, V> slopes(V z, Uneven<Real<V>> uneven) {
  using T = Real<V>;
  if constexpr (top_of(kMethod) > 0) {
    return slopes_of_phi<kMethod>(phi_of<top_of(kMethod) + 1>(z), uneven);
  }
  Slopes<kMethod, V> s;
  const V one = number<V>(T(1));
  s.value = coefficients<kMethod>(z, uneven);
  if constexpr (kMethod == kMamba) {
    s.by_z.alpha = s.value.alpha;
    s.by_z.weight[0] = number<V>(T(0));
  } else if constexpr (kMethod == kBilinear || kMethod == kTustin) {
    const V inverse = (kMethod == kTustin ? T(2) : T(1)) * s.value.weight[0];
    s.by_z.alpha = inverse * inverse;
    const T factor = kMethod == kTustin ? T(0.25) : T(0.5);
    for (V& weight : s.by_z.weight) weight = factor * s.by_z.alpha;
  } else if constexpr (kMethod == kRk4 || kMethod == kRk4Constant) {
    const V of_constant = number<V>(T(0.5)) + z * (number<V>(T(1) / T(3)) + T(0.125) * z);
    s.by_z.alpha = one + z * (one + z * (number<V>(T(0.5)) + T(1) / T(6) * z));
    if constexpr (kMethod == kRk4Constant) {
      s.by_z.weight[0] = of_constant;
    } else {
      s.by_z.weight[1] = number<V>(T(1) / T(6)) + T(1) / T(12) * z;
      s.by_z.weight[0] = of_constant - s.by_z.weight[1];
    }
  }
  return s;
}

// The same for z = d * a.
template <int kMethod, class V>
TORCHKILN_HD Slopes<kMethod, V> slopes(Real<V> d, Rate<kMethod, V> rate, Uneven<Real<V>> uneven) {
  const V z = d * rate.a;
  if constexpr (top_of(kMethod) > 0 && sizeof(Real<V>) == 4) {
    constexpr int kTop = top_of(kMethod) + 1;
    const V alpha = quick_exp_of_product(d, rate.a), inverse = quick_reciprocal(d) * rate.inverse;
    return slopes_of_phi<kMethod>(phi_given<kTop>(z, inverse, alpha), uneven);
  } else {
    return slopes<kMethod>(z, uneven);
  }
}

// The same for rules of a parabola by what a step holds of it. `lag` is what the derivatives by z have less than that, as
// phi_j' = phi_j - j phi_{j+1}: alpha's has nothing less.
template <class V>
struct Bent {
  V alpha;
  Parabola<V> held, lag;
};
template <class V>
TORCHKILN_HD Bent<V> bent_of_phi(const Phi<4, V>& phi) {
  using T = Real<V>;
  return {phi.at[0],
          held_of_phi(phi.at),
          {phi.at[2], phi.at[3] + phi.at[3], T(3) * phi.at[4] - phi.at[3]}};
}
template <bool kIsNear, int kMethod, class V>
TORCHKILN_HD Bent<V> bent_of(Real<V> d, Rate<kMethod, V> rate) {
  if constexpr (kIsNear) {
    return bent_of_phi(phi_near<4>(d * rate.a));
  } else if constexpr (sizeof(Real<V>) == 4) {
    const V alpha = quick_exp_of_product(d, rate.a), inverse = quick_reciprocal(d) * rate.inverse;
    return bent_of_phi(phi_given<4>(d * rate.a, inverse, alpha));
  } else {
    return bent_of_phi(phi_of<4>(d * rate.a));
  }
}
template <class V>
TORCHKILN_HD V sum_of(Parabola<V> weight, Parabola<V> v) {
  return weight.start * v.start + weight.rise * v.rise + weight.bend * v.bend;
}

// What a step of one or two samples holds where z is in [kNear, 0], and its lag.
template <int kMethod>
struct Near {
  Coefficients<kMethod, float> c;
  float held, lag;
};
template <int kMethod>
TORCHKILN_HD Near<kMethod> near_of(float z, const float* v) {
  constexpr int kTop = top_of(kMethod);
  const Phi<kTop + 1, float> phi = phi_near<kTop + 1>(z);
  Near<kMethod> near = {};
  near.c = coefficients_of_phi<kMethod>(phi, Uneven<float>());
  float lag[taps_of(kMethod)];
  if constexpr (kMethod == kZoh) {
    lag[0] = phi.at[2];
  } else {
    lag[1] = 2.0f * phi.at[3];
    lag[0] = phi.at[2] - lag[1];
  }
  near.held = held_of<kMethod>(near.c.weight, v);
  near.lag = held_of<kMethod>(lag, v);
  return near;
}

// With alpha known already.
template <int kMethod, class V>
TORCHKILN_HD Slopes<kMethod, V> slopes(V z, Uneven<Real<V>> uneven, V alpha) {
  if constexpr (kMethod == kMamba) {
    Slopes<kMethod, V> s;
    s.value.alpha = s.by_z.alpha = alpha;
    s.value.weight[0] = number<V>(Real<V>(1));
    s.by_z.weight[0] = number<V>(Real<V>(0));
    return s;
  } else {
    return slopes<kMethod>(z, uneven);
  }
}

}  // namespace torchkiln::selective_scan
