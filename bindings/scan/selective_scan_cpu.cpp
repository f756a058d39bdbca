// selective_scan on the CPU: kLanes channels of a group side by side, the positions one after the other. As on the GPU a
// chunk of positions is gone through once for two states, and the backward computes the states of a chunk again.
// SPDX-License-Identifier: Apache-2.0
#if defined(__GNUC__) && !defined(__clang__)
// A comparison might raise a floating-point exception, and g++ keeps that, at the price of no vectors.
#pragma GCC optimize("O3", "no-trapping-math")
#endif
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <memory>
#include <type_traits>

#include "bindings/scan/selective_scan.h"
#include "bindings/support/parallel.h"
#include "bindings/support/turn.h"

// Everything is inlined into each body.
#define TORCHKILN_SCAN_LOOPS __attribute__((flatten, TORCHKILN_CLONES))

namespace torchkiln::bindings {
namespace {

using selective_scan::ahead_of;
using selective_scan::Args;
using selective_scan::back_of;
using selective_scan::BackwardArgs;
using selective_scan::kCheckpoint;
using selective_scan::neighbour_of;
using selective_scan::Problem;
using selective_scan::Rows;
using selective_scan::taps_of;
using selective_scan::uneven_of;

constexpr int kLanes = 16, kSteps = kCheckpoint;
// States that the forward goes through at once: they share what is loaded for a position.
constexpr int kTogether = 2;
// How far ahead of what is gone through memory is asked for.
constexpr int kAhead = 2 * kSteps;
// Positions beside a chunk that a rule, or what the position before the chunk needs, takes in.
constexpr int kLeft = 2, kRight = 1;

// A number for each position of a chunk and beside it, and each channel. An element is named by both at once: behind a
// pointer to a position the compiler no longer sees that two sheets do not overlap, and asks so at every position.
template <class T>
struct alignas(64) Sheet {
  T at[kLeft + kSteps + kRight][kLanes];
  T& operator()(int step, int lane) { return at[step + kLeft][lane]; }
  const T& operator()(int step, int lane) const { return at[step + kLeft][lane]; }
};

// Channels that are gone through side by side.
struct Panel {
  std::int64_t batch, group, channel;
  int lanes;
};

std::int64_t panels_of(const Problem& p) { return (p.dim / p.groups + kLanes - 1) / kLanes; }

Panel panel_of(const Problem& p, std::int64_t of_batch, std::int64_t panel) {
  const std::int64_t channels = p.dim / p.groups, group = of_batch % p.groups;
  return {of_batch / p.groups, group, group * channels + panel * kLanes,
          static_cast<int>(std::min<std::int64_t>(kLanes, channels - panel * kLanes))};
}

// What a chunk is computed from and into. Lanes without a channel hold zeros.
template <class V>
struct Chunk {
  using T = Real<V>;
  std::int64_t first, ahead;  // its first position, and that of the chunk whose rows are asked for
  int steps;
  int left, right;  // positions beside it that are loaded
  bool is_first, is_last;
  Sheet<T> u, d, ratio, g, y, grad_u, grad_d, grad_ratio;
  Sheet<V> alpha, state, grad_v, by_b, by_c;
  // Of states that are gone through together: variable B and C, or ones.
  V b[kTogether][kLeft + kSteps + kRight], c[kTogether][kLeft + kSteps + kRight];
  V grad_b[kSteps], grad_c[kSteps];
};

// One state of the channels of a panel, and what of it goes from chunk to chunk.
template <class V>
struct alignas(64) Forward {
  V a[kLanes], b[kLanes], c[kLanes];  // constant B and C, or ones
  V value[kLanes];
};
template <class V>
struct Backward : Forward<V> {
  V adjoint[kLanes], pushed[2][kLanes], of_a[kLanes], of_b[kLanes], of_c[kLanes];
};

// ---- loops over states ----

// B or C of a lane, out of its factors. kConstant: whether B or C is; otherwise those of lanes are 1.
template <bool kConstant, class V>
inline V product(V of_step, V of_lane) {
  if constexpr (kConstant) return of_step * of_lane;
  return of_step;
}

// factor * sum_j w_j v_{step+j} of a lane whose B has this factor.
template <int kMethod, bool kConstant, class V>
inline V held(const V* weight, Real<V> factor, const Sheet<Real<V>>& u, const V* b, V of_lane,
              int step, int lane) {
  V sum{};
  for (int j = 0; j < taps_of(kMethod); ++j) {
    const int from = step - back_of(kMethod) + j;
    const V v = (factor * u(from, lane)) * product<kConstant>(b[from + kLeft], of_lane);
    sum = j == 0 ? weight[j] * v : sum + weight[j] * v;
  }
  return sum;
}

// Lanes are the inner loop, and what a state carries is in arrays of the function: so it stays in registers.
template <int kMethod, bool kConstant, class V>
inline void forward_loop(Chunk<V>& c, Forward<V>* states) {
  V a[kTogether][kLanes], of_b[kTogether][kLanes], of_c[kTogether][kLanes];
  V value[kTogether][kLanes];
  for (int n = 0; n < kTogether; ++n) {
    for (int l = 0; l < kLanes; ++l) {
      a[n][l] = states[n].a[l];
      of_b[n][l] = states[n].b[l];
      of_c[n][l] = states[n].c[l];
      value[n][l] = states[n].value[l];
    }
  }
  for (int step = 0; step < c.steps; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      const Real<V> d = c.d(step, l);
      Real<V> y = c.y(step, l);
      for (int n = 0; n < kTogether; ++n) {
        const auto k =
            selective_scan::coefficients<kMethod>(d, a[n][l], uneven_of(c.ratio(step, l)));
        value[n][l] = k.alpha * value[n][l] +
                      held<kMethod, kConstant>(k.weight, d, c.u, c.b[n], of_b[n][l], step, l);
        y += inner(product<kConstant>(c.c[n][step + kLeft], of_c[n][l]), conjugate(value[n][l]));
      }
      c.y(step, l) = y;
    }
  }
  for (int n = 0; n < kTogether; ++n) {
    for (int l = 0; l < kLanes; ++l) states[n].value[l] = value[n][l];
  }
}

// Once more, keeping what the adjoints need.
template <int kMethod, bool kConstant, class V>
inline void replay_loop(Chunk<V>& c, const Backward<V>& s) {
  V a[kLanes], of_b[kLanes], of_c[kLanes], value[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    a[l] = s.a[l];
    of_b[l] = s.b[l];
    of_c[l] = s.c[l];
    value[l] = s.value[l];
  }
  std::copy_n(value, kLanes, &c.state(-1, 0));
  for (int step = 0; step < c.steps; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      const Real<V> d = c.d(step, l);
      const auto k = selective_scan::coefficients<kMethod>(d, a[l], uneven_of(c.ratio(step, l)));
      value[l] =
          k.alpha * value[l] + held<kMethod, kConstant>(k.weight, d, c.u, c.b[0], of_b[l], step, l);
      c.alpha(step, l) = k.alpha;
      c.state(step, l) = value[l];
      c.y(step, l) += inner(product<kConstant>(c.c[0][step + kLeft], of_c[l]), conjugate(value[l]));
    }
  }
}

