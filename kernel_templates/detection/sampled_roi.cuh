// Kernels of operators that pool bilinear samples (sampled_roi.h); an operator's own file names its struct `Op`.
//
//   forward  one block, a part of the bins of a group and kChannels channels: the pixels and weights of all samples are
//            worked out once, in shared memory, and read for all channels. channels_last: lanes on channels, 16 bytes
//            each, and turned channels exchanged between lanes at the end; else lanes on bins
//   scatter  the same blocks, the gradient: lanes on channels, vector atomics on float sums (n, h, w, c)
//   gather   the gradient with the same bits every time: a block owns a tile of pixels and a channel a thread, looks for
//            the bins that touch the tile, and adds them in order; about 100 instructions for each bin and tile
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/atomics.cuh"
#include "common/pack.cuh"
#include "common/scan.cuh"
#include "detection/sampled_roi.h"

namespace torchkiln::sampled_roi {

// Bins [0, n) of a block, and the samples of a chunk: sample s of bin b stands at s * n + b.
template <class T, int kEntries, int kBins>
struct Table {
  Patch<T> patches[kBins];
  Pixels pixels[kEntries];
  Weights<T> weights[kEntries];
  i32 most;  // samples of a bin
};

// What a block computes.
struct Part {
  i64 channel;
  // bins [first, first + bins), channels [channel, channel + channels)
  i32 group, first, bins, channels;
};

// Neighbouring blocks have the same channels, so that maps are read from memory once.
template <int kEntries, int kChannels>
__device__ __forceinline__ Part part_of(const Args& args) {
  const Division division = divided_bins(args.bins, args.hint, kEntries);
  const i32 at_once = division.at_once;
  const u32 parts = u32(division.parts), tiles = parts * u32(args.groups);
  const u32 chunk = blockIdx.x / tiles, tile = blockIdx.x - chunk * tiles;
  Part part;
  part.group = i32(tile / parts);
  part.first = i32(tile - u32(part.group) * parts) * at_once;
  part.bins = min_of(at_once, i32(args.bins) - part.first);
  part.channel = i64(chunk) * kChannels;
  part.channels = i32(min_of(i64(kChannels), args.channels - part.channel));
  return part;
}

// Every thread of the block must call; a barrier ends it.
template <class Op, int kBlockSize, class AnyTable>
__device__ __forceinline__ void lay_out(AnyTable& table, const Args& args, const Part& part) {
  if (threadIdx.x == 0) table.most = 0;
  __syncthreads();
  static_assert(kBlockSize >= kMostBins);
  if (const i32 bin = threadIdx.x; bin < part.bins) {
    auto& patch = table.patches[bin];
    using T = decltype(patch.y);
    patch = Op::template patch<T>(args, part.group, part.first + bin);
    clip<Op>(patch, args);
    if (patch.count() > 0) atomicMax(&table.most, patch.count());
  }
  __syncthreads();
}

// The samples [begin, begin + count) of all bins. Barriers around it are the caller's.
template <class Op, int kBlockSize, class AnyTable, class Pixel>
__device__ __forceinline__ void fill(AnyTable& table, i32 bins, i32 begin, i32 count, i32 h, i32 w,
                                     const Pixel& pixel) {
  const float inverse = fast_quotient(1.0f, static_cast<float>(bins));
#pragma unroll 1
  for (i32 entry = threadIdx.x; entry < bins * count; entry += kBlockSize) {
    const i32 sample = quotient(entry, inverse);
    const auto& patch = table.patches[entry - sample * bins];
    take(point_of<Op>(patch, begin + sample), h, w, patch.share, pixel, table.pixels[entry],
         table.weights[entry]);
  }
}

// Adds one sample of kVector channels of a map whose pixels lie `stride` apart.
template <int kVector, class Scalar, class Index, class T>
__device__ __forceinline__ void add_sample(const Scalar* map, const Pixels& pixels,
                                           const Weights<T>& weights, Index stride, T* sum) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const auto values = load_pack<kVector>(map + Index(pixels.at[corner]) * stride);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += weights.at[corner] * load(values.at[i]);
  }
}

// Sums of input channels that become blends of orientations when all samples are in; otherwise both orientations are
// summed.
template <class Op, int kVector>
constexpr bool kExchanged = Op::kOriented && kVector > 1;

