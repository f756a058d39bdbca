// The gradient of the maps of deformable aggregation with the same bits every time, each row written once.
//
//   count   how many samples each pixel of the maps gets, of those that have it above and to the left of them
//   sum     of these counts, those of a block's pixels
//   place   where the samples of each pixel begin
//   fill    puts samples there, in any order
//   order   sorts those of each pixel
//   gather  a warp owns a run of rows of the maps, a lane finds the samples around each, the warp adds up what rows get of
//           them, in order, 32 packs of channels in registers. No warp waits for another. Rows with too many are left to
//   gather_crowds, where the warps of a block share the samples of a quad of rows
// spills: a few words of some variants, mostly on sm_75 and sm_80, outside of the loop that adds up
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/bins.cuh"
#include "common/pack.cuh"
#include "deformable/deformable_aggregation.h"

namespace torchkiln::deformable_aggregation_gather {

using namespace deformable_aggregation;

// ---- samples by pixels ---------------------------------------------------------------------------------------------

__device__ __forceinline__ i32 maps_of(const Args& args) {
  return i32(args.cameras) * i32(args.levels);
}

// `tell(bin, sample)` on each level for that of this thread, if a camera sees it.
template <class T, int kBlockSize, class Tell>
__device__ __forceinline__ void each_seen(const Args& args, const Tell& tell) {
  const i64 samples = args.queries * args.points;
  const i64 pair = i64(blockIdx.x) * kBlockSize + threadIdx.x;
  if (pair >= args.batch * samples * args.cameras) return;
  T x, y;
  location_at(args, pair, x, y);
  if (!is_seen(x, y)) return;
  const i64 all = pair / args.cameras, image = all / samples;
  const i32 camera = i32(pair - all * args.cameras), levels = i32(args.levels);
  const i32 first = i32(all - image * samples) * maps_of(args) + camera * levels;
#pragma unroll 1
  for (i32 level = 0; level < levels; ++level) {
    const Map map = map_of(args, image, camera, level);
    if (map.h == 0 || map.w == 0) continue;
    const Touch<T> touch = touch_of(map.h, map.w, x, y);
    const i32 row = min_of(max_of(touch.top, 0), map.h - 1);
    const i32 column = min_of(max_of(touch.left, 0), map.w - 1);
    tell(first_bin(args, map.source) + map.first + row * map.w + column, first + level);
  }
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) count(const Args args) {
  each_seen<Scalar, kBlockSize>(args, [&](i64 bin, i32) { atomicAdd(args.ends + bin, 1); });
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) sum(const Args args) {
  sum_bins<kBlockSize, kBinsOfBlock>(args.ends, args.sums);
}

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) place(const Args args) {
  place_bins<kBlockSize, kBinsOfBlock>(args.ends, args.sums);
}

template <class Scalar, int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) fill(const Args args) {
  each_seen<Scalar, kBlockSize>(
      args, [&](i64 bin, i32 sample) { args.samples[atomicAdd(args.ends + bin, 1)] = sample; });
}

// The sorted list's part of the bins [from, to].
struct Span {
  i32 begin, count;

  __device__ __forceinline__ Span(const i32* ends, i64 from, i64 to)
      : begin(from > 0 ? ends[from - 1] : 0), count(ends[to] - begin) {}
};

template <int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) order(const Args args) {
  // Neighbouring pixels of a small map all have many samples: they go to different blocks.
  const i64 bin = i64(threadIdx.x) * gridDim.x + blockIdx.x;
  const Span span(args.ends, bin, bin);
  order_bins<kBlockSize>(args.samples, span.begin, span.count);
}

// ---- shares of rows ------------------------------------------------------------------------------------------------

__device__ __forceinline__ i32 lane_of() { return i32(threadIdx.x) % kWarpSize; }