// From the last step to the first: lambda is the adjoint of a step's state.
template <int kMethod, bool kConstant, class V>
inline void adjoint_loop(Chunk<V>& c, Backward<V>& s) {
  using T = Real<V>;
  const T factor = is_complex_type<V> ? T(2) : T(1);
  V a[kLanes], of_b[kLanes], of_c[kLanes], adjoint[kLanes], of_a[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    a[l] = s.a[l];
    of_b[l] = s.b[l];
    of_c[l] = s.c[l];
    adjoint[l] = s.adjoint[l];
    of_a[l] = s.of_a[l];
  }
  for (int step = c.steps - 1; step >= 0; --step) {
    for (int l = 0; l < kLanes; ++l) {
      const T g = factor * c.g(step, l), d = c.d(step, l);
      const V output = product<kConstant>(c.c[0][step + kLeft], of_c[l]);
      const V lambda = g * conjugate(output) + adjoint[l];
      const V alpha = c.alpha(step, l);
      c.by_c(step, l) = g * conjugate(c.state(step, l));
      adjoint[l] = conjugate(alpha) * lambda;
      const auto k = selective_scan::slopes<kMethod>(d * a[l], uneven_of(c.ratio(step, l)), alpha);
      const auto sum = [&](const V* weight, T by) {
        return held<kMethod, kConstant>(weight, by, c.u, c.b[0], of_b[l], step, l);
      };
      V by_z = k.by_z.alpha * c.state(step - 1, l);
      if constexpr (kMethod != selective_scan::kMamba) by_z = by_z + sum(k.by_z.weight, d);
      const V of_z = lambda * conjugate(by_z);
      of_a[l] = of_a[l] + d * of_z;
      c.grad_d(step, l) += inner(of_z, a[l]) + inner(lambda, sum(k.value.weight, T(1)));
      if constexpr (neighbour_of(kMethod) != 0) {
        c.grad_ratio(step, l) += inner(lambda, sum(k.by_ratio, d));
      }
      for (int j = 0; j < taps_of(kMethod); ++j) {
        V& to = c.grad_v(step + j - back_of(kMethod), l);
        const V push = (d * conjugate(k.value.weight[j])) * lambda;
        to = taps_of(kMethod) == 1 ? push : to + push;
      }
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    s.adjoint[l] = adjoint[l];
    s.of_a[l] = of_a[l];
  }
}

// What the position before the chunk has for its first sample and step, when a rule looks ahead.
template <int kMethod, bool kConstant, class V>
inline void gradients_from_before(Chunk<V>& c, const Backward<V>& s) {
  using T = Real<V>;
  const T factor = is_complex_type<V> ? T(2) : T(1);
  for (int l = 0; l < kLanes; ++l) {
    const V output = c.c[0][kLeft - 1] * s.c[l];
    const V lambda = (factor * c.g(-1, l)) * conjugate(output) + s.adjoint[l];
    const T d = c.d(-1, l);
    const auto k = selective_scan::slopes<kMethod>(d * s.a[l], uneven_of(c.ratio(-1, l)));
    const V push = (d * conjugate(k.value.weight[taps_of(kMethod) - 1])) * lambda;
    c.grad_v(0, l) = c.grad_v(0, l) + push;
    if constexpr (neighbour_of(kMethod) != 0) {
      c.grad_ratio(-1, l) +=
          inner(lambda, held<kMethod, kConstant>(k.by_ratio, d, c.u, c.b[0], s.b[l], -1, l));
    }
  }
}

// The gradients of samples begin with what the chunk behind has for the last ones. A rule of one sample writes each once.
template <int kMethod, class V>
inline void begin_samples(Chunk<V>& c, const Backward<V>& s) {
  if constexpr (taps_of(kMethod) > 1) {
    for (int step = -kLeft; step < c.steps + kRight; ++step) {
      for (int l = 0; l < kLanes; ++l) c.grad_v(step, l) = V{};
    }
    for (int j = 0; j < back_of(kMethod); ++j) {
      for (int l = 0; l < kLanes; ++l) c.grad_v(c.steps - 1 - j, l) = s.pushed[j][l];
    }
  }
}

// Samples beyond the ends are those at the ends.
template <class V>
inline void end_samples(Chunk<V>& c, Backward<V>& s) {
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) {
    for (int j = 0; j < 2; ++j) s.pushed[j][l] = c.grad_v(-1 - j, l);
    if (c.is_first) c.grad_v(0, l) = c.grad_v(0, l) + c.grad_v(-1, l) + c.grad_v(-2, l);
    if (c.is_last) c.grad_v(c.steps - 1, l) = c.grad_v(c.steps - 1, l) + c.grad_v(c.steps, l);
  }
}

