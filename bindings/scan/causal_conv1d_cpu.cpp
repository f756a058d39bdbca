// causal_conv1d on the CPU: pieces of a sequence are gathered into buffers of the accumulator's type, with the positions
// that they touch on both sides, and then worked on tap by tap.
// SPDX-License-Identifier: Apache-2.0
#if defined(__GNUC__) && !defined(__clang__)
// A comparison might raise a floating-point exception, and g++ keeps that, at the price of no vectors.
#pragma GCC optimize("O3", "no-trapping-math")
#endif
#include <algorithm>
#include <array>
#include <vector>

#include "bindings/scan/causal_conv1d.h"
#include "bindings/support/parallel.h"
#include "torchkiln/torchkiln.hpp"

namespace torchkiln::bindings::causal_conv1d {
namespace {

using torchkiln::causal_conv1d::initial_gradient;
using torchkiln::causal_conv1d::kMaxWidth;
using torchkiln::causal_conv1d::Line;
using torchkiln::causal_conv1d::Strides;

constexpr i64 kSpan = 512, kTile = 16, kEdge = kMaxWidth - 1;
constexpr std::int64_t kLanes = 16;  // sums that a dot product keeps apart

#define TORCHKILN_LOOPS(T)                                                                      \
  [[maybe_unused]] TORCHKILN_VECTORISED void add_scaled(                                        \
      T* __restrict__ sums, const T* __restrict__ values, T factor, std::int64_t n) {           \
    for (std::int64_t i = 0; i < n; ++i) sums[i] += factor * values[i];                         \
  }                                                                                             \
  [[maybe_unused]] TORCHKILN_VECTORISED void apply_silu(T* values, std::int64_t n) {            \
    for (std::int64_t i = 0; i < n; ++i) values[i] = silu_of(values[i]);                        \
  }                                                                                             \
  [[maybe_unused]] TORCHKILN_VECTORISED void apply_slope(                                       \
      T* __restrict__ grads, const T* __restrict__ sums, std::int64_t n) {                      \
    for (std::int64_t i = 0; i < n; ++i) grads[i] *= silu_slope(sums[i]);                       \
  }                                                                                             \
  [[maybe_unused]] TORCHKILN_VECTORISED T dot(const T* __restrict__ a, const T* __restrict__ b, \
                                              std::int64_t n) {                                 \
    T lanes[kLanes] = {};                                                                       \
    std::int64_t i = 0;                                                                         \
    for (; i + kLanes <= n; i += kLanes)                                                        \
      for (std::int64_t k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];                \
    for (; i < n; ++i) lanes[0] += a[i] * b[i];                                                 \
    T sum = 0;                                                                                  \
    for (const T lane : lanes) sum += lane;                                                     \
    return sum;                                                                                 \
  }
TORCHKILN_LOOPS(float)
TORCHKILN_LOOPS(double)
#undef TORCHKILN_LOOPS

// Up to kTile channels of one sequence, on positions [first, first + count).
struct Place {
  i64 batch, channel, channels, first, count;
};

template <class T>
using Rows = std::array<std::array<T, kSpan + 2 * kEdge>, kTile>;

// Positions [place.first - before, place.first + place.count + after) of a tensor; zero where there is none.
template <class Scalar, class T>
void gather(const void* from, const Strides& strides, i64 length, const Place& place, i64 before,
            i64 after, Rows<T>& to) {
  const auto* base = static_cast<const Scalar*>(from) + place.batch * strides.batch +
                     place.channel * strides.channel;
  const i64 total = before + place.count + after, begin = place.first - before;
  const i64 low = std::max<i64>(0, -begin);
  const i64 high = std::max(low, std::min(total, length - begin));
  for (std::int64_t c = 0; c < place.channels; ++c) {
    std::fill_n(to[c].begin(), low, T(0));
    std::fill(to[c].begin() + high, to[c].begin() + total, T(0));
  }
  if (strides.length == 1) {
    for (std::int64_t c = 0; c < place.channels; ++c)
      for (std::int64_t i = low; i < high; ++i)
        to[c][i] = load(base[c * strides.channel + begin + i]);
  } else {
    for (std::int64_t i = low; i < high; ++i)
      for (std::int64_t c = 0; c < place.channels; ++c)
        to[c][i] = load(base[c * strides.channel + (begin + i) * strides.length]);
  }
}

template <class Scalar, class T>
void scatter(void* to, const Strides& strides, const Place& place, const Rows<T>& from) {
  auto* base = static_cast<Scalar*>(to) + place.batch * strides.batch +
               place.channel * strides.channel + place.first * strides.length;
  if (strides.length == 1) {
    for (std::int64_t c = 0; c < place.channels; ++c)
      for (std::int64_t i = 0; i < place.count; ++i)
        store(base[c * strides.channel + i], from[c][i]);
  } else {
    for (std::int64_t i = 0; i < place.count; ++i)
      for (std::int64_t c = 0; c < place.channels; ++c)
        store(base[c * strides.channel + i * strides.length], from[c][i]);
  }
}

// The inputs of a place, with those of the initial state.
template <class Scalar, class T>
void gather_inputs(const Args& args, const Place& place, std::int64_t after, Rows<T>& to) {
  const std::int64_t reach = args.width - 1;
  gather<Scalar>(args.x, args.x_strides, args.length, place, reach, after, to);
  if (place.first >= reach || args.initial == nullptr) return;
  for (std::int64_t c = 0; c < place.channels; ++c) {
    const Line<Scalar> line(args, place.batch, place.channel + c);
    for (std::int64_t i = 0; place.first - reach + i < 0 && i < reach + place.count + after; ++i)
      to[c][i] = line.at(place.first - reach + i, args.width - 1);
  }
}

template <class T>
struct Filter {
  std::array<T, kMaxWidth> weight;
  T bias;
};
template <class Scalar>
Filter<Acc<Scalar>> filter_of(const Args& args, std::int64_t channel) {
  Filter<Acc<Scalar>> filter{};
  for (i32 j = 0; j < args.width; ++j)
    filter.weight[j] =
        load_either<Scalar>(args.weight, args.weight_is_float != 0, channel * args.width + j);
  if (args.bias != nullptr)
    filter.bias = load_either<Scalar>(args.bias, args.bias_is_float != 0, channel);
  return filter;
}

// Which of `values` at positions from `from` on count for positions from `to` on; the others become zero.
template <class Scalar, class T>
void keep_joined(const Line<Scalar>& line, std::int64_t from, std::int64_t to, std::int64_t n,
                 const T* values, T* kept) {
  for (std::int64_t i = 0; i < n; ++i)
    kept[i] = line.sequence(from + i) == line.sequence(to + i) ? values[i] : T(0);
}

// sums[i] for positions [first, first + n) out of inputs from first - reach on.
template <class Scalar, class T>
void weighted_sums(const Args& args, const Line<Scalar>& line, const Filter<T>& filter,
                   std::int64_t first, std::int64_t n, const T* inputs, T* sums) {
  std::array<T, kSpan + kEdge> kept;
  std::fill_n(sums, n, filter.bias);
  for (std::int64_t j = 0; j < args.width; ++j) {
    const T* values = inputs + j;
    if (args.seq_idx != nullptr) {
      keep_joined(line, first - args.width + 1 + j, first, n, inputs + j, kept.data());
      values = kept.data();
    }
    add_scaled(sums, values, filter.weight[j], n);
  }
}

// Padding has no result and no gradient.
template <class Scalar, class T>
void clear_padding(const Line<Scalar>& line, std::int64_t first, std::int64_t n, T* values) {
  if (line.sequences == nullptr) return;
  for (std::int64_t i = 0; i < n; ++i)
    if (line.sequence(first + i) < 0) values[i] = T(0);
}

template <class Scalar>
void forward_place(const Args& args, const Place& place) {
  using T = Acc<Scalar>;
  Rows<T> inputs, sums;
  gather_inputs<Scalar>(args, place, 0, inputs);
  for (std::int64_t c = 0; c < place.channels; ++c) {
    const Line<Scalar> line(args, place.batch, place.channel + c);
    T* out = sums[c].data();
    weighted_sums(args, line, filter_of<Scalar>(args, place.channel + c), place.first, place.count,
                  inputs[c].data(), out);
    if (args.silu != 0) apply_silu(out, place.count);
    clear_padding(line, place.first, place.count, out);
  }
  scatter<Scalar>(args.out, args.out_strides, place, sums);
}

// Sums for weights and bias of each channel of a tile, over all sequences.
using TileSums = std::array<std::array<double, kMaxWidth + 1>, kTile>;

template <class Scalar>
void backward_place(const Args& args, const Place& place, TileSums& totals) {
  using T = Acc<Scalar>;
  const std::int64_t reach = args.width - 1, ahead = place.count + reach;
  Rows<T> inputs, grads, results;
  std::array<T, kSpan + kEdge> sums, kept;
  gather_inputs<Scalar>(args, place, reach, inputs);
  gather<Scalar>(args.grad_out, args.grad_strides, args.length, place, 0, reach, grads);
  for (std::int64_t c = 0; c < place.channels; ++c) {
    const Line<Scalar> line(args, place.batch, place.channel + c);
    const auto filter = filter_of<Scalar>(args, place.channel + c);
    T* grad = grads[c].data();
    if (args.silu != 0) {
      weighted_sums(args, line, filter, place.first, ahead, inputs[c].data(), sums.data());
      apply_slope(grad, sums.data(), ahead);
    }
    clear_padding(line, place.first, ahead, grad);
    T* result = results[c].data();
    std::fill_n(result, place.count, T(0));
    for (std::int64_t j = 0; j < args.width; ++j) {
      const T *towards = grad + reach - j, *from = inputs[c].data() + j;
      if (args.seq_idx != nullptr) {
        keep_joined(line, place.first + reach - j, place.first, place.count, towards, kept.data());
        add_scaled(result, kept.data(), filter.weight[j], place.count);
        keep_joined(line, place.first - reach + j, place.first, place.count, from, kept.data());
        from = kept.data();
      } else {
        add_scaled(result, towards, filter.weight[j], place.count);
      }
      totals[c][j] += static_cast<double>(dot(grad, from, place.count));
    }
    double sum = 0;
    for (std::int64_t i = 0; i < place.count; ++i) sum += static_cast<double>(grad[i]);
    totals[c][args.width] += sum;
  }
  scatter<Scalar>(args.out, args.out_strides, place, results);
}

// Channels that are gathered together.
i64 tile_of(const Args& args) { return args.x_strides.length == 1 ? 1 : kTile; }

template <class Scalar>
void forward_all(const Args& args) {
  const i64 tile = tile_of(args), tiles = ceil_div(args.channels, tile);
  const std::int64_t spans = ceil_div(args.length, kSpan);
  const std::int64_t cost = tile * std::min(args.length, kSpan) * (args.width + 2) / 4;
  parallel_for(args.batch * tiles * spans, cost, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const i64 row = i / spans, first = i % spans * kSpan, channel = row % tiles * tile;
      forward_place<Scalar>(args, {.batch = row / tiles,
                                   .channel = channel,
                                   .channels = std::min(tile, args.channels - channel),
                                   .first = first,
                                   .count = std::min(kSpan, args.length - first)});
    }
  });
}