template <class T>
__device__ __forceinline__ T of_lane(T value, i32 lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// A map that has rows of a run.
struct Place {
  i32 number, h, w;
  i32 before;  // pixels of the map before the run, less than 0 where it begins inside of that

  // Of a map, whatever its number. It has none where h is 0.
  __device__ __forceinline__ Place(const Args& args, const Run& run, i32 map) : number(map) {
    const u32 levels = u32(args.levels), camera = u32(map) / levels;
    const Map own = map_of(args, run.image, i32(camera), i32(u32(map) - camera * levels));
    h = own.source == run.source ? own.h : 0;
    w = own.w;
    before = run.image * rows_of(args, run.source) + run.first - i32(own.first);
  }
  __device__ __forceinline__ Place(const Place& own, i32 lane)
      : number(of_lane(own.number, lane)),
        h(of_lane(own.h, lane)),
        w(of_lane(own.w, lane)),
        before(of_lane(own.before, lane)) {}

  __device__ __forceinline__ bool has(i32 row) const { return u32(before + row) < u32(h * w); }
  __device__ __forceinline__ bool has_any(i32 rows) const {
    return before + rows > 0 && before < h * w;
  }
};

// The samples around rows of a run that lie in a map, row by row: from the pixels above, then from those beside. A lane
// knows its row's.
struct Around {
  i32 first;     // how many are those of rows before
  i32 above;     // how many of its own come from above
  i32 bases[2];  // what leads from numbers to places in the list: of these, of others
  i32 count;     // of all rows
  u32 rows;      // a bit for each that the map has

  // The whole warp must call.
  __device__ __forceinline__ Around(const Args& args, const Run& run, const Place& place)
      : above(0), bases{} {
    const bool inside = lane_of() < run.rows && place.has(lane_of());
    rows = __ballot_sync(0xffffffffu, inside);
    i32 beside = 0;
    if (inside) {
      const i32 pixel = place.before + lane_of();
      const i32 left = u32(pixel) % u32(place.w) != 0 ? 1 : 0;
      const i64 bin = first_bin(args, run.source) + i64(run.image) * rows_of(args, run.source) +
                      run.first + lane_of();
      if (pixel >= place.w) {
        const Span span(args.ends, bin - place.w - left, bin - place.w);
        bases[0] = span.begin;
        above = span.count;
      }
      const Span span(args.ends, bin - left, bin);
      bases[1] = span.begin;
      beside = span.count;
    }
    const i32 sum = warp_inclusive_sum(above + beside);
    first = sum - above - beside;
    bases[0] -= first;
    bases[1] -= first + above;
    count = of_lane(sum, kWarpSize - 1);
  }

  // The row of a number. The whole warp must call.
  __device__ __forceinline__ i32 row(i32 number) const {
    i32 row = 0;  // the last that does not begin after it
#pragma unroll
    for (i32 step = kWarpSize / 2; step > 0; step /= 2) {
      if (of_lane(first, row + step) <= number) row += step;
    }
    return row;
  }
};

// What a row of a run gets of a sample.
template <class T>
struct alignas(sizeof(T) == 8 ? 8 : 16) Share {
  i32 query;   // of all images
  i32 weight;  // where the row of weights begins, inside of the query
  i32 row;     // -1 if it gets nothing
  T factor;
};

template <class T>
__device__ __forceinline__ Share<T> share_of(const Args& args, const Run& run, const Place& place,
                                             i32 row, i32 listed) {
  const i32 maps = maps_of(args), points = i32(args.points), levels = i32(args.levels);
  // Numbers that are never negative: without their sign, divisions are shorter.
  const i32 sample = i32(u32(listed) / u32(maps)), query = i32(u32(sample) / u32(points));
  const i32 camera = i32(u32(place.number) / u32(levels));
  Share<T> share = {0, 0, -1, T(0)};
  if (listed - sample * maps != place.number) return share;  // maps overlap
  T right, down;
  location_at(args, (run.image * args.queries * points + sample) * args.cameras + camera, right,
              down);
  const Touch<T> touch = touch_of(place.h, place.w, right, down);
  const i32 pixel = place.before + row, y = i32(u32(pixel) / u32(place.w));
  const i32 x = pixel - y * place.w;
  const i32 below = y - touch.top, beside = x - touch.left;
  if (u32(below) > 1u || u32(beside) > 1u) return share;
  share.query = run.image * i32(args.queries) + query;
  share.weight = weight_row(args, sample - query * points, camera, place.number - camera * levels);
  share.row = row;
  share.factor = (below != 0 ? touch.down : T(1) - touch.down) *
                 (beside != 0 ? touch.right : T(1) - touch.right);
  return share;
}

// `tell(place, around)` for all maps that have rows of a run. The whole warp must call.
template <class Tell>
__device__ __forceinline__ void each_map(const Args& args, const Run& run, const Tell& tell) {
  const i32 maps = maps_of(args);
#pragma unroll 1
  for (i32 first = 0; first < maps; first += kWarpSize) {
    const i32 map = first + lane_of();
    const Place own(args, run, min_of(map, maps - 1));
    u32 left = __ballot_sync(0xffffffffu, map < maps && own.has_any(run.rows));
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const Place place(own, __ffs(i32(left)) - 1);
      tell(place, Around(args, run, place));
    }
  }
}

