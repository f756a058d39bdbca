// Arguments and element maths of causal_conv1d, shared by CPU and GPU: a depthwise convolution along a sequence that
// sees the past only,
//   y_k = act(bias + sum_j weight_j x_{k - (width - 1) + j}),   g_k = dy_k act'(...),
//   dx_p = sum_j weight_j g_{p + (width - 1) - j},   dweight_j = sum_k g_k x_{k - (width - 1) + j}.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/gate.h"

namespace torchkiln::causal_conv1d {

constexpr int kMaxWidth = 32;
// What a position before the start or behind the end belongs to.
constexpr int kNoSequence = -1;

// In elements.
struct Strides {
  i64 batch, channel, length;
};

// (batch, channels, length) tensors by strides; one of channels and length is contiguous in all of them.
struct Args {
  const void* x;
  const void* weight;   // (channels, width)
  const void* bias;     // (channels,) or null
  const void* seq_idx;  // (batch, length) i32 or null
  const void* initial;  // (batch, channels, width - 1), what lies left of the start, or null: zeros
  const void* grad_out;  // backward
  void* out;             // the result, or the gradient of x
  void* partials;        // backward: (slabs, channels, width + 1) sums for weight and bias
  void* grad_initial;    // backward: like initial, or null
  void* grad_weight;     // backward
  void* grad_bias;       // backward, or null
  Strides x_strides, out_strides, grad_strides;
  i64 batch, channels, length;
  i64 slabs;  // parts of batch and length whose sums stay apart
  i32 width, silu;
  i32 weight_is_float, bias_is_float;
};

// One channel of one sequence. Positions below 0 are the initial state's.
template <class Scalar>
struct Line {
  const Scalar* x;
  const Scalar* initial;  // at position 0, or null
  const i32* sequences;   // or null
  i64 stride, length;

  TORCHKILN_HD Line(const Args& args, i64 batch, i64 channel)
      : x(static_cast<const Scalar*>(args.x) + batch * args.x_strides.batch +
          channel * args.x_strides.channel),
        initial(args.initial == nullptr
                    ? nullptr
                    : static_cast<const Scalar*>(args.initial) +
                          (batch * args.channels + channel + 1) * (args.width - 1)),
        sequences(args.seq_idx == nullptr
                      ? nullptr
                      : static_cast<const i32*>(args.seq_idx) + batch * args.length),
        stride(args.x_strides.length),
        length(args.length) {}

  // Zero beyond the ends. `reach` is width - 1.
  TORCHKILN_HD Acc<Scalar> at(i64 position, int reach) const {
    if (position >= 0) return position < length ? load(x[position * stride]) : Acc<Scalar>(0);
    return initial != nullptr && position >= -reach ? load(initial[position]) : Acc<Scalar>(0);
  }
  // The sequence that a position belongs to; the initial state belongs to the first one.
  TORCHKILN_HD int sequence(i64 position) const {
    if (sequences == nullptr) return 0;
    return position < length ? sequences[position < 0 ? 0 : position] : kNoSequence;
  }
};

// dy times the slope of the activation where the weighted sum was `sum`.
template <class T>
TORCHKILN_HD T slope_times(T grad, T sum, bool silu) {
  // No branch around it: where it is unknown until run time, one for each position costs more than the slope.
  const T slope = silu_slope(sum);
  return grad * (silu ? slope : T(1));
}

// The gradient of the sum at one position, from the inputs themselves: for the few that vectors do not reach.
template <class Scalar>
TORCHKILN_HD Acc<Scalar> gradient_at(const Args& args, const Line<Scalar>& line, i64 batch,
                                     i64 channel, i64 position) {
  using T = Acc<Scalar>;
  const int reach = args.width - 1, own = line.sequence(position);
  if (position >= args.length || own < 0) return T(0);
  T sum = args.bias == nullptr ? T(0)
                               : load_either<Scalar>(args.bias, args.bias_is_float != 0, channel);
  for (int j = 0; j <= reach; ++j) {
    const i64 from = position - reach + j;
    if (line.sequence(from) != own) continue;
    sum += load_either<Scalar>(args.weight, args.weight_is_float != 0, channel * args.width + j) *
           line.at(from, reach);
  }
  const T grad = load(static_cast<const Scalar*>(
      args.grad_out)[batch * args.grad_strides.batch + channel * args.grad_strides.channel +
                     position * args.grad_strides.length]);
  return slope_times(grad, sum, args.silu != 0);
}

// The gradient of element `at` of the initial state.
template <class Scalar>
TORCHKILN_HD Acc<Scalar> initial_gradient(const Args& args, i64 batch, i64 channel, int at) {
  using T = Acc<Scalar>;
  const Line<Scalar> line(args, batch, channel);
  const int first = line.sequence(0);
  T sum = T(0);
  for (int k = 0; k <= at && k < args.length; ++k) {
    if (line.sequence(k) != first) continue;
    sum +=
        load_either<Scalar>(args.weight, args.weight_is_float != 0, channel * args.width + at - k) *
        gradient_at(args, line, batch, channel, k);
  }
  return sum;
}

}  // namespace torchkiln::causal_conv1d