// From the gradients of samples to those of what they are made of.
template <bool kConstant, class V>
inline void samples_loop(Chunk<V>& c, Backward<V>& s) {
  V of_b[kLanes];
  std::copy_n(s.b, kLanes, of_b);
  for (int step = 0; step < c.steps; ++step) {
    const V b = c.b[0][step + kLeft];
// g++ would unroll the lanes and make vectors of positions, gathered by hundreds of permutations.
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      c.by_b(step, l) = c.u(step, l) * c.grad_v(step, l);
      c.grad_u(step, l) += inner(c.grad_v(step, l), product<kConstant>(b, of_b[l]));
    }
  }
  if constexpr (kConstant) {
    for (int step = 0; step < c.steps; ++step) {
      for (int l = 0; l < kLanes; ++l) {
        s.of_b[l] = s.of_b[l] + c.by_b(step, l);
        s.of_c[l] = s.of_c[l] + c.by_c(step, l);
      }
    }
  }
}

// Sums over lanes: halves are added to halves as long as those are vectors.
template <class V>
inline void sum_lanes(const Sheet<V>& sheet, int steps, V* out) {
  constexpr int kQuarter = kLanes / 4;
  V part[kSteps][kQuarter];
  for (int step = 0; step < steps; ++step) {
    V half[kLanes / 2];
    for (int l = 0; l < kLanes / 2; ++l) half[l] = sheet(step, l) + sheet(step, l + kLanes / 2);
    for (int l = 0; l < kQuarter; ++l) part[step][l] = half[l] + half[l + kQuarter];
  }
  for (int step = 0; step < steps; ++step) {
    out[step] = (part[step][0] + part[step][1]) + (part[step][2] + part[step][3]);
  }
}

template <int kMethod, bool kConstant, class V>
inline void backward_loop(Chunk<V>& c, Backward<V>& s) {
  replay_loop<kMethod, kConstant>(c, s);
  begin_samples<kMethod>(c, s);
  adjoint_loop<kMethod, kConstant>(c, s);
  if (ahead_of(kMethod) > 0 && !c.is_first) gradients_from_before<kMethod, kConstant>(c, s);
}

// What is the same for all rules: inlined into each of them it would be half of this file's code.
template <class V>
inline void finish_loop(Chunk<V>& c, Backward<V>& s, std::int64_t method, bool constant) {
  if (taps_of(static_cast<int>(method)) > 1) end_samples(c, s);
  constant ? samples_loop<true>(c, s) : samples_loop<false>(c, s);
  sum_lanes(c.by_b, c.steps, c.grad_b);
  sum_lanes(c.by_c, c.steps, c.grad_c);
}

// What runs for states of a chunk: kTogether of them forward, one backward. Both are named functions, because only those
// have a body per instruction set.
template <bool kConstant, class V, class State>
inline void states_loop(Chunk<V>& c, State* states, std::int64_t method) {
  const auto run = [&]<int kMethod>() {
    if constexpr (std::is_same_v<State, Backward<V>>) {
      backward_loop<kMethod, kConstant>(c, *states);
    } else {
      forward_loop<kMethod, kConstant>(c, states);
    }
  };
  switch (method) {
    case selective_scan::kMamba:
      return run.template operator()<selective_scan::kMamba>();
    case selective_scan::kZoh:
      return run.template operator()<selective_scan::kZoh>();
    case selective_scan::kFoh:
      return run.template operator()<selective_scan::kFoh>();
    case selective_scan::kBilinear:
      return run.template operator()<selective_scan::kBilinear>();
    case selective_scan::kTustin:
      return run.template operator()<selective_scan::kTustin>();
    case selective_scan::kPoly:
      return run.template operator()<selective_scan::kPoly>();
    case selective_scan::kHighorder:
      return run.template operator()<selective_scan::kHighorder>();
    case selective_scan::kRk4:
      return run.template operator()<selective_scan::kRk4>();
    case selective_scan::kRk4Constant:
      return run.template operator()<selective_scan::kRk4Constant>();
    case selective_scan::kPolyTrueTime:
      return run.template operator()<selective_scan::kPolyTrueTime>();
    default:
      return run.template operator()<selective_scan::kHighorderTrueTime>();
  }
}

TORCHKILN_SCAN_LOOPS void run_states(Chunk<float>& c, Forward<float>* states, std::int64_t method,
                                     bool constant) {
  constant ? states_loop<true>(c, states, method) : states_loop<false>(c, states, method);
}
TORCHKILN_SCAN_LOOPS void run_states(Chunk<float>& c, Backward<float>* states, std::int64_t method,
                                     bool constant) {
  constant ? states_loop<true>(c, states, method) : states_loop<false>(c, states, method);
}
template <class V, class State>
void run_states(Chunk<V>& c, State* states, std::int64_t method, bool) {
  states_loop<true>(c, states, method);
}
TORCHKILN_SCAN_LOOPS void finish_state(Chunk<float>& c, Backward<float>& s, std::int64_t method,
                                       bool constant) {
  finish_loop(c, s, method, constant);
}
// One body for all types of inputs.
template <class V>
[[gnu::noinline]] void finish_state(Chunk<V>& c, Backward<V>& s, std::int64_t method, bool) {
  finish_loop(c, s, method, true);
}

// ---- loops over positions ----

