// sigmoid_focal_loss on the CPU, for labels and for soft targets.
// SPDX-License-Identifier: Apache-2.0
#if defined(__GNUC__) && !defined(__clang__)
// A comparison might raise a floating-point exception, and g++ keeps that, at the price of no vectors.
#pragma GCC optimize("O3", "no-trapping-math")
#endif
#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "bindings/detection/sigmoid_focal_loss.h"
#include "bindings/support/parallel.h"

namespace torchkiln::bindings {
namespace {

using sigmoid_focal_loss::Args;
using sigmoid_focal_loss::ScaleArgs;
using sigmoid_focal_loss::Terms;

// Elements of one step of the CPU loops: their buffers stay in the first cache.
constexpr std::int64_t kSpan = 512;
// Elements of one partial sum, whatever the number of threads.
constexpr std::int64_t kPiece = 4096;
constexpr std::int64_t kElementNanoseconds = 4;

// What a span is computed from and into: x and t are read, loss and gradient written. t: soft targets, or factors.
template <class T>
struct Span {
  T x[kSpan], t[kSpan], loss[kSpan], gradient[kSpan];
  std::int64_t positives[kSpan];  // where they are
  std::int64_t n_positives = 0;
};

template <class T>
struct Factors {
  T positive, negative, gamma;
};

// Negative elements, each with a factor.
template <int kGamma, class T>
inline void negative_loop(Span<T>& s, std::int64_t n, T gamma, bool with_gradient) {
  if (!with_gradient) {
    for (std::int64_t i = 0; i < n; ++i) {
      s.loss[i] = s.t[i] * sigmoid_focal_loss::negative_terms<kGamma>(s.x[i], gamma).loss;
    }
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const Terms<T> terms = sigmoid_focal_loss::negative_terms<kGamma>(s.x[i], gamma);
    s.loss[i] = s.t[i] * terms.loss;
    s.gradient[i] = s.t[i] * terms.gradient;
  }
}
template <int kGamma, class T>
inline void soft_loop(Span<T>& s, std::int64_t n, const Factors<T>& f) {
  for (std::int64_t i = 0; i < n; ++i) {
    const Terms<T> terms =
        sigmoid_focal_loss::soft_terms<kGamma>(s.x[i], s.t[i], f.positive, f.negative, f.gamma);
    s.loss[i] = terms.loss;
    s.gradient[i] = terms.gradient;
  }
}

__attribute__((TORCHKILN_CLONES)) void negative_squared(Span<float>& s, std::int64_t n, float gamma,
                                                        bool with_gradient) {
  negative_loop<2>(s, n, gamma, with_gradient);
}
__attribute__((TORCHKILN_CLONES)) void negative_any(Span<float>& s, std::int64_t n, float gamma) {
  negative_loop<0>(s, n, gamma, true);
}
__attribute__((TORCHKILN_CLONES)) void soft_squared(Span<float>& s, std::int64_t n,
                                                    Factors<float> f) {
  soft_loop<2>(s, n, f);
}

template <class T>
void negative_span(Span<T>& s, std::int64_t n, T gamma, bool with_gradient) {
  if constexpr (sizeof(T) == sizeof(float)) {
    gamma == 2 ? negative_squared(s, n, gamma, with_gradient) : negative_any(s, n, gamma);
  } else {
    gamma == 2 ? negative_loop<2>(s, n, gamma, with_gradient)
               : negative_loop<0>(s, n, gamma, with_gradient);
  }
}
template <class T>
void soft_span(Span<T>& s, std::int64_t n, const Factors<T>& f) {
  if (f.gamma != 2) return soft_loop<0>(s, n, f);
  if constexpr (sizeof(T) == sizeof(float)) {
    soft_squared(s, n, f);
  } else {
    soft_loop<2>(s, n, f);
  }
}

// The factors of elements by the labels of their rows. A positive element is the negative one of -x with its gradient
// negated, so all are computed alike.
template <class Scalar>
void set_classes(const Args& args, const Factors<Acc<Scalar>>& f, std::int64_t offset,
                 std::int64_t n, Span<Acc<Scalar>>& s) {
  using T = Acc<Scalar>;
  s.n_positives = 0;
  std::int64_t row = offset / args.columns;
  for (std::int64_t first = row * args.columns - offset; first < n; first += args.columns, ++row) {
    const std::int64_t label = static_cast<const i64*>(args.targets)[row];
    const bool is_class = label >= 0 && label < args.columns;
    const bool weighs = args.weight != nullptr && is_class;
    const T weight = weighs ? load(static_cast<const Scalar*>(args.weight)[label]) : T(1);
    std::fill(s.t + std::max<std::int64_t>(first, 0),
              s.t + std::min<std::int64_t>(first + args.columns, n), f.negative * weight);
    const std::int64_t at = is_class ? first + label : -1;
    if (at < 0 || at >= n) continue;
    s.x[at] = -s.x[at];
    s.t[at] = f.positive * weight;
    s.positives[s.n_positives++] = at;
  }
}

// Computes the elements [offset, offset + n).
template <class Scalar>
void compute_span(const Args& args, bool labels, std::int64_t offset, std::int64_t n,
                  Span<Acc<Scalar>>& s) {
  using T = Acc<Scalar>;
  const Factors<T> f{static_cast<T>(args.positive * args.scale),
                     static_cast<T>(args.negative * args.scale), static_cast<T>(args.gamma)};
  const auto* inputs = static_cast<const Scalar*>(args.inputs) + offset;
  for (std::int64_t i = 0; i < n; ++i) s.x[i] = load(inputs[i]);
  if (!labels) {
    const auto* targets = static_cast<const Scalar*>(args.targets) + offset;
    for (std::int64_t i = 0; i < n; ++i) s.t[i] = load(targets[i]);
    return soft_span(s, n, f);
  }
  set_classes<Scalar>(args, f, offset, n, s);
  negative_span(s, n, f.gamma, args.gradient != nullptr);
  if (args.gradient == nullptr) return;
  for (std::int64_t i = 0; i < s.n_positives; ++i)
    s.gradient[s.positives[i]] = -s.gradient[s.positives[i]];
}

// Writes what is asked for.
template <class Scalar>
void write_span(const Args& args, bool sums, std::int64_t offset, std::int64_t n,
                Span<Acc<Scalar>>& s) {
  if (args.loss != nullptr && !sums) {
    for (std::int64_t i = 0; i < n; ++i) {
      store(static_cast<Scalar*>(args.loss)[offset + i], s.loss[i]);
    }
  }
  if (args.gradient == nullptr) return;
  if (args.grad_output != nullptr) {
    const auto* grad_output = static_cast<const Scalar*>(args.grad_output);
    for (std::int64_t i = 0; i < n; ++i) {
      s.gradient[i] *= load(grad_output[args.grad_output_is_one ? 0 : offset + i]);
    }
  }
  for (std::int64_t i = 0; i < n; ++i) {
    store(static_cast<Scalar*>(args.gradient)[offset + i], s.gradient[i]);
  }
}

// Side by side, because one sum alone would wait for itself.
template <class T>
double sum_of(const T* values, std::int64_t n) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += values[i + j];
  }
  return std::accumulate(sums, sums + kSums, std::accumulate(values + i, values + n, 0.0));
}

