// causal_conv1d on the GPU. Where the sequence is contiguous (`rows`), a thread takes kVector neighbouring positions and
// reads what lies before and behind them too; where the channels are (`columns`), it walks along the sequence with
// kVector channels and keeps the last inputs in registers. The gradients of weight and bias are summed within a block
// over its slab, a part of batch and length, and `finish` adds the slabs in a fixed order.
// spills: up to 72 bytes for packed sequences by columns, 16 else: what more warps on a multiprocessor cost.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "scan/causal_conv1d.h"

namespace torchkiln::causal_conv1d {

// The least multiple of kVector that reaches kWidth - 1.
template <int kWidth, int kVector>
constexpr int kHalo = (kWidth - 1 + kVector - 1) / kVector * kVector;

// Of numbers that are not negative: most fit into 32 bits, where a division costs a third.
__device__ __forceinline__ i64 quotient(i64 n, i64 d) {
  return ((n | d) >> 32) == 0 ? i64(u32(n) / u32(d)) : n / d;
}

// ---- the sequence is contiguous ----

// kVector positions of x from `first` on; they lie wholly before `begin`, where there is what `initial` says, inside, or
// behind the end. As they come: to convert them would be to wait for them.
template <int kVector, class Scalar, class Index>
__device__ __forceinline__ Pack<Scalar, kVector> load_positions(const Scalar* x,
                                                                const Scalar* initial, Index first,
                                                                Index begin, Index end, int reach) {
  if (first >= begin && first < end) return load_pack<kVector>(x + first);
  auto result = zero_pack<kVector, Scalar>();
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const Index position = first + i - begin;
    if (initial != nullptr && position < 0 && position >= -reach) result.at[i] = initial[position];
  }
  return result;
}

// What a window is made of, as it comes: kVector positions of the row, and those before them that they reach.
template <class Scalar, int kWidth, int kVector>
struct Given {
  static constexpr int kBefore = kHalo<kWidth, kVector>;
  Pack<Scalar, kVector> at[kBefore / kVector + 1];

  // kInside: none of them lies before the start.
  template <bool kInside>
  __device__ __forceinline__ void read(const Line<Scalar>& line, i64 first) {
#pragma unroll
    for (int p = 0; p < kBefore; p += kVector) {
      const i64 from = first - kBefore + p;
      at[p / kVector] = kInside ? load_pack<kVector>(line.x + from)
                                : load_positions<kVector>(line.x, line.initial, from, i64(0),
                                                          line.length, kWidth - 1);
    }
    at[kBefore / kVector] = load_pack<kVector>(line.x + first);
  }
};

// Inputs, and the sequences that they belong to; element kBefore is position `first`.
template <class Scalar, int kWidth, int kVector, bool kSequences>
struct Window {
  using T = Acc<Scalar>;
  static constexpr int kBefore = kHalo<kWidth, kVector>, kCount = kBefore + kVector;
  T x[kCount];
  int sequence[kSequences ? kCount : 1];

  __device__ __forceinline__ Window(const Given<Scalar, kWidth, kVector>& given,
                                    const Line<Scalar>& line, i64 first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = load(given.at[i / kVector].at[i % kVector]);
      if constexpr (kSequences) sequence[i] = line.sequence(first - kBefore + i);
    }
  }
  // Whether position `from` counts for position `to`.
  __device__ __forceinline__ bool joined(int from, int to) const {
    if constexpr (kSequences) return sequence[from] == sequence[to];
    return true;
  }
  // Padding has no result.
  __device__ __forceinline__ bool exists(int at) const {
    if constexpr (kSequences) return sequence[at] >= 0;
    return true;
  }
};

// A channel's filter.
template <class Scalar, int kWidth>
struct Filter {
  using T = Acc<Scalar>;
  T weight[kWidth], bias;

  __device__ __forceinline__ Filter(const Args& args, i64 channel) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      weight[j] = load_either<Scalar>(args.weight, args.weight_is_float != 0, channel * kWidth + j);
    }
    bias = args.bias == nullptr ? T(0)
                                : load_either<Scalar>(args.bias, args.bias_is_float != 0, channel);
  }
  // The weighted sum for element `at` of a window.
  template <class AnyWindow>
  __device__ __forceinline__ T sum(const AnyWindow& window, int at) const {
    T result = bias;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int from = at - (kWidth - 1) + j;
      if (window.joined(from, at)) result += weight[j] * window.x[from];
    }
    return result;
  }
};