template <class T>
inline void add_bias(Sheet<T>& d, int begin, int end, const T* bias, bool softplus) {
  for (int step = begin; step < end; ++step) {
    for (int l = 0; l < kLanes; ++l) d(step, l) += bias[l];
  }
  if (!softplus) return;
  for (int step = begin; step < end; ++step) {
    for (int l = 0; l < kLanes; ++l) d(step, l) = softplus_of(d(step, l));
  }
}
TORCHKILN_SCAN_LOOPS void steps_loop(Sheet<float>& d, int begin, int end, const float* bias,
                                     bool softplus) {
  add_bias(d, begin, end, bias, softplus);
}
void steps_loop(Sheet<double>& d, int begin, int end, const double* bias, bool softplus) {
  add_bias(d, begin, end, bias, softplus);
}

// y times silu(z).
template <class T>
inline void gate(Sheet<T>& y, const Sheet<T>& z, int begin, int end) {
  for (int step = begin; step < end; ++step) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) y(step, l) *= z(step, l) * sigmoid_of(z(step, l));
  }
}
TORCHKILN_SCAN_LOOPS void gate_loop(Sheet<float>& y, const Sheet<float>& z, int begin, int end) {
  gate(y, z, begin, end);
}
void gate_loop(Sheet<double>& y, const Sheet<double>& z, int begin, int end) {
  gate(y, z, begin, end);
}

// Gradients by D, by u beside the states, and by delta before softplus, where it was `before` and the bias.
template <class V>
inline void finish_gradients(Chunk<V>& c, const Sheet<Real<V>>& before, const Real<V>* skip,
                             const Real<V>* bias, bool softplus, Real<V>* of_D, Real<V>* of_bias) {
  for (int step = 0; softplus && step < c.steps; ++step) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      c.grad_d(step, l) *= sigmoid_of(before(step, l) + bias[l]);
    }
  }
  for (int step = 0; step < c.steps; ++step) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      c.grad_u(step, l) += skip[l] * c.g(step, l);
      of_D[l] += c.g(step, l) * c.u(step, l);
      of_bias[l] += c.grad_d(step, l);
    }
  }
}
TORCHKILN_SCAN_LOOPS void gradients_loop(Chunk<float>& c, const Sheet<float>& before,
                                         const float* skip, const float* bias, bool softplus,
                                         float* of_D, float* of_bias) {
  finish_gradients(c, before, skip, bias, softplus, of_D, of_bias);
}
template <class V>
void gradients_loop(Chunk<V>& c, const Sheet<Real<V>>& before, const Real<V>* skip,
                    const Real<V>* bias, bool softplus, Real<V>* of_D, Real<V>* of_bias) {
  finish_gradients(c, before, skip, bias, softplus, of_D, of_bias);
}

// The output before its gate.
template <class V>
inline void outputs(Chunk<V>& c, const Real<V>* skip) {
  using T = Real<V>;
  for (int step = 0; step < c.steps; ++step) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      c.y(step, l) = (is_complex_type<V> ? T(2) : T(1)) * c.y(step, l) + skip[l] * c.u(step, l);
    }
  }
}

// The gradient of z in c.g, out of that of the output there, and the output before the gate in c.y.
template <class V>
inline void gradient_of_gate(Chunk<V>& c, const Sheet<Real<V>>& gate) {
  for (int step = 0; step < c.steps; ++step) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      const Real<V> z = gate(step, l);
      c.g(step, l) *= c.y(step, l) * selective_scan::silu_slope(z, sigmoid_of(z));
    }
  }
}
TORCHKILN_SCAN_LOOPS void gate_gradient_loop(Chunk<float>& c, const Sheet<float>& gate) {
  gradient_of_gate(c, gate);
}
template <class V>
void gate_gradient_loop(Chunk<V>& c, const Sheet<Real<V>>& gate) {
  gradient_of_gate(c, gate);
}

// ---- memory ----

template <class T>
void zero_steps(Sheet<T>& sheet) {
  for (auto& step : sheet.at) std::fill_n(step, kLanes, T(0));
}

// Steps of a chunk that lie in memory; those beyond the ends of the row are those at its ends.
struct Inside {
  int begin, end;
};
Inside inside_of(const Problem& p, std::int64_t first, int begin, int end) {
  return {static_cast<int>(std::max<std::int64_t>(begin, -first)),
          static_cast<int>(std::min<std::int64_t>(end, p.length - first))};
}

// Where position `first` lies, and the way from there.
template <class T>
T* start_of(const Problem& p, T* row, std::int64_t first) {
  return row + (p.reverse ? p.length - 1 - first : first);
}

// f(step, where it lies from the start on), as two loops, of which the first one reads neighbours.
template <class F>
inline void along(const Problem& p, int begin, int end, const F& f) {
  if (!p.reverse) {
    for (int step = begin; step < end; ++step) f(step, step);
  } else {
    for (int step = begin; step < end; ++step) f(step, -step);
  }
}

// Asks for what a row has of another chunk: rows lie far apart, and nothing but this reads ahead in so many at once. A
// position is `parts` elements.
template <class T>
void prefetch_row(const Problem& p, const T* row, std::int64_t first, int parts = 1) {
  const int line = 64 / static_cast<int>(sizeof(T)) / parts;
  const std::int64_t end = std::min<std::int64_t>(first + kSteps, p.length);
  for (std::int64_t i = std::max<std::int64_t>(first, 0); i < end; i += line) {
    __builtin_prefetch(row + (p.reverse ? p.length - 1 - i : i) * parts, 0, 2);
  }
}

// Calls f(the first of four lanes, where four steps begin in memory, which of them lies there) for all steps that can be
// turned; returns how many those are.
template <class Scalar, class T, class F>
int turn_steps(const Problem& p, const Panel& panel, int steps, const F& f) {
  if constexpr (!std::is_same_v<Scalar, float> || !std::is_same_v<T, float>) return 0;
  if (panel.lanes < kLanes) return 0;
  const int turned = steps / 4 * 4;
  for (int l = 0; l < kLanes; l += 4) {
    for (int step = 0; step < turned; step += 4) {
      p.reverse ? f(l, -step - 3, step + 3) : f(l, step, step);
    }
  }
  return turned;
}