// The results of one thread: of kVector channels of one bin.
template <class Op, class T, int kVector>
struct Pooled {
  static constexpr bool kTwice = Op::kOriented && !kExchanged<Op, kVector>;
  T value[kVector], second[kTwice ? kVector : 1];
  i32 winner[Op::kMaximum ? kVector : 1];

  __device__ __forceinline__ Pooled() : value{}, second{} {
    if constexpr (Op::kMaximum) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) winner[i] = -1;
    }
  }

  __device__ __forceinline__ void offer(const T* values, i32 sample) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const T v = values[i];
      if (winner[i] < 0 || v > value[i] || (is_nan(v) && !is_nan(value[i]))) {
        value[i] = v;
        winner[i] = sample;
      }
    }
  }
};

// Where the input of one thread lies: the map of its channel, or of its orientation and the one after it.
template <bool kTwice, class Op, bool kLast, class Scalar, class Index>
struct Source {
  const Scalar* map;
  const Scalar* second;
  Index stride;

  template <class T>
  __device__ __forceinline__ Source(const Args& args, const Patch<T>& patch, i64 bin,
                                    Index channel) {
    const Index pixels = Index(args.h) * Index(args.w), channels = Index(args.c);
    const auto of_channel = [&](Index c) {
      return static_cast<const Scalar*>(args.maps) +
             Index(max_of(patch.image, 0)) * channels * pixels + (kLast ? c : c * pixels);
    };
    stride = kLast ? channels : Index(1);
    if constexpr (Op::kBordered) channel += Index(bin % kBorders) * Index(args.channels);
    if constexpr (kTwice) {
      const i32 orientations = i32(args.orientations);
      map = of_channel(turned_channel(channel, patch.turn, orientations));
      second = of_channel(turned_channel(channel, patch.turn - 1, orientations));
    } else {
      map = of_channel(channel);
    }
  }
};

// Sums of input channels become blends of orientations. The threads of a bin have its channels one after the other, and
// those of a block of orientations are in one warp. Every thread must call; `sums` has kVector places for each. A thread
// that is not active has no neighbours to read from.
template <int kVector, class T>
__device__ __forceinline__ void exchange(const Args& args, const Patch<T>& patch, i64 channel,
                                         bool active, T* sums, T* value) {
  T* own = sums + threadIdx.x * kVector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) own[i] = value[i];
  __syncwarp();
  if (active) {
    // A power of two.
    const i32 last = i32(args.orientations) - 1, at = i32(channel) & last;
    const T* block = own - at;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const i32 place = at + i, begin = place & ~last, turned = place - patch.turn;
      const T first = block[begin + (turned & last)], second = block[begin + (turned + 1 & last)];
      value[i] = (T(1) - patch.blend) * first + patch.blend * second;
    }
  }
  __syncwarp();
}

template <class Op, class Scalar, class Index, bool kLast, int kVector, class T>
__device__ __forceinline__ void write(const Args& args, i64 group, i64 bin, Index channel,
                                      const Pooled<Op, T, kVector>& pooled) {
  const Index row = Index(group) * (kLast ? Index(args.bins) : Index(args.channels));
  const Index at = kLast ? (row + Index(bin)) * Index(args.channels) + channel
                         : (row + channel) * Index(args.bins) + Index(bin);
  Pack<Scalar, kVector> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) store(result.at[i], pooled.value[i]);
  store_pack<kVector>(static_cast<Scalar*>(args.output) + at, result);
  if constexpr (Op::kMaximum) {
    if (args.argmax == nullptr) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) args.argmax[at + i] = pooled.winner[i];
  }
}

template <class Op, class Scalar, class Index, bool kLast, int kVector, int kEntries, int kChannels,
          int kBlockSize>
