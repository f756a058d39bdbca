// selective_scan on the CPU: kLanes channels of a group side by side, the positions one after the other. As on the GPU a
// chunk of positions is gone through once for each state, and the backward computes the states of a chunk again.
// SPDX-License-Identifier: Apache-2.0
#if defined(__GNUC__) && !defined(__clang__)
// A comparison might raise a floating-point exception, and g++ keeps that, at the price of no vectors.
#pragma GCC optimize("O3", "no-trapping-math")
#endif
#include <algorithm>
#include <cstddef>
#include <memory>

#include "bindings/scan/selective_scan.h"
#include "bindings/support/parallel.h"

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

constexpr int kLanes = 16, kSteps = kCheckpoint;
// Positions beside a chunk that a rule, or what the position before the chunk needs, takes in.
constexpr int kLeft = 2, kRight = 1;

// A number for each position of a chunk and beside it, and each channel.
template <class T>
struct Sheet {
  T at[kLeft + kSteps + kRight][kLanes];
  T* operator[](int step) { return at[step + kLeft]; }
  const T* operator[](int step) const { return at[step + kLeft]; }
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

std::int64_t memory_of(const Problem& p, std::int64_t position) {
  const std::int64_t inside = std::clamp<std::int64_t>(position, 0, p.length - 1);
  return p.reverse ? p.length - 1 - inside : inside;
}

// Where the positions of a chunk and beside it lie in memory; those beyond the ends are those at the ends.
struct Places {
  std::int64_t at[kLeft + kSteps + kRight];
  std::int64_t operator[](int step) const { return at[step + kLeft]; }
};

// What a chunk is computed from and into. Lanes without a channel hold zeros.
template <class V>
struct Chunk {
  using T = Real<V>;
  std::int64_t first;
  int steps;
  bool is_first, is_last;
  Places places;
  Sheet<T> u, d, ratio, g, y, grad_u, grad_d, grad_ratio;
  Sheet<V> v, alpha, state, grad_v;
  // Of one state: A; B and C as a factor of the position and one of the channel, of which one is 1.
  V a[kLanes], b_lane[kLanes], c_lane[kLanes];
  V b_step[kLeft + kSteps + kRight], c_step[kLeft + kSteps + kRight];
  V grad_b_step[kLeft + kSteps + kRight], grad_c_step[kLeft + kSteps + kRight];
  V of_a[kLanes], of_b[kLanes], of_c[kLanes];
  V entering[kLanes], adjoint[kLanes], pushed[2][kLanes];
};

// ---- loops over one state ----

template <int kMethod, class V>
inline V held(const V* weight, const Sheet<V>& v, int step, int lane) {
  V sum = weight[0] * v[step - back_of(kMethod)][lane];
  for (int j = 1; j < taps_of(kMethod); ++j) {
    sum = sum + weight[j] * v[step - back_of(kMethod) + j][lane];
  }
  return sum;
}

template <class V>
inline void sample(Chunk<V>& c) {
  for (int step = -kLeft; step < c.steps + kRight; ++step) {
    const V b = c.b_step[step + kLeft];
    for (int l = 0; l < kLanes; ++l) c.v[step][l] = c.u[step][l] * (b * c.b_lane[l]);
  }
}

template <int kMethod, class V>
inline void forward_loop(Chunk<V>& c) {
  sample(c);
  for (int step = 0; step < c.steps; ++step) {
    const V now = c.c_step[step + kLeft];
    for (int l = 0; l < kLanes; ++l) {
      const auto k = selective_scan::coefficients<kMethod>(c.d[step][l], c.a[l], c.ratio[step][l]);
      c.entering[l] =
          k.alpha * c.entering[l] + c.d[step][l] * held<kMethod>(k.weight, c.v, step, l);
      c.y[step][l] += inner(now * c.c_lane[l], conjugate(c.entering[l]));
    }
  }
}

// Once more, keeping what the adjoints need.
template <int kMethod, class V>
inline void replay_loop(Chunk<V>& c) {
  sample(c);
  for (int l = 0; l < kLanes; ++l) c.state[-1][l] = c.entering[l];
  for (int step = 0; step < c.steps; ++step) {
    const V now = c.c_step[step + kLeft];
    for (int l = 0; l < kLanes; ++l) {
      const auto k = selective_scan::coefficients<kMethod>(c.d[step][l], c.a[l], c.ratio[step][l]);
      const V state =
          k.alpha * c.state[step - 1][l] + c.d[step][l] * held<kMethod>(k.weight, c.v, step, l);
      c.alpha[step][l] = k.alpha;
      c.state[step][l] = state;
      c.y[step][l] += inner(now * c.c_lane[l], conjugate(state));
    }
  }
}

// The gradients of one step, given lambda.
template <int kMethod, class V>
inline void step_gradients(Chunk<V>& c, int step, int l, V lambda) {
  using T = Real<V>;
  const T d = c.d[step][l];
  const auto s = selective_scan::slopes<kMethod>(d * c.a[l], c.ratio[step][l], c.alpha[step][l]);
  const V by_z =
      s.by_z.alpha * c.state[step - 1][l] + d * held<kMethod>(s.by_z.weight, c.v, step, l);
  const V of_z = lambda * conjugate(by_z);
  c.of_a[l] = c.of_a[l] + d * of_z;
  c.grad_d[step][l] +=
      inner(of_z, c.a[l]) + inner(lambda, held<kMethod>(s.value.weight, c.v, step, l));
  if constexpr (neighbour_of(kMethod) != 0) {
    c.grad_ratio[step][l] += inner(lambda, d * held<kMethod>(s.by_ratio, c.v, step, l));
  }
  for (int j = 0; j < taps_of(kMethod); ++j) {
    V& to = c.grad_v[step + j - back_of(kMethod)][l];
    to = to + (d * conjugate(s.value.weight[j])) * lambda;
  }
}

// What the position before the chunk has for its first sample and step, when a rule looks ahead.
template <int kMethod, class V>
inline void gradients_from_before(Chunk<V>& c) {
  using T = Real<V>;
  const T factor = is_complex_type<V> ? T(2) : T(1);
  for (int l = 0; l < kLanes; ++l) {
    const V output = c.c_step[kLeft - 1] * c.c_lane[l];
    const V lambda = (factor * c.g[-1][l]) * conjugate(output) + c.adjoint[l];
    const T d = c.d[-1][l];
    const auto s = selective_scan::slopes<kMethod>(d * c.a[l], c.ratio[-1][l]);
    const V push = (d * conjugate(s.value.weight[taps_of(kMethod) - 1])) * lambda;
    c.grad_v[0][l] = c.grad_v[0][l] + push;
    if constexpr (neighbour_of(kMethod) != 0) {
      c.grad_ratio[-1][l] += inner(lambda, d * held<kMethod>(s.by_ratio, c.v, -1, l));
    }
  }
}

template <int kMethod, class V>
inline void backward_loop(Chunk<V>& c) {
  using T = Real<V>;
  const T factor = is_complex_type<V> ? T(2) : T(1);
  const V zero = number<V>(T(0));
  replay_loop<kMethod>(c);
  for (int step = -kLeft; step < c.steps + kRight; ++step) {
    for (int l = 0; l < kLanes; ++l) c.grad_v[step][l] = zero;
  }
  // What the chunk behind has for the last samples of this one.
  for (int j = 0; j < back_of(kMethod); ++j) {
    for (int l = 0; l < kLanes; ++l) c.grad_v[c.steps - 1 - j][l] = c.pushed[j][l];
  }
  for (int step = c.steps - 1; step >= 0; --step) {
    const V now = c.c_step[step + kLeft];
    V by_c[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const V lambda = (factor * c.g[step][l]) * conjugate(now * c.c_lane[l]) + c.adjoint[l];
      by_c[l] = (factor * c.g[step][l]) * conjugate(c.state[step][l]);
      c.adjoint[l] = conjugate(c.alpha[step][l]) * lambda;
      c.of_c[l] = c.of_c[l] + by_c[l];
      step_gradients<kMethod>(c, step, l, lambda);
    }
    V sum = zero;
    for (int l = 0; l < kLanes; ++l) sum = sum + by_c[l];
    c.grad_c_step[step + kLeft] = sum;
  }
  if (ahead_of(kMethod) > 0 && !c.is_first) gradients_from_before<kMethod>(c);
  // Samples beyond the ends are those at the ends.
  for (int l = 0; l < kLanes; ++l) {
    for (int j = 0; j < 2; ++j) c.pushed[j][l] = c.grad_v[-1 - j][l];
    if (c.is_first) c.grad_v[0][l] = c.grad_v[0][l] + c.grad_v[-1][l] + c.grad_v[-2][l];
    if (c.is_last) c.grad_v[c.steps - 1][l] = c.grad_v[c.steps - 1][l] + c.grad_v[c.steps][l];
  }
  for (int step = 0; step < c.steps; ++step) {
    const V b = c.b_step[step + kLeft];
    V by_b[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      by_b[l] = c.u[step][l] * c.grad_v[step][l];
      c.of_b[l] = c.of_b[l] + by_b[l];
      c.grad_u[step][l] += inner(c.grad_v[step][l], b * c.b_lane[l]);
    }
    V sum = zero;
    for (int l = 0; l < kLanes; ++l) sum = sum + by_b[l];
    c.grad_b_step[step + kLeft] = sum;
  }
}

// What runs for each state of a chunk. Both are named functions, because only those have a body per instruction set.
template <bool kBackward, class V>
inline void state_loop(Chunk<V>& c, std::int64_t method) {
  const auto run = [&]<int kMethod>() {
    if constexpr (kBackward) {
      backward_loop<kMethod>(c);
    } else {
      forward_loop<kMethod>(c);
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

TORCHKILN_SCAN_LOOPS void forward_state(Chunk<float>& c, std::int64_t method) {
  state_loop<false>(c, method);
}
TORCHKILN_SCAN_LOOPS void backward_state(Chunk<float>& c, std::int64_t method) {
  state_loop<true>(c, method);
}
template <class V>
void forward_state(Chunk<V>& c, std::int64_t method) {
  state_loop<false>(c, method);
}
template <class V>
void backward_state(Chunk<V>& c, std::int64_t method) {
  state_loop<true>(c, method);
}

// ---- loops over positions ----

TORCHKILN_SCAN_LOOPS void steps_loop(Sheet<float>& d, int begin, int end, const float* bias,
                                     bool softplus) {
  for (int step = begin; step < end; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      const float x = d[step][l] + bias[l];
      d[step][l] = softplus ? softplus_of(x) : x;
    }
  }
}
void steps_loop(Sheet<double>& d, int begin, int end, const double* bias, bool softplus) {
  for (int step = begin; step < end; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      const double x = d[step][l] + bias[l];
      d[step][l] = softplus ? softplus_of(x) : x;
    }
  }
}

// y times silu(z).
template <class T>
inline void gate(Sheet<T>& y, const Sheet<T>& z, int begin, int end) {
  for (int step = begin; step < end; ++step) {
    for (int l = 0; l < kLanes; ++l) y[step][l] *= z[step][l] * sigmoid_of(z[step][l]);
  }
}
TORCHKILN_SCAN_LOOPS void gate_loop(Sheet<float>& y, const Sheet<float>& z, int begin, int end) {
  gate(y, z, begin, end);
}
void gate_loop(Sheet<double>& y, const Sheet<double>& z, int begin, int end) {
  gate(y, z, begin, end);
}

template <class Scalar>
const Scalar* row_of(const Rows& rows, const Panel& panel, int lane) {
  return static_cast<const Scalar*>(rows.data) + panel.batch * rows.batch +
         (panel.channel + lane) * rows.channel;
}

// A row of each channel, from `begin` to `end` around the chunk.
template <class Scalar, class T>
void load_rows(const Panel& panel, const Rows& rows, const Places& places, int begin, int end,
               Sheet<T>& out) {
  for (int l = 0; l < panel.lanes; ++l) {
    const Scalar* row = row_of<Scalar>(rows, panel, l);
    for (int step = begin; step < end; ++step) out[step][l] = load(row[places[step]]);
  }
  for (int step = begin; step < end; ++step) {
    for (int l = panel.lanes; l < kLanes; ++l) out[step][l] = T(0);
  }
}

template <class Scalar, class T>
void store_rows(const Problem& p, const Panel& panel, const Places& places, int steps,
                const Sheet<T>& values, void* out) {
  for (int l = 0; l < panel.lanes; ++l) {
    Scalar* row = static_cast<Scalar*>(out) + (panel.batch * p.dim + panel.channel + l) * p.length;
    for (int step = 0; step < steps; ++step) {
      store(row[places[step]], values[step][l]);
    }
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
void load_chunk(const Problem& p, const Panel& panel, std::int64_t first, std::int64_t method,
                Chunk<V>& c) {
  using T = Real<V>;
  c.first = first;
  c.steps = static_cast<int>(std::min<std::int64_t>(kSteps, p.length - first));
  c.is_first = first == 0;
  c.is_last = first + c.steps == p.length;
  for (int step = -kLeft; step < c.steps + kRight; ++step) {
    c.places.at[step + kLeft] = memory_of(p, first + step);
  }
  T bias[kLanes];
  load_weight(p.delta_bias, panel, bias);
  load_rows<Scalar>(panel, p.u, c.places, -kLeft, c.steps + kRight, c.u);
  load_rows<Scalar>(panel, p.delta, c.places, -kLeft, c.steps + kRight, c.d);
  steps_loop(c.d, -kLeft, c.steps + kRight, bias, p.softplus);
  const int neighbour = neighbour_of(static_cast<int>(method));
  for (int step = -1; step < c.steps; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      const bool is_step = neighbour != 0 && l < panel.lanes;
      c.ratio[step][l] = is_step ? c.d[step + neighbour][l] / c.d[step][l] : T(1);
    }
  }
}

// B or C of one state around a chunk, as factors of positions and channels.
template <class Scalar, class V>
void load_matrix(const Problem& p, const Panel& panel, const void* matrix, bool constant,
                 std::int64_t n, const Chunk<V>& c, V* of_step, V* of_lane) {
  const V one = number<V>(Real<V>(1));
  if (constant) {
    std::fill_n(of_step, kLeft + c.steps + kRight, one);
    for (int l = 0; l < panel.lanes; ++l) {
      of_lane[l] = static_cast<const V*>(matrix)[(panel.channel + l) * p.states + n];
    }
    std::fill(of_lane + panel.lanes, of_lane + kLanes, one);
    return;
  }
  constexpr int kParts = is_complex_type<V> ? 2 : 1;
  const Scalar* row = static_cast<const Scalar*>(matrix) +
                      ((panel.batch * p.groups + panel.group) * p.states + n) * p.length * kParts;
  for (int step = -kLeft; step < c.steps + kRight; ++step) {
    const std::int64_t at = c.places[step] * kParts;
    if constexpr (is_complex_type<V>) {
      of_step[step + kLeft] = {load(row[at]), load(row[at + 1])};
    } else {
      of_step[step + kLeft] = load(row[at]);
    }
  }
  std::fill_n(of_lane, kLanes, one);
}

template <class Scalar, class V>
void load_state(const Problem& p, const Panel& panel, std::int64_t n, Chunk<V>& c) {
  for (int l = 0; l < kLanes; ++l) {
    c.a[l] = l < panel.lanes ? static_cast<const V*>(p.A)[(panel.channel + l) * p.states + n]
                             : number<V>(Real<V>(0));
  }
  load_matrix<Scalar>(p, panel, p.B, p.constant_B, n, c, c.b_step, c.b_lane);
  load_matrix<Scalar>(p, panel, p.C, p.constant_C, n, c, c.c_step, c.c_lane);
}

template <class T>
void zero_steps(Sheet<T>& sheet) {
  for (auto& step : sheet.at) std::fill_n(step, kLanes, T(0));
}

// ---- forward ----

template <class Scalar, class V>
void write_outputs(const Args& args, const Panel& panel, Chunk<V>& c) {
  using T = Real<V>;
  const Problem& p = args.problem;
  T skip[kLanes];
  load_weight(p.D, panel, skip);
  for (int step = 0; step < c.steps; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      c.y[step][l] = (is_complex_type<V> ? T(2) : T(1)) * c.y[step][l] + skip[l] * c.u[step][l];
    }
  }
  if (p.z.data) {
    load_rows<Scalar>(panel, p.z, c.places, 0, c.steps, c.g);
    gate_loop(c.y, c.g, 0, c.steps);
  }
  store_rows<Scalar>(p, panel, c.places, c.steps, c.y, args.out);
}

template <class Scalar, class V>
void run_panel(const Args& args, const Panel& panel, std::int64_t method, Chunk<V>& c) {
  const Problem& p = args.problem;
  auto* last = static_cast<V*>(args.last_state);
  auto* kept = static_cast<V*>(args.checkpoints);
  const auto* initial = static_cast<const V*>(args.initial_state);
  const std::int64_t row = panel.batch * p.dim + panel.channel;
  for (std::int64_t i = row * p.states; i < (row + panel.lanes) * p.states; ++i) {
    last[i] = initial ? initial[i] : number<V>(Real<V>(0));
  }
  for (std::int64_t first = 0; first < p.length; first += kSteps) {
    load_chunk<Scalar>(p, panel, first, method, c);
    zero_steps(c.y);
    for (std::int64_t n = 0; n < p.states; ++n) {
      load_state<Scalar>(p, panel, n, c);
      for (int l = 0; l < kLanes; ++l) {
        c.entering[l] = number<V>(Real<V>(0));
        if (l >= panel.lanes) continue;
        c.entering[l] = last[(row + l) * p.states + n];
        if (kept) {
          kept[((row + l) * p.checkpoints + first / kSteps) * p.states + n] = c.entering[l];
        }
      }
      forward_state(c, method);
      for (int l = 0; l < panel.lanes; ++l) last[(row + l) * p.states + n] = c.entering[l];
    }
    write_outputs<Scalar>(args, panel, c);
  }
}

// ---- backward ----

// What is carried from chunk to chunk for each state of a panel.
template <class V>
struct Carry {
  V adjoint[kLanes], pushed[2][kLanes], of_a[kLanes], of_b[kLanes], of_c[kLanes];
};

template <class V>
void exchange(Chunk<V>& c, Carry<V>& carry) {
  std::swap(c.adjoint, carry.adjoint);
  std::swap(c.pushed, carry.pushed);
  std::swap(c.of_a, carry.of_a);
  std::swap(c.of_b, carry.of_b);
  std::swap(c.of_c, carry.of_c);
}

// The gradient of the sum over states.
template <class Scalar, class V>
void load_gradient(const BackwardArgs& args, const Panel& panel, Chunk<V>& c) {
  const Problem& p = args.problem;
  load_rows<Scalar>(panel, args.grad_out, c.places, -1, c.steps, c.g);
  if (!p.z.data) return;
  auto z = std::make_unique<Sheet<Real<V>>>();
  load_rows<Scalar>(panel, p.z, c.places, -1, c.steps, *z);
  gate_loop(c.g, *z, -1, c.steps);
}

// What the ratios of true-time rules give to the steps of both sides; `behind` is what this chunk has for the step before.
template <class V>
void add_ratios(std::int64_t method, int lanes, Chunk<V>& c, Real<V>* behind) {
  const int neighbour = neighbour_of(static_cast<int>(method));
  for (int l = 0; l < lanes; ++l) {
    for (int step = -1; step < c.steps; ++step) {
      const Real<V> scaled = c.grad_ratio[step][l] / c.d[step][l];
      const bool at_end =
          neighbour > 0 ? c.is_last && step == c.steps - 1 : c.is_first && step == 0;
      const int to = at_end ? step : step + neighbour;
      if (step >= 0) c.grad_d[step][l] -= scaled * c.ratio[step][l];
      if (to < 0 || to == c.steps) continue;
      if (step >= 0 || neighbour > 0) c.grad_d[to][l] += scaled;
    }
    if (neighbour > 0) continue;
    c.grad_d[c.steps - 1][l] += behind[l];
    behind[l] = c.grad_ratio[0][l] / c.d[0][l];
  }
}

// The gradients along positions of a chunk; adds to those of D and delta_bias.
template <class Scalar, class V>
void write_gradients(const BackwardArgs& args, const Panel& panel, Chunk<V>& c, Real<V>* of_D,
                     Real<V>* of_bias) {
  using T = Real<V>;
  const Problem& p = args.problem;
  T skip[kLanes], bias[kLanes];
  load_weight(p.D, panel, skip);
  load_weight(p.delta_bias, panel, bias);
  if (p.softplus) load_rows<Scalar>(panel, p.delta, c.places, 0, c.steps, c.d);
  for (int step = 0; step < c.steps; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      of_D[l] += c.g[step][l] * c.u[step][l];
      c.grad_u[step][l] += skip[l] * c.g[step][l];
      if (p.softplus) c.grad_d[step][l] *= sigmoid_of(c.d[step][l] + bias[l]);
      of_bias[l] += c.grad_d[step][l];
    }
  }
  store_rows<Scalar>(p, panel, c.places, c.steps, c.grad_u, args.grad_u);
  store_rows<Scalar>(p, panel, c.places, c.steps, c.grad_d, args.grad_delta);
  if (!p.z.data) return;
  load_rows<Scalar>(panel, p.z, c.places, 0, c.steps, c.d);
  load_rows<Scalar>(panel, args.grad_out, c.places, 0, c.steps, c.g);
  for (int step = 0; step < c.steps; ++step) {
    for (int l = 0; l < kLanes; ++l) {
      const T z = c.d[step][l];
      const T y = (is_complex_type<V> ? T(2) : T(1)) * c.y[step][l] + skip[l] * c.u[step][l];
      c.g[step][l] *= y * selective_scan::silu_slope(z, sigmoid_of(z));
    }
  }
  store_rows<Scalar>(p, panel, c.places, c.steps, c.g, args.grad_z);
}

// Adds a chunk's gradient of a variable matrix to the part of this piece.
template <class V>
void add_matrix(const Problem& p, const Panel& panel, std::int64_t n, const Chunk<V>& c,
                const V* of_step, void* gradient, std::int64_t piece) {
  V* row = static_cast<V*>(gradient) +
           (((piece * p.batch + panel.batch) * p.groups + panel.group) * p.states + n) * p.length;
  for (int step = 0; step < c.steps; ++step) {
    V& to = row[c.places[step]];
    to = to + of_step[step + kLeft];
  }
}

template <class Scalar, class V>
void run_chunk_backward(const BackwardArgs& args, const Panel& panel, std::int64_t method,
                        std::int64_t piece, Carry<V>* carry, Chunk<V>& c) {
  const Problem& p = args.problem;
  const auto* kept = static_cast<const V*>(args.checkpoints);
  const std::int64_t row = panel.batch * p.dim + panel.channel;
  for (Sheet<Real<V>>* sheet : {&c.y, &c.grad_u, &c.grad_d, &c.grad_ratio}) zero_steps(*sheet);
  for (std::int64_t n = 0; n < p.states; ++n) {
    load_state<Scalar>(p, panel, n, c);
    for (int l = 0; l < kLanes; ++l) {
      c.entering[l] = l < panel.lanes
                          ? kept[((row + l) * p.checkpoints + c.first / kSteps) * p.states + n]
                          : number<V>(Real<V>(0));
    }
    exchange(c, carry[n]);
    backward_state(c, method);
    exchange(c, carry[n]);
    if (!p.constant_B) add_matrix(p, panel, n, c, c.grad_b_step, args.grad_B, piece);
    if (!p.constant_C) add_matrix(p, panel, n, c, c.grad_c_step, args.grad_C, piece);
  }
}

template <class Scalar, class V>
void run_panel_backward(const BackwardArgs& args, const Panel& panel, std::int64_t method,
                        std::int64_t piece, Carry<V>* carry, Chunk<V>& c) {
  using T = Real<V>;
  const Problem& p = args.problem;
  const std::int64_t row = panel.batch * p.dim + panel.channel;
  const auto* last = static_cast<const V*>(args.grad_last_state);
  T behind[kLanes] = {}, of_D[kLanes] = {}, of_bias[kLanes] = {};
  for (std::int64_t n = 0; n < p.states; ++n) {
    carry[n] = {};
    for (int l = 0; last && l < panel.lanes; ++l) {
      carry[n].adjoint[l] = last[(row + l) * p.states + n];
    }
  }
  for (std::int64_t first = (p.length - 1) / kSteps * kSteps; first >= 0; first -= kSteps) {
    load_chunk<Scalar>(p, panel, first, method, c);
    load_gradient<Scalar>(args, panel, c);
    run_chunk_backward<Scalar>(args, panel, method, piece, carry, c);
    if (neighbour_of(static_cast<int>(method)) != 0) add_ratios(method, panel.lanes, c, behind);
    write_gradients<Scalar>(args, panel, c, of_D, of_bias);
  }
  for (int l = 0; l < panel.lanes; ++l) {
    if (args.grad_D) static_cast<T*>(args.grad_D)[row + l] = of_D[l];
    if (args.grad_delta_bias) static_cast<T*>(args.grad_delta_bias)[row + l] = of_bias[l];
    for (std::int64_t n = 0; n < p.states; ++n) {
      const std::int64_t at = (row + l) * p.states + n;
      static_cast<V*>(args.grad_A)[at] = carry[n].of_a[l];
      static_cast<V*>(args.grad_initial_state)[at] = carry[n].adjoint[l];
      if (p.constant_B) static_cast<V*>(args.grad_B)[at] = carry[n].of_b[l];
      if (p.constant_C) static_cast<V*>(args.grad_C)[at] = carry[n].of_c[l];
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
      for (std::int64_t i = begin; i < end; ++i) {
        T sum = 0;
        for (std::int64_t part = 0; part < count; ++part) sum += from[part * n + i];
        store(to[i], static_cast<Acc<Scalar>>(sum));
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
                   const auto chunk = std::make_unique<Chunk<V>>();
                   for (std::int64_t i = begin; i < end; ++i) {
                     run_panel<Scalar>(plan.args, panel_of(p, i / panels, i % panels),
                                       plan.inputs.method, *chunk);
                   }
                 });
  });
}

void run_scan_backward_cpu(ScanBackwardPlan& plan) {
  const Problem& p = plan.args.problem;
  const std::int64_t panels = panels_of(p), pieces = pieces_of(p);
  const ScanSums sums = make_sums(plan, pieces);
  with_types(plan.inputs, [&]<class Scalar, class V>() {
    const std::int64_t cost = 4 * nanoseconds(p) * panels / pieces;
    parallel_for(p.batch * p.groups * pieces, cost, [&](std::int64_t begin, std::int64_t end) {
      const auto chunk = std::make_unique<Chunk<V>>();
      const auto carry = std::make_unique<Carry<V>[]>(static_cast<std::size_t>(p.states));
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t piece = i % pieces;
        for (std::int64_t panel = piece * panels / pieces; panel < (piece + 1) * panels / pieces;
             ++panel) {
          run_panel_backward<Scalar>(plan.args, panel_of(p, i / pieces, panel), plan.inputs.method,
                                     piece, carry.get(), *chunk);
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