// A row of each channel, from `begin` to `end` around the chunk at `first`; that at `ahead` follows.
template <class Scalar, class T>
void load_rows(const Problem& p, const Panel& panel, const Rows& rows, std::int64_t first,
               std::int64_t ahead, int begin, int end, Sheet<T>& out) {
  const Inside inside = inside_of(p, first, begin, end);
  if (panel.lanes < kLanes) zero_steps(out);
  const Scalar* first_row = static_cast<const Scalar*>(rows.data) + panel.batch * rows.batch +
                            panel.channel * rows.channel;
  for (int l = 0; l < panel.lanes; ++l) prefetch_row(p, first_row + l * rows.channel, ahead);
  const Scalar* start = start_of(p, first_row, first);
  const std::ptrdiff_t to_stride = p.reverse ? -kLanes : kLanes;
  const int turned = turn_steps<Scalar, T>(p, panel, inside.end, [&](int l, int at, int to) {
    turn_four(reinterpret_cast<const float*>(start + l * rows.channel + at), rows.channel,
              reinterpret_cast<float*>(&out(to, l)), to_stride);
  });
  for (int l = 0; l < panel.lanes; ++l) {
    const Scalar* from = start + l * rows.channel;
    const auto one = [&](int step, std::ptrdiff_t at) { out(step, l) = load(from[at]); };
    along(p, inside.begin, 0, one);
    along(p, turned, inside.end, one);
  }
  const auto repeat = [&](int from, int to) {
    std::copy_n(out.at[from + kLeft], kLanes, out.at[to + kLeft]);
  };
  for (int step = begin; step < inside.begin; ++step) repeat(inside.begin, step);
  for (int step = inside.end; step < end; ++step) repeat(inside.end - 1, step);
}

template <class Scalar, class T>
void store_rows(const Problem& p, const Panel& panel, std::int64_t first, std::int64_t ahead,
                int steps, const Sheet<T>& values, void* out) {
  Scalar* first_row = static_cast<Scalar*>(out) + (panel.batch * p.dim + panel.channel) * p.length;
  for (int l = 0; l < panel.lanes; ++l) prefetch_row(p, first_row + l * p.length, ahead);
  Scalar* start = start_of(p, first_row, first);
  const std::ptrdiff_t stride = p.reverse ? -kLanes : kLanes;
  const int turned = turn_steps<Scalar, T>(p, panel, steps, [&](int l, int at, int from) {
    turn_four(reinterpret_cast<const float*>(&values(from, l)), stride,
              reinterpret_cast<float*>(start + l * p.length + at), p.length);
  });
  for (int l = 0; l < panel.lanes; ++l) {
    Scalar* to = start + l * p.length;
    along(p, turned, steps, [&](int step, std::ptrdiff_t at) { store(to[at], values(step, l)); });
  }
}

// A weight of each channel; 0 without one.
template <class T>
void load_weight(const void* weight, const Panel& panel, T* out) {
  for (int l = 0; l < kLanes; ++l) {
    out[l] = weight && l < panel.lanes ? static_cast<const T*>(weight)[panel.channel + l] : T(0);
  }
}

// Samples, steps and ratios of a chunk.
template <class Scalar, class V>
void load_chunk(const Problem& p, const Panel& panel, std::int64_t first, std::int64_t ahead,
                std::int64_t method, Chunk<V>& c) {
  using T = Real<V>;
  c.first = first;
  c.ahead = ahead;
  c.steps = static_cast<int>(std::min<std::int64_t>(kSteps, p.length - first));
  c.is_first = first == 0;
  c.is_last = first + c.steps == p.length;
  const bool alone = taps_of(static_cast<int>(method)) == 1;
  c.left = alone ? 0 : kLeft;
  c.right = alone ? 0 : kRight;
  T bias[kLanes];
  load_weight(p.delta_bias, panel, bias);
  load_rows<Scalar>(p, panel, p.u, first, c.ahead, -c.left, c.steps + c.right, c.u);
  load_rows<Scalar>(p, panel, p.delta, first, c.ahead, -c.left, c.steps + c.right, c.d);
  steps_loop(c.d, -c.left, c.steps + c.right, bias, p.softplus);
  const int neighbour = neighbour_of(static_cast<int>(method));
  for (int step = -1; neighbour != 0 && step < c.steps; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      c.ratio(step, l) = l < panel.lanes ? c.d(step + neighbour, l) / c.d(step, l) : T(1);
    }
  }
}

// Variable B or C of one state around a chunk.
template <class Scalar, class V>
void load_matrix(const Problem& p, const Panel& panel, const void* matrix, std::int64_t n,
                 const Chunk<V>& c, V* out) {
  constexpr int kParts = is_complex_type<V> ? 2 : 1;
  const Scalar* row = static_cast<const Scalar*>(matrix) +
                      ((panel.batch * p.groups + panel.group) * p.states + n) * p.length * kParts;
  // All panels share these rows, so they are near, and a long time ahead others would have taken their place: those of
  // the states that follow, or of the chunk that does.
  const bool follows = n + kTogether < p.states;
  prefetch_row(p, follows ? row + kTogether * p.length * kParts : row,
               follows ? c.first : (c.first + c.ahead) / 2, kParts);
  const Scalar* start = row + (p.reverse ? p.length - 1 - c.first : c.first) * kParts;
  const Inside inside = inside_of(p, c.first, -c.left, c.steps + c.right);
  const auto one = [&](int step, std::ptrdiff_t at) {
    const Scalar* from = start + at * kParts;
    if constexpr (is_complex_type<V>) {
      out[step + kLeft] = {load(from[0]), load(from[1])};
    } else {
      out[step + kLeft] = load(*from);
    }
  };
  if (std::is_same_v<Scalar, V> && !p.reverse) {
    std::memcpy(out + inside.begin + kLeft, start + inside.begin,
                static_cast<std::size_t>(inside.end - inside.begin) * sizeof(V));
  } else {
    along(p, inside.begin, inside.end, one);
  }
  const auto repeat = [&](int from, int begin, int end) {
    std::fill(out + begin + kLeft, out + end + kLeft, out[from + kLeft]);
  };
  repeat(inside.begin, -c.left, inside.begin);
  repeat(inside.end - 1, inside.end, c.steps + c.right);
}