__device__ __forceinline__ void forward(const Args& args) {
  using T = Acc<Scalar>;
  using Results = Pooled<Op, T, kVector>;
  __shared__ Table<T, kEntries, kMostBins> table;
  __shared__ T exchanged[kExchanged<Op, kVector> ? kBlockSize * kVector : 1];
  const Part part = part_of<kEntries, kChannels>(args);
  lay_out<Op, kBlockSize>(table, args, part);
  const i32 h = i32(args.h), w = i32(args.w), most = table.most,
            chunk = divided(kEntries, part.bins);
  const u32 vectors = u32(part.channels / kVector), bins = u32(part.bins);
#pragma unroll 1
  for (u32 first = 0; first < bins * vectors; first += kBlockSize) {
    const u32 item = first + threadIdx.x;
    const bool active = item < bins * vectors;
    const u32 outer = active ? item / (kLast ? vectors : bins) : 0;
    const u32 inner = active ? item - outer * (kLast ? vectors : bins) : 0;
    const u32 bin = kLast ? outer : inner;
    const Index channel = Index(part.channel) + Index(kLast ? inner : outer) * kVector;
    const Patch<T>& patch = table.patches[bin];
    const Source<Results::kTwice, Op, kLast, Scalar, Index> source(args, patch, part.first + bin,
                                                                   channel);
    Results pooled;
#pragma unroll 1
    for (i32 begin = 0; begin < most; begin += chunk) {
      const i32 count = min_of(chunk, most - begin);
      // What fits into the table stays there.
      if (first == 0 || most > chunk) {
        __syncthreads();
        fill<Op, kBlockSize>(table, part.bins, begin, count, h, w,
                             [&](i32 y, i32 x) { return y * w + x; });
        __syncthreads();
      }
      if (!active) continue;
#pragma unroll 1
      for (i32 sample = 0; sample < count; ++sample) {
        const Pixels pixels = table.pixels[u32(sample) * bins + bin];
        const Weights<T>& weights = table.weights[u32(sample) * bins + bin];
        if constexpr (Op::kMaximum) {
          T value[kVector] = {};
          if (pixels.at[0] >= 0) {
            add_sample<kVector>(source.map, pixels, weights, source.stride, value);
          }
          pooled.offer(value, begin + sample);
        } else if (pixels.at[0] >= 0) {
          add_sample<kVector>(source.map, pixels, weights, source.stride, pooled.value);
          if constexpr (Results::kTwice) {
            add_sample<kVector>(source.second, pixels, weights, source.stride, pooled.second);
          }
        }
      }
    }
    if constexpr (kExchanged<Op, kVector>) {
      exchange<kVector>(args, patch, channel, active, exchanged, pooled.value);
    }
    if (!active) continue;
    if constexpr (Results::kTwice) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        pooled.value[i] = (T(1) - patch.blend) * pooled.value[i] + patch.blend * pooled.second[i];
      }
    }
    if constexpr (Op::kIdentity) {
      const auto own = load_pack<kVector>(source.map + Index(part.first + bin) * source.stride);
#pragma unroll
      for (int i = 0; i < kVector; ++i) pooled.value[i] += load(own.at[i]);
    }
    write<Op, Scalar, Index, kLast, kVector>(args, part.group, part.first + bin, channel, pooled);
  }
}

// ---- gradient ------------------------------------------------------------------------------------------------------

// The gradient that kVector channels of the input get from a bin, by its number among those of all groups; `channel` is
// one of the input without its border.
template <class Op, int kVector, class Scalar, class Index, class T>
__device__ __forceinline__ void load_gradient(const Args& args, const Patch<T>& patch, Index number,
                                              Index channel, T* gradient) {
  const Scalar* from = static_cast<const Scalar*>(args.output) + number * Index(args.channels);
  if constexpr (Op::kOriented) {
    const i32 orientations = i32(args.orientations);
    i32 at = i32(u32(channel) % u32(orientations));
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const Scalar* block = from + (channel + i - at);
      const T own = load(block[turned(at, -patch.turn, orientations)]);
      const T before = load(block[turned(at, 1 - patch.turn, orientations)]);
      gradient[i] = (T(1) - patch.blend) * own + patch.blend * before;
      at = at + 1 == orientations ? 0 : at + 1;
    }
  } else {
    const auto values = load_pack<kVector>(from + channel);
#pragma unroll
    for (int i = 0; i < kVector; ++i) gradient[i] = load(values.at[i]);
  }
}