// The elements of one piece; returns the sum of their losses.
template <class Scalar>
double run_piece(const Args& args, bool labels, bool sums, std::int64_t begin, std::int64_t end) {
  Span<Acc<Scalar>> span;
  double sum = 0;
  for (; begin < end; begin += kSpan) {
    const std::int64_t n = std::min(kSpan, end - begin);
    compute_span<Scalar>(args, labels, begin, n, span);
    write_span<Scalar>(args, sums, begin, n, span);
    if (sums) sum += sum_of(span.loss, n);
  }
  return sum;
}

// Runs all pieces on torch's threads; returns the sum of the losses, in the order of the pieces.
double run_cpu(const FocalPlan& p, bool sums) {
  const std::int64_t pieces = (p.numel() + kPiece - 1) / kPiece;
  std::vector<double> partials(static_cast<std::size_t>(pieces));
  with_float(p.dtype(), [&]<class Scalar>() {
    parallel_for(pieces, kPiece * kElementNanoseconds, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        partials[static_cast<std::size_t>(i)] = run_piece<Scalar>(
            p.args, p.labels, sums, i * kPiece, std::min((i + 1) * kPiece, p.numel()));
      }
    });
  });
  return std::accumulate(partials.begin(), partials.end(), 0.0);
}

void store_loss(const FocalPlan& p, double loss) {
  with_float(p.dtype(), [&]<class Scalar>() {
    store(*mutable_data<Scalar>(p.loss), static_cast<Acc<Scalar>>(loss));
  });
}

std::tuple<Tensor, Tensor> cpu(const Tensor& inputs, const Tensor& targets,
                               const std::optional<Tensor>& weight, double alpha, double gamma,
                               std::int64_t reduction, bool with_gradient) {
  const FocalPlan p =
      plan_focal_forward(inputs, targets, weight, alpha, gamma, reduction, with_gradient);
  const bool sums = reduction != kNone;
  const double loss = run_cpu(p, sums);
  if (sums) store_loss(p, p.numel() == 0 ? empty_focal_loss(p) : loss);
  return {p.loss, p.gradient};
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& inputs, const Tensor& targets,
                    const std::optional<Tensor>& weight, double alpha, double gamma,
                    std::int64_t reduction) {
  const FocalPlan p =
      plan_focal_backward(grad_output, inputs, targets, weight, alpha, gamma, reduction);
  run_cpu(p, false);
  return p.gradient;
}

template <class Scalar>
void scale_elements(const ScaleArgs& args, std::int64_t begin, std::int64_t end) {
  const Acc<Scalar> factor = load(*static_cast<const Scalar*>(args.grad_output));
  if (factor == 1) return;
  auto* gradient = static_cast<Scalar*>(args.gradient);
  for (std::int64_t i = begin; i < end; ++i) store(gradient[i], load(gradient[i]) * factor);
}

void scale_cpu(Tensor gradient, const Tensor& grad_output) {
  const FocalScalePlan p = plan_focal_scale(gradient, grad_output);
  with_float(p.gradient.scalar_type(), [&]<class Scalar>() {
    parallel_for(p.args.numel, 1, [&](std::int64_t begin, std::int64_t end) {
      scale_elements<Scalar>(p.args, begin, end);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&cpu));
  m.impl("_sigmoid_focal_loss_backward", TORCH_BOX(&backward_cpu));
  m.impl("_sigmoid_focal_loss_scale_", TORCH_BOX(&scale_cpu));
}

}  // namespace torchkiln::bindings