// Of `count` states from n on. Beyond the last one they are zeros, which change nothing.
template <class Scalar, class V>
void load_matrices(const Problem& p, const Panel& panel, std::int64_t n, int count, Chunk<V>& c) {
  const auto load_variable = [&](const void* matrix, std::int64_t state, auto& out) {
    if (state < p.states) return load_matrix<Scalar>(p, panel, matrix, state, c, out);
    std::fill(std::begin(out), std::end(out), V{});
  };
  for (int i = 0; i < count; ++i) {
    if (!p.constant_B) load_variable(p.B, n + i, c.b[i]);
    if (!p.constant_C) load_variable(p.C, n + i, c.c[i]);
  }
}

// Its matrices are ones where they are constant; its ratios are ones until a rule has others.
template <class V>
std::unique_ptr<Chunk<V>> chunk_of(const Problem& p) {
  auto c = std::make_unique<Chunk<V>>();
  const auto value = [](bool constant) { return number<V>(Real<V>(constant ? 1 : 0)); };
  for (int i = 0; i < kTogether; ++i) {
    std::fill_n(c->b[i], std::size(c->b[i]), value(p.constant_B));
    std::fill_n(c->c[i], std::size(c->c[i]), value(p.constant_C));
  }
  for (auto& step : c->ratio.at) std::fill_n(step, kLanes, Real<V>(1));
  return c;
}

template <class V>
void load_lanes(const Problem& p, const Panel& panel, const void* matrix, std::int64_t n,
                V otherwise, V* out) {
  for (int l = 0; l < kLanes; ++l) {
    out[l] = matrix && l < panel.lanes
                 ? static_cast<const V*>(matrix)[(panel.channel + l) * p.states + n]
                 : otherwise;
  }
}

// What of a state stays the same along a row.
template <class V>
void load_state(const Problem& p, const Panel& panel, std::int64_t n, Forward<V>& s) {
  const V zero = V{}, one = number<V>(Real<V>(1));
  load_lanes(p, panel, p.A, n, zero, s.a);
  load_lanes(p, panel, p.constant_B ? p.B : nullptr, n, one, s.b);
  load_lanes(p, panel, p.constant_C ? p.C : nullptr, n, one, s.c);
}

// The states before a chunk, or behind the last one, are a row of memory for each channel.
template <class V>
void store_states(const Problem& p, const Panel& panel, const Forward<V>* states,
                  std::int64_t stride, V* to) {
  for (int l = 0; l < panel.lanes; ++l) {
    for (std::int64_t n = 0; n < p.states; ++n) to[l * stride + n] = states[n].value[l];
  }
}
template <class V, class State>
void load_states(const Problem& p, const Panel& panel, const V* from, std::int64_t stride,
                 State* states) {
  for (int l = 0; l < panel.lanes; ++l) {
    for (std::int64_t n = 0; n < p.states; ++n) states[n].value[l] = from[l * stride + n];
  }
}

// ---- forward ----

template <class Scalar, class V>
void write_outputs(const Args& args, const Panel& panel, Chunk<V>& c) {
  const Problem& p = args.problem;
  Real<V> skip[kLanes];
  load_weight(p.D, panel, skip);
  outputs(c, skip);
  if (p.z.data) {
    load_rows<Scalar>(p, panel, p.z, c.first, c.ahead, 0, c.steps, c.g);
    gate_loop(c.y, c.g, 0, c.steps);
  }
  store_rows<Scalar>(p, panel, c.first, c.ahead, c.steps, c.y, args.out);
}

// `states`: one more than there are where their number is odd.
template <class Scalar, class V>
void run_panel(const Args& args, const Panel& panel, std::int64_t method, Forward<V>* states,
               Chunk<V>& c) {
  const Problem& p = args.problem;
  auto* kept = static_cast<V*>(args.checkpoints);
  const auto* initial = static_cast<const V*>(args.initial_state);
  const std::int64_t row = panel.batch * p.dim + panel.channel;
  for (std::int64_t n = 0; n < p.states; ++n) {
    states[n] = {};
    load_state(p, panel, n, states[n]);
  }
  // What is not finite would stay in the state beyond the last one.
  if (p.states % kTogether != 0) states[p.states] = {};
  if (initial) load_states(p, panel, initial + row * p.states, p.states, states);
  const bool constant = p.constant_B || p.constant_C;
  for (std::int64_t first = 0; first < p.length; first += kSteps) {
    load_chunk<Scalar>(p, panel, first, first + kAhead, method, c);
    zero_steps(c.y);
    if (kept && first > 0) {
      const std::int64_t pitch = (p.tiles - 1) * p.states;
      store_states(p, panel, states, pitch, kept + row * pitch + (first / kSteps - 1) * p.states);
    }
    for (std::int64_t n = 0; n < p.states; n += kTogether) {
      load_matrices<Scalar>(p, panel, n, kTogether, c);
      run_states(c, states + n, method, constant);
    }
    write_outputs<Scalar>(args, panel, c);
  }
  store_states(p, panel, states, p.states, static_cast<V*>(args.last_state) + row * p.states);
}

// ---- backward ----