// length is a multiple of kVector. kLanes neighbouring threads stand on one row, each on kItems vectors of it, two of
// which are under way while one is worked on. Grid: one-dimensional.
template <class Scalar, int kWidth, bool kSequences, int kVector, int kBlockSize, int kLanes,
          int kItems>
__global__ void __launch_bounds__(kBlockSize) forward_rows(const Args args) {
  using AnyWindow = Window<Scalar, kWidth, kVector, kSequences>;
  constexpr int kBefore = AnyWindow::kBefore, kStep = kLanes * kVector, kSpan = kItems * kStep;
  constexpr int kAhead = kItems < 2 ? kItems : 2;
  static_assert(kItems % kAhead == 0);
  const i64 spans = (args.length + kSpan - 1) / kSpan;
  const i64 group = i64(blockIdx.x) * (kBlockSize / kLanes) + threadIdx.x / kLanes;
  const i64 row = quotient(group, spans);
  if (row >= args.batch * args.channels) return;
  const i64 batch = quotient(row, args.channels), channel = row - batch * args.channels;
  const Line<Scalar> line(args, batch, channel);
  Scalar* out = static_cast<Scalar*>(args.out) + batch * args.out_strides.batch +
                channel * args.out_strides.channel;
  i64 first = (group - row * spans) * kSpan + threadIdx.x % kLanes * kVector;
  Given<Scalar, kWidth, kVector> given[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (first + i * kStep >= args.length) continue;
    if (i * kStep >= kBefore && i > 0) {
      given[i].template read<true>(line, first + i * kStep);
    } else {
      given[i].template read<false>(line, first + i * kStep);
    }
  }
  // After these: what it is converted to waits for it.
  const Filter<Scalar, kWidth> filter(args, channel);
#pragma unroll 1
  for (int item = 0; item < kItems; item += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i, first += kStep) {
      if (first >= args.length) return;
      const AnyWindow window(given[i], line, first);
      const i64 next = first + kAhead * kStep;
      if (item + kAhead < kItems && next < args.length) {
        given[i].template read<(kAhead * kStep >= kBefore)>(line, next);
      }
      Pack<Scalar, kVector> result;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        Acc<Scalar> sum = filter.sum(window, kBefore + k);
        if (args.silu) sum = silu_of(sum);
        store(result.at[k], window.exists(kBefore + k) ? sum : Acc<Scalar>(0));
      }
      store_whole<kVector>(out + first, result);
    }
  }
}

// A tile: what the lanes of a warp read of a row at once, kVector neighbouring positions each.
template <class Scalar, int kVector>
struct Tile {
  using T = Acc<Scalar>;
  using Raw = Pack<Scalar, kVector>;
  static constexpr int kSpan = kWarpSize * kVector;
  T at[kVector];

  __device__ __forceinline__ void convert(const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) at[i] = load(raw.at[i]);
  }
  __device__ __forceinline__ static Raw load_gradient(const Scalar* row, int first, int end) {
    return first < end ? load_pack<kVector>(row + first) : zero_pack<kVector, Scalar>();
  }
};

// Element `offset`, counted from this lane's first one, of a tile and the `other` one, which lies before or behind it.
// Every lane must call.
template <int kVector, class AnyTile>
__device__ __forceinline__ typename AnyTile::T neighbour(const AnyTile& other, const AnyTile& own,
                                                         int offset) {
  const int lane = threadIdx.x % kWarpSize;
  const int at = (offset + 32 * kVector) % kVector, lanes = (offset - at) / kVector;
  // Who is asked from beyond an end of the tile answers for the other tile.
  const bool wraps = lanes < 0 ? lane >= kWarpSize + lanes : lane < lanes;
  return __shfl_sync(0xffffffffu, wraps ? other.at[at] : own.at[at],
                     (lane + lanes + kWarpSize) % kWarpSize);
}

// The sequences of positions from `first` on.
template <int kCount, bool kSequences>
struct Sequences {
  int at[kSequences ? kCount : 1];

  template <class AnyLine>
  __device__ __forceinline__ Sequences(const AnyLine& line, i64 first) {
    if constexpr (kSequences) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) at[i] = line.sequence(first + i);
    }
  }
  __device__ __forceinline__ bool joined(int from, int to) const {
    if constexpr (kSequences) return at[from] == at[to];
    return true;
  }
  __device__ __forceinline__ bool exists(int i) const {
    if constexpr (kSequences) return at[i] >= 0;
    return true;
  }
};