// The gradient of one bin for kVector channels, by the samples of a chunk.
template <class Op, int kVector, class Index, class AnyTable, class T>
__device__ __forceinline__ void scatter_samples(const AnyTable& table, const i32* winner, i32 begin,
                                                i32 count, u32 bin, u32 bins, T* to, Index stride,
                                                const T* gradient) {
  if constexpr (Op::kMaximum) {
#pragma unroll 1
    for (int i = 0; i < kVector; ++i) {
      const i32 sample = winner[i] - begin;
      if (sample < 0 || sample >= count) continue;
      const u32 entry = u32(sample) * bins + bin;
      const Pixels pixels = table.pixels[entry];
      if (pixels.at[0] < 0) continue;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        add_atomically<1>(to + Index(pixels.at[corner]) * stride + i,
                          table.weights[entry].at[corner], gradient + i);
      }
    }
  } else {
#pragma unroll 1
    for (i32 sample = 0; sample < count; ++sample) {
      const u32 entry = u32(sample) * bins + bin;
      const Pixels pixels = table.pixels[entry];
      if (pixels.at[0] < 0) continue;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        add_atomically<kVector>(to + Index(pixels.at[corner]) * stride,
                                table.weights[entry].at[corner], gradient);
      }
    }
  }
}

template <class Op, class Scalar, class Index, int kVector, int kEntries, int kChannels,
          int kBlockSize>
__device__ __forceinline__ void scatter(const Args& args) {
  using T = Acc<Scalar>;
  __shared__ Table<T, kEntries, kMostBins> table;
  const Part part = part_of<kEntries, kChannels>(args);
  lay_out<Op, kBlockSize>(table, args, part);
  const i32 h = i32(args.h), w = i32(args.w), most = table.most,
            chunk = divided(kEntries, part.bins);
  const u32 vectors = u32(part.channels / kVector), bins = u32(part.bins);
  const Index stride = Index(args.c);
#pragma unroll 1
  for (u32 first = 0; first < bins * vectors; first += kBlockSize) {
    const u32 item = first + threadIdx.x;
    const bool active = item < bins * vectors;
    const u32 bin = active ? item / vectors : 0;
    const Index channel = Index(part.channel) + Index(active ? item - bin * vectors : 0) * kVector;
    const Patch<T>& patch = table.patches[bin];
    const i64 own = part.first + bin;
    T* to = static_cast<T*>(args.maps) +
            Index(max_of(patch.image, 0)) * Index(args.h) * Index(args.w) * stride + channel;
    if constexpr (Op::kBordered) to += Index(own % kBorders) * Index(args.channels);
    T gradient[kVector] = {};
    i32 winner[kVector] = {};
    if (active) {
      const Index number = Index(part.group) * Index(args.bins) + Index(own);
      load_gradient<Op, kVector, Scalar>(args, patch, number, channel, gradient);
      if constexpr (Op::kMaximum) {
        const i32* winners = args.argmax + number * Index(args.channels) + channel;
#pragma unroll
        for (int i = 0; i < kVector; ++i) winner[i] = winners[i];
      }
      if constexpr (Op::kIdentity) {
        add_atomically<kVector>(to + Index(own) * stride, T(1), gradient);
      }
    }
#pragma unroll 1
    for (i32 begin = 0; begin < most; begin += chunk) {
      const i32 count = min_of(chunk, most - begin);
      if (first == 0 || most > chunk) {
        __syncthreads();
        fill<Op, kBlockSize>(table, part.bins, begin, count, h, w,
                             [&](i32 y, i32 x) { return y * w + x; });
        __syncthreads();
      }
      if (!active) continue;
      scatter_samples<Op, kVector, Index>(table, winner, begin, count, bin, bins, to, stride,
                                          gradient);
    }
  }
}