// The gradient of the sum over states.
template <class Scalar, class V>
void load_gradient(const BackwardArgs& args, const Panel& panel, Chunk<V>& c) {
  const Problem& p = args.problem;
  const int begin = c.left > 0 ? -1 : 0;
  load_rows<Scalar>(p, panel, args.grad_out, c.first, c.ahead, begin, c.steps, c.g);
  if (!p.z.data) return;
  load_rows<Scalar>(p, panel, p.z, c.first, c.ahead, begin, c.steps, c.y);
  gate_loop(c.g, c.y, begin, c.steps);
}

// What the ratios of true-time rules give to the steps of both sides; `behind` is what this chunk has for the step before.
template <class V>
void add_ratios(std::int64_t method, int lanes, Chunk<V>& c, Real<V>* behind) {
  const int neighbour = neighbour_of(static_cast<int>(method));
  for (int l = 0; l < lanes; ++l) {
    for (int step = -1; step < c.steps; ++step) {
      const Real<V> scaled = c.grad_ratio(step, l) / c.d(step, l);
      const bool at_end =
          neighbour > 0 ? c.is_last && step == c.steps - 1 : c.is_first && step == 0;
      const int to = at_end ? step : step + neighbour;
      if (step >= 0) c.grad_d(step, l) -= scaled * c.ratio(step, l);
      if (to < 0 || to == c.steps) continue;
      if (step >= 0 || neighbour > 0) c.grad_d(to, l) += scaled;
    }
    if (neighbour > 0) continue;
    c.grad_d(c.steps - 1, l) += behind[l];
    behind[l] = c.grad_ratio(0, l) / c.d(0, l);
  }
}

// The gradients along positions of a chunk; adds to those of D and delta_bias.
template <class Scalar, class V>
void write_gradients(const BackwardArgs& args, const Panel& panel, Chunk<V>& c, Real<V>* of_D,
                     Real<V>* of_bias) {
  const Problem& p = args.problem;
  Real<V> skip[kLanes], bias[kLanes];
  load_weight(p.D, panel, skip);
  load_weight(p.delta_bias, panel, bias);
  if (p.softplus) load_rows<Scalar>(p, panel, p.delta, c.first, c.ahead, 0, c.steps, c.d);
  gradients_loop(c, c.d, skip, bias, p.softplus, of_D, of_bias);
  store_rows<Scalar>(p, panel, c.first, c.ahead, c.steps, c.grad_u, args.grad_u);
  store_rows<Scalar>(p, panel, c.first, c.ahead, c.steps, c.grad_d, args.grad_delta);
  if (!p.z.data) return;
  load_rows<Scalar>(p, panel, p.z, c.first, c.ahead, 0, c.steps, c.d);
  load_rows<Scalar>(p, panel, args.grad_out, c.first, c.ahead, 0, c.steps, c.g);
  outputs(c, skip);
  gate_gradient_loop(c, c.d);
  store_rows<Scalar>(p, panel, c.first, c.ahead, c.steps, c.g, args.grad_z);
}

// Adds a chunk's gradient of a variable matrix to the part of this piece.
template <class V>
void add_matrix(const Problem& p, const Panel& panel, std::int64_t n, const Chunk<V>& c,
                const V* of_step, void* gradient, std::int64_t piece) {
  V* row = static_cast<V*>(gradient) +
           (((piece * p.batch + panel.batch) * p.groups + panel.group) * p.states + n) * p.length;
  prefetch_row(p, row, c.ahead);
  V* to = start_of(p, row, c.first);
  along(p, 0, c.steps, [&](int step, std::ptrdiff_t at) { to[at] = to[at] + of_step[step]; });
}

template <class Scalar, class V>
void run_chunk_backward(const BackwardArgs& args, const Panel& panel, std::int64_t method,
                        std::int64_t piece, Backward<V>* states, Chunk<V>& c) {
  const Problem& p = args.problem;
  const auto* kept = static_cast<const V*>(args.checkpoints);
  const auto* initial = static_cast<const V*>(args.initial_state);
  const std::int64_t row = panel.batch * p.dim + panel.channel;
  const bool constant = p.constant_B || p.constant_C;
  for (Sheet<Real<V>>* sheet : {&c.y, &c.grad_u, &c.grad_d, &c.grad_ratio}) zero_steps(*sheet);
  if (c.first > 0) {
    const std::int64_t pitch = (p.tiles - 1) * p.states;
    load_states(p, panel, kept + row * pitch + (c.first / kSteps - 1) * p.states, pitch, states);
  } else if (initial) {
    load_states(p, panel, initial + row * p.states, p.states, states);
  } else {
    for (std::int64_t n = 0; n < p.states; ++n) std::fill_n(states[n].value, kLanes, V{});
  }
  for (std::int64_t n = 0; n < p.states; ++n) {
    load_matrices<Scalar>(p, panel, n, 1, c);
    run_states(c, states + n, method, constant);
    finish_state(c, states[n], method, constant);
    if (!p.constant_B) add_matrix(p, panel, n, c, c.grad_b, args.grad_B, piece);
    if (!p.constant_C) add_matrix(p, panel, n, c, c.grad_c, args.grad_C, piece);
  }
}