// A segment of a row, kTiles tiles, from its end to its start: what comes behind is known when a tile's turn has come.
// Positions are counted from its start. Writes the gradient of x, adds to `sums`. Every lane of the warp must call.
template <class Scalar, int kWidth, bool kSequences, int kVector, int kTiles>
__device__ __forceinline__ void backward_segment(const Args& args, const Line<Scalar>& line,
                                                 const Filter<Scalar, kWidth>& filter,
                                                 const Scalar* grad_out, Scalar* out, i64 segment,
                                                 Acc<Scalar>* sums) {
  using T = Acc<Scalar>;
  using AnyTile = Tile<Scalar, kVector>;
  constexpr int kReach = kWidth - 1, kSpan = AnyTile::kSpan;
  const i64 base = segment * (kTiles * kSpan);
  const int own = i32(threadIdx.x % kWarpSize) * kVector;
  const int end = int(min_of(line.length - base, i64((kTiles + 1) * kSpan)));
  const int tiles = min_of(kTiles, (end + kSpan - 1) / kSpan);
  const auto load_x = [&](int at) {
    return load_positions<kVector>(line.x + base, base == 0 ? line.initial : nullptr, at,
                                   base == 0 ? 0 : -kSpan, end, kReach);
  };
  grad_out += base;
  out += base;
  // The tile behind the segment is there for its first gradients only.
  const int last = end > kTiles * kSpan ? tiles : tiles - 1;
  const bool counts = last < tiles || own < kReach;
  const int first_of_last = counts ? own + last * kSpan : end;
  AnyTile x, before, given, after = {};
  x.convert(load_x(first_of_last));
  before.convert(load_x(own + (last - 1) * kSpan));
  typename AnyTile::Raw next = {}, coming;
  coming = AnyTile::load_gradient(grad_out, first_of_last, end);
#pragma unroll 1
  for (int tile = last; tile >= 0; --tile) {
    const int first = own + tile * kSpan;
    given.convert(coming);
    if (tile > 0) {
      next = load_x(first - 2 * kSpan);
      coming = AnyTile::load_gradient(grad_out, first - kSpan, end);
    }
    const Sequences<2 * kReach + kVector, kSequences> sequences(line, base + first - kReach);
    T window[kReach + kVector];
#pragma unroll
    for (int i = 0; i < kReach + kVector; ++i) {
      window[i] = i < kReach ? neighbour<kVector>(before, x, i - kReach) : x.at[i - kReach];
    }
    AnyTile grad;  // of the weighted sums
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      T sum = filter.bias;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (sequences.joined(i + j, i + kReach)) sum += filter.weight[j] * window[i + j];
      }
      // Behind the end, 0 is given.
      grad.at[i] = slope_times<T>(given.at[i], sum, args.silu != 0);
      if (!sequences.exists(i + kReach)) grad.at[i] = T(0);
    }
    T ahead[kVector + kReach];
#pragma unroll
    for (int i = 0; i < kVector + kReach; ++i) {
      ahead[i] = i < kVector ? grad.at[i] : neighbour<kVector>(after, grad, i);
    }
    after = grad;
    x = before;
    if (tile == tiles) {
      before.convert(next);
      continue;
    }
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      T sum = T(0);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int to = i + kReach - j;
        if (sequences.joined(i + kReach, to + kReach)) sum += filter.weight[j] * ahead[to];
        if (sequences.joined(i + j, i + kReach)) sums[j] += grad.at[i] * window[i + j];
      }
      sums[kWidth] += grad.at[i];
      store(result.at[i], sum);
    }
    if (first < end) store_whole<kVector>(out + first, result);
    before.convert(next);
  }
}

// Warps of a multiprocessor that there should be registers for.
template <class Scalar, bool kSequences>
constexpr int kRowWarps = kSequences || sizeof(Scalar) == 8 ? 16 : (sizeof(Scalar) == 4 ? 32 : 24);