// Lists, in shared memory, the shares of 32 numbers from one on, those up to an end: first those that are something. The
// whole warp must call.
template <class T>
__device__ __forceinline__ void list_shares(const Args& args, const Run& run, const Place& place,
                                            const Around& around, i32 first, i32 end,
                                            Share<T>* shares) {
  const i32 number = min_of(first + lane_of(), end - 1), row = around.row(number);
  const i32 beside = number - of_lane(around.first, row) < of_lane(around.above, row) ? 0 : 1;
  const i32 above_base = of_lane(around.bases[0], row), base = of_lane(around.bases[1], row);
  Share<T> own = {0, 0, -1, T(0)};
  if (first + lane_of() < end) {
    const i32 listed = args.samples[number + (beside != 0 ? base : above_base)];
    own = share_of<T>(args, run, place, row, listed);
  }
  const u32 all = __ballot_sync(0xffffffffu, own.row >= 0), before = (1u << lane_of()) - 1;
  __syncwarp();
  shares[own.row >= 0 ? __popc(all & before) : __popc(all) + __popc(~all & before)] = own;
  __syncwarp();
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Packs of channels of a warp, and how many of these sum all channels.
template <int kVector, int kPacks>
struct Chunks {
  static constexpr i32 kChannels = kWarpSize * kVector * kPacks;
  static __device__ __forceinline__ u32 count(const Args& args) {
    return (u32(args.channels) + kChannels - 1) / kChannels;
  }
};

// Elements for a lane, read as they are, up to 16 bytes at a time.
template <class Scalar, int kCount>
struct Values {
  static constexpr int kMost = 16 / int(sizeof(Scalar)), kPart = kCount < kMost ? kCount : kMost;
  Pack<Scalar, kPart> parts[kCount / kPart];

  __device__ __forceinline__ void read(const Scalar* from) {
#pragma unroll
    for (int i = 0; i < kCount / kPart; ++i) parts[i] = load_pack<kPart>(from + i * kPart);
  }
  __device__ __forceinline__ Acc<Scalar> at(int i) const {
    return load(parts[i / kPart].at[i % kPart]);
  }
};

// The kPacks packs of kVector channels that a lane sums, from `first` on. Packs behind the last channel read what the last
// one does.
template <class Weight, class Grad, class T, int kVector, int kPacks>
struct Packs {
  const Weight* weights[kPacks];
  const Grad* gradients[kPacks];
  const T* normalizers;              // or null
  u32 weight_bytes, gradient_bytes;  // of a query
  i32 groups, group[kPacks];

  __device__ __forceinline__ Packs(const Args& args, i32 first)
      : normalizers(static_cast<const T*>(args.normalizer)),
        weight_bytes(u32(weights_of_query(args, 1)) * u32(sizeof(Weight))),
        gradient_bytes(u32(args.channels) * u32(sizeof(Grad))),
        groups(i32(args.groups)) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const i32 channel = min_of(first + channel_of(pack), i32(args.channels) - kVector);
      group[pack] = i32(u32(channel) * u32(groups) / u32(args.channels));
      weights[pack] = static_cast<const Weight*>(args.weights) + group[pack];
      gradients[pack] = static_cast<const Grad*>(args.grad_output) + channel;
    }
  }
  static __device__ __forceinline__ i32 channel_of(int pack) {
    return (pack * kWarpSize + lane_of()) * kVector;
  }
  __device__ __forceinline__ Weight weight(int pack, const Share<T>& share) const {
    return row_at(weights[pack], share.query, weight_bytes)[share.weight];
  }
  __device__ __forceinline__ Normalizer<T> normalizer(int pack, const Share<T>& share) const {
    const T* row = row_at(normalizers, share.query, 2 * u32(groups) * u32(sizeof(T)));
    return {row[group[pack]], row[groups + group[pack]], true};
  }
  __device__ __forceinline__ const Grad* gradient(int pack, const Share<T>& share) const {
    return row_at(gradients[pack], share.query, gradient_bytes);
  }
};

// Sums of a row, up to now.
template <class T, int kVector, int kPacks>
struct Sums {
  T at[kPacks][kVector] = {};
  i32 row = -1;
};