template <class Scalar, class V>
void run_panel_backward(const BackwardArgs& args, const Panel& panel, std::int64_t method,
                        std::int64_t piece, Backward<V>* states, Chunk<V>& c) {
  using T = Real<V>;
  const Problem& p = args.problem;
  const std::int64_t row = panel.batch * p.dim + panel.channel;
  const auto* last = static_cast<const V*>(args.grad_last_state);
  T behind[kLanes] = {}, of_D[kLanes] = {}, of_bias[kLanes] = {};
  for (std::int64_t n = 0; n < p.states; ++n) {
    states[n] = {};
    load_state(p, panel, n, states[n]);
    for (int l = 0; last && l < panel.lanes; ++l) {
      states[n].adjoint[l] = last[(row + l) * p.states + n];
    }
  }
  for (std::int64_t first = (p.length - 1) / kSteps * kSteps; first >= 0; first -= kSteps) {
    load_chunk<Scalar>(p, panel, first, first - kAhead, method, c);
    load_gradient<Scalar>(args, panel, c);
    run_chunk_backward<Scalar>(args, panel, method, piece, states, c);
    if (neighbour_of(static_cast<int>(method)) != 0) add_ratios(method, panel.lanes, c, behind);
    write_gradients<Scalar>(args, panel, c, of_D, of_bias);
  }
  for (int l = 0; l < panel.lanes; ++l) {
    if (args.grad_D) static_cast<T*>(args.grad_D)[row + l] = of_D[l];
    if (args.grad_delta_bias) static_cast<T*>(args.grad_delta_bias)[row + l] = of_bias[l];
    for (std::int64_t n = 0; n < p.states; ++n) {
      const std::int64_t at = (row + l) * p.states + n;
      static_cast<V*>(args.grad_A)[at] = states[n].of_a[l];
      if (args.grad_initial_state) {
        static_cast<V*>(args.grad_initial_state)[at] = states[n].adjoint[l];
      }
      if (p.constant_B) static_cast<V*>(args.grad_B)[at] = states[n].of_b[l];
      if (p.constant_C) static_cast<V*>(args.grad_C)[at] = states[n].of_c[l];
    }
  }
}

// ---- threads ----

// Calls f.operator()<Scalar, V>() with the types of inputs and states.
template <class F>
void with_types(const ScanInputs& in, const F& f) {
  with_float(in.dtype(), [&]<class Scalar>() {
    if (in.is_complex) {
      f.template operator()<Scalar, Complex<Acc<Scalar>>>();
    } else {
      f.template operator()<Scalar, Acc<Scalar>>();
    }
  });
}

// Of a panel's work.
std::int64_t nanoseconds(const Problem& p) { return p.length * p.states * kLanes; }

// Pieces of the channels of a group, each with a gradient of variable B and C of its own; their number depends on sizes
// alone, so that sums do not depend on the number of threads.
constexpr std::int64_t kPieces = 32;
std::int64_t pieces_of(const Problem& p) {
  const std::int64_t wanted = (kPieces + p.batch * p.groups - 1) / (p.batch * p.groups);
  return std::min(panels_of(p), wanted);
}

template <class T>
void sum_parts(const Tensor& parts, std::int64_t count, const Tensor& result) {
  with_float(result.scalar_type(), [&]<class Scalar>() {
    const T* from = data<T>(parts);
    auto* to = mutable_data<Scalar>(result);
    const std::int64_t n = result.numel();
    parallel_for(n, count, [&](std::int64_t begin, std::int64_t end) {
      constexpr std::int64_t kBlock = 64;
      for (std::int64_t first = begin; first < end; first += kBlock) {
        const std::int64_t block = std::min(kBlock, end - first);
        T sum[kBlock] = {};
        for (std::int64_t part = 0; part < count; ++part) {
          for (std::int64_t i = 0; i < block; ++i) sum[i] += from[part * n + first + i];
        }
        for (std::int64_t i = 0; i < block; ++i) {
          store(to[first + i], static_cast<Acc<Scalar>>(sum[i]));
        }
      }
    });
  });
}

}  // namespace

void run_scan_cpu(const ScanPlan& plan) {
  const Problem& p = plan.args.problem;
  const std::int64_t panels = panels_of(p);
  with_types(plan.inputs, [&]<class Scalar, class V>() {
    parallel_for(p.batch * p.groups * panels, nanoseconds(p),
                 [&](std::int64_t begin, std::int64_t end) {
                   const auto chunk = chunk_of<V>(p);
                   const auto states = std::make_unique<Forward<V>[]>(
                       static_cast<std::size_t>(p.states + p.states % kTogether));
                   for (std::int64_t i = begin; i < end; ++i) {
                     run_panel<Scalar>(plan.args, panel_of(p, i / panels, i % panels),
                                       plan.inputs.method, states.get(), *chunk);
                   }
                 });
  });
}

void run_scan_backward_cpu(ScanBackwardPlan& plan) {
  const Problem& p = plan.args.problem;
  const std::int64_t panels = panels_of(p), pieces = pieces_of(p);
  const ScanSums sums = make_sums(plan, pieces);
  make_results(plan);
  with_types(plan.inputs, [&]<class Scalar, class V>() {
    const std::int64_t cost = 4 * nanoseconds(p) * panels / pieces;
    parallel_for(p.batch * p.groups * pieces, cost, [&](std::int64_t begin, std::int64_t end) {
      const auto chunk = chunk_of<V>(p);
      const auto states = std::make_unique<Backward<V>[]>(static_cast<std::size_t>(p.states));
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t piece = i % pieces;
        for (std::int64_t panel = piece * panels / pieces; panel < (piece + 1) * panels / pieces;
             ++panel) {
          run_panel_backward<Scalar>(plan.args, panel_of(p, i / pieces, panel), plan.inputs.method,
                                     piece, states.get(), *chunk);
        }
      }
    });
    using T = Real<V>;
    const ScanGradients& g = plan.gradients;
    const auto add = [&](const Tensor& from, const Tensor& to, std::int64_t count) {
      if (to.numel() > 0) sum_parts<T>(from, count, to);
    };
    add(sums.A, g.A, p.batch);
    add(sums.D, g.D, p.batch);
    add(sums.delta_bias, g.delta_bias, p.batch);
    add(sums.B, g.B, p.constant_B ? p.batch : pieces);
    add(sums.C, g.C, p.constant_C ? p.batch : pieces);
  });
}

}  // namespace torchkiln::bindings