// A block takes one channel of one slab, a warp a segment at a time. length is a multiple of kVector. Grid: channels,
// slabs.
template <class Scalar, int kWidth, bool kSequences, int kVector, int kBlockSize, int kTiles>
__global__ void __launch_bounds__(kBlockSize, kRowWarps<Scalar, kSequences>* kWarpSize / kBlockSize)
    backward_rows(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kSpan = kTiles * Tile<Scalar, kVector>::kSpan;
  __shared__ T shared[kBlockSize / kWarpSize];
  const i64 channel = blockIdx.x;
  const Filter<Scalar, kWidth> filter(args, channel);
  const i64 segments = (args.length + kSpan - 1) / kSpan, total = args.batch * segments;
  const i64 slab = (total + args.slabs - 1) / args.slabs;
  const i64 begin = blockIdx.y * slab, end = min_of(total, begin + slab);
  T sums[kWidth + 1];
#pragma unroll
  for (int j = 0; j <= kWidth; ++j) sums[j] = T(0);
#pragma unroll 1
  for (i64 s = begin + threadIdx.x / kWarpSize; s < end; s += kBlockSize / kWarpSize) {
    const i64 batch = quotient(s, segments);
    const Line<Scalar> line(args, batch, channel);
    backward_segment<Scalar, kWidth, kSequences, kVector, kTiles>(
        args, line, filter,
        static_cast<const Scalar*>(args.grad_out) + batch * args.grad_strides.batch +
            channel * args.grad_strides.channel,
        static_cast<Scalar*>(args.out) + batch * args.out_strides.batch +
            channel * args.out_strides.channel,
        s - batch * segments, sums);
  }
  T* partials =
      static_cast<T*>(args.partials) + (i64(blockIdx.y) * args.channels + channel) * (kWidth + 1);
#pragma unroll
  for (int j = 0; j <= kWidth; ++j) {
    const T sum = block_sum<kBlockSize>(sums[j], shared);
    if (threadIdx.x == 0) partials[j] = sum;
  }
}

// ---- the channels are contiguous ----

// kVector neighbouring channels at one position; beyond the ends as in Line::at.
template <class Scalar, int kWidth, int kVector>
__device__ __forceinline__ void load_channels(const Args& args, const Line<Scalar>& line,
                                              i64 position, Acc<Scalar>* to) {
  if (position >= 0 && position < args.length) {
    const auto pack = load_pack<kVector>(line.x + position * line.stride);
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = load(pack.at[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    to[i] = line.initial != nullptr && position < 0 && position > -kWidth
                ? load(line.initial[i * (kWidth - 1) + position])
                : Acc<Scalar>(0);
  }
}

// The last kWidth inputs of kVector channels, the newest one at kWidth - 1.
template <class Scalar, int kWidth, int kVector, bool kSequences>
struct Trail {
  using T = Acc<Scalar>;
  T x[kWidth][kVector];
  int sequence[kSequences ? kWidth : 1];

  // Position `position` comes, beyond the ends too.
  __device__ __forceinline__ void push(const Args& args, const Line<Scalar>& line, i64 position) {
    move(line, position);
    load_channels<Scalar, kWidth, kVector>(args, line, position, x[kWidth - 1]);
  }
  // The same with its inputs.
  __device__ __forceinline__ void push(const Line<Scalar>& line, i64 position,
                                       const Pack<Scalar, kVector>& given) {
    move(line, position);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[kWidth - 1][i] = load(given.at[i]);
  }
  __device__ __forceinline__ bool joined(int j) const {
    if constexpr (kSequences) return sequence[j] == sequence[kWidth - 1];
    return true;
  }
  __device__ __forceinline__ bool exists() const {
    if constexpr (kSequences) return sequence[kWidth - 1] >= 0;
    return true;
  }

 private:
  __device__ __forceinline__ void move(const Line<Scalar>& line, i64 position) {
#pragma unroll
    for (int j = 0; j + 1 < kWidth; ++j) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[j][i] = x[j + 1][i];
      if constexpr (kSequences) sequence[j] = sequence[j + 1];
    }
    if constexpr (kSequences) sequence[kWidth - 1] = line.sequence(position);
  }
};

// The filters of kVector channels.
template <class Scalar, int kWidth, int kVector>
struct Filters {
  using T = Acc<Scalar>;
  T weight[kWidth][kVector], bias[kVector];

  __device__ __forceinline__ Filters(const Args& args, i64 channel) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const Filter<Scalar, kWidth> filter(args, channel + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) weight[j][i] = filter.weight[j];
      bias[i] = filter.bias;
    }
  }
  template <class AnyTrail>
  __device__ __forceinline__ T sum(const AnyTrail& trail, int i) const {
    T result = bias[i];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (trail.joined(j)) result += weight[j][i] * trail.x[j][i];
    }
    return result;
  }
};