// Adds up a list of shares, in order; `tell(sums)` of each row when another one begins. Points of a query lie together: of
// neighbours in the list with one row and query the weights are added up first, and the query's gradient is read once. Loads
// are in flight for kAtOnce of them.
template <int kAtOnce, class Weight, class Grad, class T, int kVector, int kPacks, class Tell>
__device__ __forceinline__ void add_shares(const Packs<Weight, Grad, T, kVector, kPacks>& packs,
                                           const Share<T>* shares, Sums<T, kVector, kPacks>& sums,
                                           const Tell& tell) {
  T weights[kPacks] = {};  // of a row and query, up to now
#pragma unroll 1
  for (i32 first = 0; first < kWarpSize && shares[first].row >= 0; first += kAtOnce) {
    Values<Grad, kVector> values[kAtOnce][kPacks];
    Weight read[kAtOnce][kPacks];
    T factors[kAtOnce][kPacks];
    bool last[kAtOnce];  // of its row and query
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Share<T>&share = shares[first + i],
            &next = shares[min_of(first + i + 1, kWarpSize - 1)];
      last[i] = first + i + 1 == kWarpSize || next.row != share.row || next.query != share.query;
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        if (last[i]) values[i][pack].read(packs.gradient(pack, share));
        read[i][pack] = packs.weight(pack, share);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce * kPacks; ++i) {
      factors[i / kPacks][i % kPacks] = T(load(read[i / kPacks][i % kPacks]));
    }
    if (packs.normalizers != nullptr) {
#pragma unroll
      for (int i = 0; i < kAtOnce * kPacks; ++i) {
        T& factor = factors[i / kPacks][i % kPacks];
        factor = packs.normalizer(i % kPacks, shares[first + i / kPacks])(factor);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Share<T>& share = shares[first + i];
      if (share.row < 0) continue;
      if (share.row != sums.row) {
        tell(sums);
        sums = {};
        sums.row = share.row;
      }
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) weights[pack] += factors[i][pack] * share.factor;
      if (!last[i]) continue;
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          sums.at[pack][c] += weights[pack] * T(values[i][pack].at(c));
        }
        weights[pack] = T(0);
      }
    }
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class Scalar>
__device__ __forceinline__ Scalar* rows_at(const Args& args, const Run& run, i32 channel) {
  const i64 row = i64(run.image) * rows_of(args, run.source) + run.first;
  return static_cast<Scalar*>(args.gradients[run.source]) + (row * args.channels + channel);
}

// `rows` are those of a run, from the first channel on of the `channels` that are left.
template <class Scalar, int kVector, int kPacks, class T>
__device__ __forceinline__ void write_row(Scalar* rows, u32 bytes, i32 channels,
                                          const Sums<T, kVector, kPacks>& sums) {
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const i32 channel = (pack * kWarpSize + lane_of()) * kVector;
    if (channel >= channels) continue;
    Pack<Scalar, kVector> result;
#pragma unroll
    for (int c = 0; c < kVector; ++c) store(result.at[c], sums.at[pack][c]);
    store_pack<kVector>(row_at(rows, sums.row, bytes) + channel, result);
  }
}

// Leaves the quads that have rows of `crowded`, a bit each, to `gather_crowds`.
__device__ __forceinline__ void leave(const Args& args, i32 quad, u32 crowded) {
  if (lane_of() < kMostRows / kQuad && (crowded >> (kQuad * lane_of()) & ((1u << kQuad) - 1)) != 0)
    args.crowded[atomicAdd(args.crowds, 1)] = quad + lane_of();
}