template <class Scalar>
void backward_tile(const Args& args, i64 channel, i64 channels) {
  using T = Acc<Scalar>;
  TileSums totals{};
  for (i64 batch = 0; batch < args.batch; ++batch) {
    for (i64 first = 0; first < args.length; first += kSpan) {
      backward_place<Scalar>(args,
                             {.batch = batch,
                              .channel = channel,
                              .channels = channels,
                              .first = first,
                              .count = std::min(kSpan, args.length - first)},
                             totals);
    }
    if (args.grad_initial == nullptr) continue;
    for (std::int64_t c = channel; c < channel + channels; ++c)
      for (i32 i = 0; i + 1 < args.width; ++i)
        store(static_cast<Scalar*>(
                  args.grad_initial)[(batch * args.channels + c) * (args.width - 1) + i],
              initial_gradient<Scalar>(args, batch, c, i));
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    for (i32 j = 0; j < args.width; ++j)
      store_either<Scalar>(args.grad_weight, args.weight_is_float != 0,
                           (channel + c) * args.width + j, static_cast<T>(totals[c][j]));
    if (args.grad_bias != nullptr)
      store_either<Scalar>(args.grad_bias, args.bias_is_float != 0, channel + c,
                           static_cast<T>(totals[c][args.width]));
  }
}

}  // namespace

Tensor forward_cpu(const Plan& p) {
  with_float(p.x.scalar_type(), [&]<class Scalar>() { forward_all<Scalar>(p.args); });
  return p.out;
}

void backward_cpu(const Plan& p) {
  with_float(p.x.scalar_type(), [&]<class Scalar>() {
    const i64 tile = tile_of(p.args), tiles = ceil_div(p.args.channels, tile);
    const std::int64_t cost = p.args.batch * p.args.length * tile * p.args.width;
    parallel_for(tiles, cost, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        backward_tile<Scalar>(p.args, i * tile, std::min(tile, p.args.channels - i * tile));
    });
  });
}

}  // namespace torchkiln::bindings::causal_conv1d
