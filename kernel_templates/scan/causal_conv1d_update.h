// Arguments and the step of causal_conv1d_update, shared by CPU and GPU: a causal convolution that goes on from a state
// of the last inputs and leaves the new ones there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "scan/causal_conv1d.h"

namespace torchkiln::causal_conv1d_update {

using causal_conv1d::kMaxWidth;
using causal_conv1d::Strides;

struct Args {
  const void* x;       // (batch, channels, length)
  void* state;         // (rows, channels, state_length), changed
  const void* weight;  // (channels, width)
  const void* bias;    // (channels,) or null
  const void*
      cache_seqlens;  // (batch,) i32: inputs seen before, the state is a ring; or null: it is shifted
  const void* indices;  // (batch,) i32 row of the state, below 0: none; or null
  void* out;            // (batch, channels, length), contiguous
  Strides x_strides, state_strides;
  i64 batch, channels, length, rows, state_length;
  i32 width, silu;
  i32 weight_is_float, bias_is_float;
};

// The row of a sequence's state, below 0 where it has none.
TORCHKILN_HD i64 row_of(const Args& args, i64 sequence) {
  const i64 row =
      args.indices != nullptr ? static_cast<const i32*>(args.indices)[sequence] : sequence;
  return row < args.rows ? row : -1;
}

// Channels whose states, of so many inputs of so many bytes, fill what one load reads; 0 where one is larger.
TORCHKILN_HD constexpr int channels_at_once(int width, int bytes) { return 16 / (width * bytes); }

// n modulo d, from 0 to d - 1.
TORCHKILN_HD i64 wrapped(i64 n, i64 d) {
  const i64 rest = n % d;
  return rest < 0 ? rest + d : rest;
}

// One channel of one sequence. kWidth 0: any width.
template <class Scalar, int kWidth>
struct Step {
  using T = Acc<Scalar>;
  const Args& args;
  const i64 batch, channel;
  const Scalar* x;
  Scalar* state;
  bool exists;  // whether there is a state
  i64 seen;
  T window[kWidth > 0 ? kWidth : kMaxWidth];  // the last inputs, the newest at width - 1

  TORCHKILN_HD Step(const Args& a, i64 b, i64 c)
      : args(a),
        batch(b),
        channel(c),
        x(static_cast<const Scalar*>(a.x) + b * a.x_strides.batch + c * a.x_strides.channel) {
    const i64 row = row_of(a, b);
    exists = row >= 0;
    state = exists ? static_cast<Scalar*>(a.state) + row * a.state_strides.batch +
                         c * a.state_strides.channel
                   : nullptr;
    seen = a.cache_seqlens != nullptr ? static_cast<const i32*>(a.cache_seqlens)[b] : 0;
  }
  TORCHKILN_HD int width() const { return kWidth > 0 ? kWidth : args.width; }
  TORCHKILN_HD bool is_ring() const { return args.cache_seqlens != nullptr; }
  TORCHKILN_HD Scalar& cell(i64 at) const {
    return state[(is_ring() ? wrapped(at, args.state_length) : at) * args.state_strides.length];
  }

  TORCHKILN_HD void run() {
    Scalar* out = static_cast<Scalar*>(args.out) + (batch * args.channels + channel) * args.length;
    if (!exists) {
      for (i64 k = 0; k < args.length; ++k) store(out[k], T(0));
      return;
    }
    const i64 end = is_ring() ? seen : args.state_length;
    for (int j = 1; j < width(); ++j) window[j] = load(cell(end - width() + j));
    const T bias = args.bias == nullptr
                       ? T(0)
                       : load_either<Scalar>(args.bias, args.bias_is_float != 0, channel);
    for (i64 k = 0; k < args.length; ++k) {
      for (int j = 0; j + 1 < width(); ++j) window[j] = window[j + 1];
      window[width() - 1] = load(x[k * args.x_strides.length]);
      T sum = bias;
      for (int j = 0; j < width(); ++j) {
        sum += load_either<Scalar>(args.weight, args.weight_is_float != 0, channel * width() + j) *
               window[j];
      }
      store(out[k], args.silu != 0 ? silu_of(sum) : sum);
    }
    keep();
  }

  // Leaves the inputs in the state.
  TORCHKILN_HD void keep() {
    if (args.state_length == 0) return;
    if (is_ring()) {
      for (i64 k = 0; k < args.length; ++k) cell(seen + k) = x[k * args.x_strides.length];
      return;
    }
    for (i64 i = 0; i < args.state_length; ++i) {
      const i64 from = i + args.length;
      cell(i) = from < args.state_length ? cell(from)
                                         : x[(from - args.state_length) * args.x_strides.length];
    }
  }
};

}  // namespace torchkiln::causal_conv1d_update