template <class Scalar, class Weight, class Grad, int kVector, int kPacks, int kRows, int kAtOnce,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) gather(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kWarps = kBlockSize / kWarpSize;
  __shared__ Share<T> lists[kWarps][kWarpSize];
  Share<T>* list = lists[threadIdx.x / kWarpSize];
  const u32 chunks = Chunks<kVector, kPacks>::count(args);
  // The last rows first: those of small maps, which get more samples.
  const u32 block = gridDim.x - 1 - blockIdx.x, chunk = block % chunks;
  const i64 number = i64(block / chunks) * kWarps + threadIdx.x / kWarpSize;
  const i32 quad = i32(number) * (kRows / kQuad);
  const Run run = run_at(args, quad, kRows);
  if (run.image >= args.batch || run.rows <= 0) return;
  const i32 first_channel = i32(chunk) * Chunks<kVector, kPacks>::kChannels;
  const Packs<Weight, Grad, T, kVector, kPacks> packs(args, first_channel);
  Scalar* rows = rows_at<Scalar>(args, run, first_channel);
  const i32 channels = i32(args.channels) - first_channel;
  const u32 row_bytes = u32(args.channels) * u32(sizeof(Scalar));
  u32 seen = 0, written = 0, crowded = 0;  // a bit for each row
  each_map(args, run, [&](const Place& place, const Around& around) {
    // Maps that overlap are added up where sums are not yet rounded.
    if (around.count > kMostShares || (around.rows & seen) != 0) crowded |= around.rows;
    seen |= around.rows;
    if ((around.rows & crowded) != 0) return;
    Sums<T, kVector, kPacks> sums;
    const auto write = [&](const Sums<T, kVector, kPacks>& row) {
      if (row.row < 0) return;
      written |= 1u << row.row;
      write_row(rows, row_bytes, channels, row);
    };
#pragma unroll 1
    for (i32 first = 0; first < around.count; first += kWarpSize) {
      list_shares(args, run, place, around, first, around.count, list);
      add_shares<kAtOnce>(packs, list, sums, write);
    }
    write(sums);
  });
  if (chunk == 0) leave(args, quad, crowded);
  Sums<T, kVector, kPacks> none;
#pragma unroll 1
  for (none.row = 0; none.row < run.rows; ++none.row) {
    if (((written | crowded) >> none.row & 1) == 0) write_row(rows, row_bytes, channels, none);
  }
}

template <class Scalar, class Weight, class Grad, int kVector, int kPacks, int kAtOnce,
          int kBlockSize>
__global__ void __launch_bounds__(kBlockSize) gather_crowds(const Args args) {
  using T = Acc<Scalar>;
  constexpr i32 kWarps = kBlockSize / kWarpSize, kChannels = Chunks<kVector, kPacks>::kChannels;
  __shared__ Share<T> lists[kWarps][kWarpSize];
  __shared__ T parts[kWarps][kQuad][kChannels];
  const i32 warp = i32(threadIdx.x) / kWarpSize;
  // All chunks of channels have as many blocks.
  const u32 chunks = Chunks<kVector, kPacks>::count(args), crowds = u32(*args.crowds);
  const i32 first_channel = i32(blockIdx.x % chunks) * kChannels;
  const i32 channels = min_of(kChannels, i32(args.channels) - first_channel);
  const Packs<Weight, Grad, T, kVector, kPacks> packs(args, first_channel);
#pragma unroll 1
  for (u32 crowd = blockIdx.x / chunks; crowd < crowds; crowd += gridDim.x / chunks) {
    const Run run = run_at(args, args.crowded[crowd], kQuad);
#pragma unroll 1
    for (i32 i = lane_of(); i < kQuad * kChannels; i += kWarpSize) {
      parts[warp][i / kChannels][i % kChannels] = T(0);
    }
    __syncwarp();
    each_map(args, run, [&](const Place& place, const Around& around) {
      Sums<T, kVector, kPacks> sums;
      const auto add = [&](const Sums<T, kVector, kPacks>& row) {
        if (row.row < 0) return;
#pragma unroll
        for (int i = 0; i < kPacks * kVector; ++i) {
          parts[warp][row.row][packs.channel_of(i / kVector) + i % kVector] +=
              row.at[i / kVector][i % kVector];
        }
      };
      const i32 each = (around.count + kWarps - 1) / kWarps;
      const i32 end = min_of((warp + 1) * each, around.count);
#pragma unroll 1
      for (i32 first = warp * each; first < end; first += kWarpSize) {
        list_shares(args, run, place, around, first, end, lists[warp]);
        add_shares<kAtOnce>(packs, lists[warp], sums, add);
      }
      add(sums);
      __syncwarp();
    });
    __syncthreads();
    Scalar* rows = rows_at<Scalar>(args, run, first_channel);
#pragma unroll 1
    for (i32 i = threadIdx.x; i < run.rows * kChannels; i += kBlockSize) {
      const i32 row = i / kChannels, channel = i % kChannels;
      if (channel >= channels) continue;
      T sum = T(0);
#pragma unroll
      for (i32 part = 0; part < kWarps; ++part) sum += parts[part][row][channel];
      store(row_at(rows, row, u32(args.channels) * u32(sizeof(Scalar)))[channel], sum);
    }
    __syncthreads();
  }
}

}  // namespace torchkiln::deformable_aggregation_gather