// The results at the newest position of a trail.
template <class Scalar, int kWidth, int kVector, class AnyTrail>
__device__ __forceinline__ void store_results(Scalar* to, const AnyTrail& trail,
                                              const Filters<Scalar, kWidth, kVector>& filters,
                                              bool silu) {
  Pack<Scalar, kVector> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    Acc<Scalar> sum = filters.sum(trail, i);
    if (silu) sum = silu_of(sum);
    store(result.at[i], trail.exists() ? sum : Acc<Scalar>(0));
  }
  store_whole<kVector>(to, result);
}

// channels is a multiple of kVector. A thread takes kSteps positions, a chunk of them under way at once. Grid:
// one-dimensional.
template <class Scalar, int kWidth, bool kSequences, int kVector, int kBlockSize, int kSteps>
__global__ void __launch_bounds__(kBlockSize) forward_columns(const Args args) {
  constexpr int kChunk = 4;
  static_assert(kSteps % kChunk == 0);
  const i64 groups = args.channels / kVector;
  const i64 spans = (args.length + kSteps - 1) / kSteps;
  const i64 thread = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  const i64 span = quotient(thread, groups), batch = quotient(span, spans);
  if (batch >= args.batch) return;
  const i64 channel = (thread - span * groups) * kVector;
  const Line<Scalar> line(args, batch, channel);
  const Filters<Scalar, kWidth, kVector> filters(args, channel);
  const i64 first = (span - batch * spans) * kSteps;
  const int count = int(min_of(i64(kSteps), args.length - first));
  const i64 stride = args.out_strides.length;
  const Scalar* x = line.x + first * line.stride;
  Scalar* out =
      static_cast<Scalar*>(args.out) + batch * args.out_strides.batch + channel + first * stride;
  Trail<Scalar, kWidth, kVector, kSequences> trail;
#pragma unroll
  for (int j = 1; j < kWidth; ++j) trail.push(args, line, first - kWidth + j);
#pragma unroll 1
  for (int k = 0; k < count; k += kChunk, x += kChunk * line.stride, out += kChunk * stride) {
    Pack<Scalar, kVector> given[kChunk];
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      given[c] = zero_pack<kVector, Scalar>();
      if (k + c < count) given[c] = load_pack<kVector>(x + c * line.stride);
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      trail.push(line, first + k + c, given[c]);
      if (k + c < count) store_results(out + c * stride, trail, filters, args.silu != 0);
    }
  }
}

// The sums of one thread for its channels' weights and biases.
template <class T, int kWidth, int kVector>
struct Sums {
  T at[kWidth + 1][kVector];
};

// What a thread of `backward_columns` knows of kCount positions in a row, kVector channels each.
template <class T, int kCount, int kVector>
struct Walk {
  T x[kCount][kVector], grad[kCount][kVector];  // grad: of the weighted sums

  // The last kKept positions become the first.
  template <int kKept>
  __device__ __forceinline__ void move() {
#pragma unroll
    for (int c = 0; c < kKept; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[c][i] = x[kCount - kKept + c][i];
        grad[c][i] = grad[kCount - kKept + c][i];
      }
    }
  }
};

// Reads kChunk positions of x and of the gradient of the output, one after the other; 0 behind the end.
template <class Scalar, int kVector, int kChunk>
struct Chunk {
  Pack<Scalar, kVector> x[kChunk], grad[kChunk];

  // left: positions before the end. The pointers move on.
  __device__ __forceinline__ void load(const Scalar*& from_x, i64 x_stride,
                                       const Scalar*& from_grad, i64 grad_stride, int left) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      x[c] = grad[c] = zero_pack<kVector, Scalar>();
      if (c < left) {
        x[c] = load_pack<kVector>(from_x);
        grad[c] = load_pack<kVector>(from_grad);
      }
      from_x += x_stride;
      from_grad += grad_stride;
    }
  }
};

// A tile of backward_columns: `steps` positions from `first` on.
template <class Scalar, int kWidth, bool kSequences, int kVector>
struct ColumnsTile {
  using T = Acc<Scalar>;
  static constexpr int kReach = kWidth - 1, kChunk = 4, kCount = kReach + kChunk;
  Walk<T, kCount, kVector> walk;
  Scalar* out;  // of position n - kReach
  i64 out_stride;
  int n, steps;