// Whether a sample of the patch may touch a tile, with a pixel to spare for rounding. One that is not a number may be
// beside others that are, so comparisons let it pass.
template <class Op, class T>
__device__ __forceinline__ bool touches(const Patch<T>& p, i32 tile_y, i32 tile_x) {
  const auto along = [&](T begin, T row, T column, i32 tile) {
    T low = begin, high = begin;
    if constexpr (Op::kIdentity) {  // the patch is a centre and two half sides
      const T reach = abs_of(row) + abs_of(column);
      low -= reach;
      high += reach;
    } else {
      const T down = T(p.rows - 1) * row, across = T(p.columns - 1) * column;
      low += (down < T(0) ? down : T(0)) + (across < T(0) ? across : T(0));
      high += (down > T(0) ? down : T(0)) + (across > T(0) ? across : T(0));
    }
    return !(high + T(2) < T(tile)) && !(low - T(1) > T(tile + kTileSide));
  };
  return p.count() > 0 && along(p.y, p.row_y, p.column_y, tile_y - p.origin_y) &&
         along(p.x, p.row_x, p.column_x, tile_x - p.origin_x);
}

// Listed bins of a block of candidates.
template <class T, int kEntries, int kBlockSize>
struct TileTable : Table<T, kEntries, kBlockSize> {
  i32 listed[kBlockSize];  // from the first candidate
  int partial[kBlockSize / kWarpSize];
  T sums[kTileSide * kTileSide][kBlockSize];
};

// Adds the samples of the listed bins to the channel of this thread; `first` is the number of the first candidate. The
// table's pixels are those of the tile, -1 for others. Every thread of the block must call.
template <class Op, class Scalar, class Index, int kEntries, int kBlockSize, class Tile>
__device__ __forceinline__ void add_listed(const Args& args, Tile& tile, i64 first, i32 total,
                                           i32 tile_y, i32 tile_x, i64 channel) {
  using T = Acc<Scalar>;
  const i32 h = i32(args.h), w = i32(args.w), most = tile.most, chunk = divided(kEntries, total);
  const auto in_tile = [&](i32 y, i32 x) {
    y -= tile_y;
    x -= tile_x;
    return y >= 0 && y < kTileSide && x >= 0 && x < kTileSide ? y * kTileSide + x : -1;
  };
  const i32 border = Op::kBordered ? i32(u32(channel) / u32(args.channels)) : 0;
  const Index own = Index(channel) - border * Index(args.channels);
#pragma unroll 1
  for (i32 begin = 0; begin < most; begin += chunk) {
    const i32 count = min_of(chunk, most - begin);
    __syncthreads();
    fill<Op, kBlockSize>(tile, total, begin, count, h, w, in_tile);
    __syncthreads();
    if (channel >= args.c) continue;
#pragma unroll 1
    for (i32 slot = 0; slot < total; ++slot) {
      const Index number = Index(first) + tile.listed[slot];
      // A group has as many bins of each border.
      if (Op::kBordered && u32(number) % u32(kBorders) != u32(border)) continue;
      T gradient;
      load_gradient<Op, 1, Scalar, Index>(args, tile.patches[slot], number, own, &gradient);
      i32 from = 0, to = count;
      if constexpr (Op::kMaximum) {
        from = args.argmax[number * Index(args.channels) + own] - begin;
        to = min_of(from + 1, count);
        if (from < 0) continue;
      }
#pragma unroll 1
      for (i32 sample = from; sample < to; ++sample) {
        const Pixels pixels = tile.pixels[sample * total + slot];
        const Weights<T>& weights = tile.weights[sample * total + slot];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (pixels.at[corner] < 0) continue;
          tile.sums[pixels.at[corner]][threadIdx.x] += weights.at[corner] * gradient;
        }
      }
    }
  }
}