  // Goes on by kMoved positions, whose own gradients count for the sums with kOwn.
  template <bool kOwn, int kMoved>
  __device__ __forceinline__ void step(const Args& args, const Line<Scalar>& line, i64 first,
                                       const Filters<Scalar, kWidth, kVector>& filters,
                                       const Chunk<Scalar, kVector, kChunk>& given,
                                       Sums<T, kWidth, kVector>& sums) {
    const Sequences<kCount, kSequences> sequences(line, first + n - kReach);
#pragma unroll
    for (int c = 0; c < kMoved; ++c) {
      Pack<Scalar, kVector> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        walk.x[kReach + c][i] = load(given.x[c].at[i]);
        T sum = filters.bias[i];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (sequences.joined(c + j, c + kReach)) sum += filters.weight[j][i] * walk.x[c + j][i];
        }
        T grad = slope_times<T>(load(given.grad[c].at[i]), sum, args.silu != 0);
        if (!sequences.exists(kReach + c)) grad = T(0);
        walk.grad[kReach + c][i] = grad;
        T of_x = T(0);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (kOwn && sequences.joined(c + j, c + kReach)) {
            sums.at[j][i] += grad * walk.x[c + j][i];
          }
          // Position n + c - kReach counted for the one kReach - j further on.
          if (sequences.joined(c, c + kReach - j)) {
            of_x += filters.weight[j][i] * walk.grad[c + kReach - j][i];
          }
        }
        if (kOwn) sums.at[kWidth][i] += grad;
        store(result.at[i], of_x);
      }
      if (u32(n + c - kReach) < u32(steps)) store_whole<kVector>(out, result);
      out += out_stride;
    }
    walk.template move<kReach>();
    n += kMoved;
  }
};

// kSteps positions from `first` on, a chunk at a time, the next one under way: writes the gradient of x, adds to the
// sums. What lies ahead is read for its own gradients only.
template <class Scalar, int kWidth, bool kSequences, int kVector, int kSteps>
__device__ __forceinline__ void backward_tile(const Args& args,
                                              const Filters<Scalar, kWidth, kVector>& filters,
                                              i64 batch, i64 channel, i64 first,
                                              Sums<Acc<Scalar>, kWidth, kVector>& sums) {
  using AnyTile = ColumnsTile<Scalar, kWidth, kSequences, kVector>;
  constexpr int kReach = AnyTile::kReach, kChunk = AnyTile::kChunk;
  static_assert(kSteps % kChunk == 0);
  const Line<Scalar> line(args, batch, channel);
  const Scalar* x = line.x + first * line.stride;
  const Scalar* grad_out = static_cast<const Scalar*>(args.grad_out) +
                           batch * args.grad_strides.batch + channel +
                           first * args.grad_strides.length;
  // Positions that are read; those behind have no gradient.
  const int end = int(min_of(i64(kSteps + kReach), args.length - first));
  AnyTile tile = {};
  tile.steps = min_of(end, kSteps);
  tile.out_stride = args.out_strides.length;
  tile.out = static_cast<Scalar*>(args.out) + batch * args.out_strides.batch + channel +
             (first - kReach) * tile.out_stride;
  Chunk<Scalar, kVector, kChunk> coming;
  coming.load(x, line.stride, grad_out, args.grad_strides.length, end);
#pragma unroll
  for (int c = 0; c < kReach; ++c) {
    load_channels<Scalar, kWidth, kVector>(args, line, first - kReach + c, tile.walk.x[c]);
  }
#pragma unroll 1
  while (tile.n < tile.steps) {
    const Chunk<Scalar, kVector, kChunk> own = coming;
    coming.load(x, line.stride, grad_out, args.grad_strides.length, end - tile.n - kChunk);
    tile.template step<true, kChunk>(args, line, first, filters, own, sums);
  }
  if constexpr (kReach > 0) {
    constexpr int kMoved = kReach < kChunk ? kReach : kChunk;
#pragma unroll 1
    for (int c = 0; c < kReach; c += kMoved) {
      const Chunk<Scalar, kVector, kChunk> own = coming;
      if (kMoved == kChunk) {
        coming.load(x, line.stride, grad_out, args.grad_strides.length, end - tile.n - kChunk);
      }
      tile.template step<false, kMoved>(args, line, first, filters, own, sums);
    }
  }
}