// Grid: one block per image, tile and kBlockSize channels. kLast: layout of the gradient of the maps; that of bins is by
// channel.
template <class Op, class Scalar, class Index, bool kLast, int kEntries, int kBlockSize>
__device__ __forceinline__ void gather(const Args& args) {
  using T = Acc<Scalar>;
  __shared__ TileTable<T, kEntries, kBlockSize> tile;
  const u32 tiles_x = (u32(args.w) + kTileSide - 1) / kTileSide;
  const u32 tiles_y = (u32(args.h) + kTileSide - 1) / kTileSide;
  const u32 chunks = (u32(args.c) + kBlockSize - 1) / kBlockSize;
  u32 rest = blockIdx.x;
  const i64 channel = i64(rest % chunks) * kBlockSize + threadIdx.x;
  rest /= chunks;
  const i32 tile_x = i32(rest % tiles_x) * kTileSide;
  rest /= tiles_x;
  const i32 tile_y = i32(rest % tiles_y) * kTileSide, image = i32(rest / tiles_y);
#pragma unroll 1
  for (int i = 0; i < kTileSide * kTileSide; ++i) tile.sums[i][threadIdx.x] = T(0);

  const i64 candidates = Op::kByImage ? args.bins : args.groups * args.bins;
  i32 group = Op::kByImage ? image : 0;
  const i64 number = i64(group) * args.bins;  // of the first of them
  u32 bin = threadIdx.x;                      // own candidate, counted on from the group's first
#pragma unroll 1
  for (i64 seen = 0; seen < candidates; seen += kBlockSize) {
    Patch<T> patch = {};
    bool listed = false;
    if (seen + threadIdx.x < candidates) {
      const u32 further = bin / u32(args.bins);
      group += i32(further);
      bin -= further * u32(args.bins);
      patch = Op::template patch<T>(args, group, i64(bin));
      listed = patch.image == image && touches<Op>(patch, tile_y, tile_x);
    }
    int total;
    if (threadIdx.x == 0) tile.most = 0;
    // Its barriers are also those between the readers of a table and the writers of the next one.
    const int slot = block_exclusive_count<kBlockSize>(listed, tile.partial, total);
    if (listed) {
      tile.patches[slot] = patch;
      tile.listed[slot] = i32(threadIdx.x);
      clip<Op>(tile.patches[slot], args);
      atomicMax(&tile.most, tile.patches[slot].count());
    }
    __syncthreads();
    if (total > 0) {
      add_listed<Op, Scalar, Index, kEntries, kBlockSize>(args, tile, number + seen, total, tile_y,
                                                          tile_x, channel);
    }
    bin += kBlockSize;
    __syncthreads();
  }
  if (channel >= args.c) return;
  const Index pixels = Index(args.h) * Index(args.w);
#pragma unroll 1
  for (int i = 0; i < kTileSide * kTileSide; ++i) {
    const i32 y = tile_y + i / kTileSide, x = tile_x + i % kTileSide;
    if (y >= args.h || x >= args.w) continue;
    const Index pixel = Index(y) * Index(args.w) + x;
    T sum = tile.sums[i][threadIdx.x];
    if constexpr (Op::kIdentity) {
      sum += load(static_cast<const Scalar*>(
          args.output)[(Index(image) * pixels + pixel) * Index(args.c) + Index(channel)]);
    }
    Scalar* to = static_cast<Scalar*>(args.maps);
    store(kLast ? to[(Index(image) * pixels + pixel) * Index(args.c) + Index(channel)]
                : to[(Index(image) * Index(args.c) + Index(channel)) * pixels + pixel],
          sum);
  }
}

}  // namespace torchkiln::sampled_roi

// The kernels of an operator, in its namespace: no template of NVRTC can be named with a type of ours as an argument
// without spelling it in every manifest.
#define TORCHKILN_SAMPLED_ROI_KERNELS(Op)                                                        \
  template <class Scalar, class Index, bool kLast, int kVector, int kEntries, int kChannels,     \
            int kBlockSize>                                                                      \
  __global__ void __launch_bounds__(kBlockSize)                                                  \
      forward(const ::torchkiln::sampled_roi::Args args) {                                       \
    ::torchkiln::sampled_roi::forward<Op, Scalar, Index, kLast, kVector, kEntries, kChannels,    \
                                      kBlockSize>(args);                                         \
  }                                                                                              \
  template <class Scalar, class Index, int kVector, int kEntries, int kChannels, int kBlockSize> \
  __global__ void __launch_bounds__(kBlockSize)                                                  \
      scatter(const ::torchkiln::sampled_roi::Args args) {                                       \
    ::torchkiln::sampled_roi::scatter<Op, Scalar, Index, kVector, kEntries, kChannels,           \
                                      kBlockSize>(args);                                         \
  }                                                                                              \
  template <class Scalar, class Index, bool kLast, int kEntries, int kBlockSize>                 \
  __global__ void __launch_bounds__(kBlockSize)                                                  \
      gather(const ::torchkiln::sampled_roi::Args args) {                                        \
    ::torchkiln::sampled_roi::gather<Op, Scalar, Index, kLast, kEntries, kBlockSize>(args);      \
  }