// Warps of a multiprocessor that there should be registers for; chunks of wide types need more of them.
template <class Scalar>
constexpr int kColumnWarps = sizeof(Scalar) == 2 ? 24 : (sizeof(Scalar) == 4 ? 16 : 8);

// Lanes stand on neighbouring channels, the kSegments warps of a block on tiles of its slab. channels is a multiple of
// kVector. Grid: groups of 32 * kVector channels, slabs.
template <class Scalar, int kWidth, bool kSequences, int kVector, int kSegments, int kSteps>
__global__ void __launch_bounds__(kSegments* kWarpSize, kColumnWarps<Scalar> / kSegments)
    backward_columns(const Args args) {
  using T = Acc<Scalar>;
  __shared__ T shared[kSegments][kVector][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, segment = threadIdx.x / kWarpSize;
  const i64 channel = (i64(blockIdx.x) * kWarpSize + lane) * kVector;
  const bool is_channel = channel < args.channels;  // the others only take part in the barriers
  const Filters<Scalar, kWidth, kVector> filters(args, is_channel ? channel : 0);
  const i64 tiles_of_one = (args.length + kSteps - 1) / kSteps, tiles = args.batch * tiles_of_one;
  const i64 slab = (tiles + args.slabs - 1) / args.slabs;
  const i64 begin = blockIdx.y * slab, end = min_of(tiles, begin + slab);
  Sums<T, kWidth, kVector> sums;
#pragma unroll
  for (int j = 0; j <= kWidth; ++j) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums.at[j][i] = T(0);
  }
#pragma unroll 1
  for (i64 tile = begin + segment; is_channel && tile < end; tile += kSegments) {
    const i64 batch = quotient(tile, tiles_of_one);
    backward_tile<Scalar, kWidth, kSequences, kVector, kSteps>(
        args, filters, batch, channel, (tile - batch * tiles_of_one) * kSteps, sums);
  }
  T* partials =
      static_cast<T*>(args.partials) + (i64(blockIdx.y) * args.channels + channel) * (kWidth + 1);
#pragma unroll
  for (int j = 0; j <= kWidth; ++j) {
    __syncthreads();  // the sums of the previous turn may still be read
#pragma unroll
    for (int i = 0; i < kVector; ++i) shared[segment][i][lane] = sums.at[j][i];
    __syncthreads();
    if (segment > 0 || !is_channel) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      T sum = T(0);
      for (int s = 0; s < kSegments; ++s) sum += shared[s][i][lane];
      partials[i * (kWidth + 1) + j] = sum;
    }
  }
}

// ---- what remains ----

// The warps of a block share the slabs of 32 weights and biases, a lane each. Grid: one-dimensional.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) finish(const Args args) {
  using T = Acc<Scalar>;
  constexpr int kWarps = kBlockSize / kWarpSize;
  __shared__ T shared[kWarps][kWarpSize];
  const i64 columns = args.width + 1, count = args.channels * columns;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const i64 at = i64(blockIdx.x) * kWarpSize + lane;
  const T* partials = static_cast<const T*>(args.partials);
  T sum = T(0);
#pragma unroll 4
  for (i64 s = warp; s < args.slabs && at < count; s += kWarps) sum += partials[s * count + at];
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || at >= count) return;
#pragma unroll 1
  for (int w = 1; w < kWarps; ++w) sum += shared[w][lane];
  const i64 channel = at / columns, j = at - channel * columns;
  if (j < args.width) {
    store_either<Scalar>(args.grad_weight, args.weight_is_float != 0, channel * args.width + j,
                         sum);
  } else if (args.grad_bias != nullptr) {
    store_either<Scalar>(args.grad_bias, args.bias_is_float != 0, channel, sum);
  }
}

// One thread for one element of the initial state's gradient. Grid: one-dimensional.
template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) initial(const Args args) {
  const i64 reach = args.width - 1;
  const i64 at = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (at >= args.batch * args.channels * reach) return;
  const i64 row = at / reach, batch = row / args.channels;
  store(static_cast<Scalar*>(args.grad_initial)[at],
        initial_gradient<Scalar>(args, batch, row - batch * args.channels, int(at - row * reach)));
}

}  // namespace torchkiln::causal_conv1d
